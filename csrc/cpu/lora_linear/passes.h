// The low-rank passes around the frozen product: block loops over a tall tensor and their reductions, for one adapter
// or for several that read the same input. Same bits on every run with the same number of threads.
#pragma once
#include <c10/util/ArrayRef.h>

#include <cstdint>

#include "../common/keep_bits.h"
#include "columns.h"
#include "gradient.h"
#include "skinny.h"

namespace lorasp {

// A tensor (M, columns) of the compute dtype with unit column stride; data may be nullptr where a pass allows it.
struct Tall {
  void* data;
  int64_t ld;
};

// What a member makes of its rows of a stacked projection: xa (M, R) = round(scale * sums), y += xa B^T.
struct Output {
  int64_t R, N;
  float scale;
  void* xa;
  const void* B;  // (N, R), compute dtype, contiguous
  Tall y;         // data nullptr: xa only
};

// Members that see x through the same mask: A (R, K) holds their factors one under another, R the sum of their ranks.
struct Projection {
  int64_t R;
  const void* A;         // compute dtype, contiguous
  const KeepMask* keep;  // of an (M, K) mask; nullptr: no dropout
  c10::ArrayRef<Output> outputs;
};

struct Slice {
  int64_t R;
  Gradient dA;
};

// The way back of a Projection: g (M, R) holds the members' columns side by side.
struct Expansion {
  int64_t R;
  const void* A;
  const KeepMask* keep;
  const void* g;
  c10::ArrayRef<Slice> slices;
};

// Each output's xa from sums (keep o x) A^T. columns: x_columns (M, count) = x[:, columns] on the way; may be nullptr.
void forward_pass(DType dtype, int64_t M, int64_t K, Tall x, c10::ArrayRef<Projection> projections,
                  const Columns* columns, void* x_columns);

// g = round(scale * dy B) unless g.data is nullptr, dB = dy^T xa unless dB.data is nullptr: one pass over dy (M, N).
void dy_pass(DType dtype, int64_t M, int64_t N, int64_t R, Tall dy, const void* B, float scale, Tall g, const void* xa,
             const Gradient& dB);

// dx += keep o (g A) unless dx.data is nullptr; each slice's dA = g^T (keep o x) unless its data is nullptr: one mask
// for both. columns: x is (M, count), x[:, columns] of the input, and the gradients are of these columns.
void dx_pass(DType dtype, int64_t M, int64_t K, Tall dx, Tall x, c10::ArrayRef<Expansion> expansions,
             const Columns* columns);

}  // namespace lorasp
