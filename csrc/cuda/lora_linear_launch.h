// The rank-R products of lora_linear, lora_linear_group and lora_update, as their operators ask for them: what runs
// them is lora_linear_launch.cuh, which lora_linear_launch.cu compiles once for all. Torch-free.
//
// A group's members share one mask where nothing drops: then the h of all lie side by side in one matrix, their q one
// under another, and they run as one product of the ranks' sum. With dropout each member has its own mask. Every sum
// that is split over blocks leaves fp32 partials in `workspace`, which the caller provides.
#pragma once
#include <vector>

#include "tile.cuh"

namespace lorasp::cuda {

struct Dropout {
  KeepMask keep{0, 0, 0, 0};
  const int64_t* seed = nullptr;  // on the device
};

// h (M, R) = scale (keep o p) q.
template <class T>
struct Projection {
  Matrix<const T> q;  // (R, C) where rank_first, else (C, R)
  int64_t R;
  float scale;
  uint32_t word;  // of its mask
  T* h;
  int64_t h_stride;
};

// Some of the columns of p, in ascending order. position: (C,), the place of each column among them, negative for none;
// nullptr: all of them.
struct Selection {
  const int* position = nullptr;
  int64_t count = 0;
};

// Where the gradient of a factor stands: all of what is summed; or its flat entries; or, spread, at the places that
// position gives to the rows of a B or the columns of an A, `extent` of them, zero elsewhere. False entries of mask
// become zero.
struct Gradient {
  void* out = nullptr;  // contiguous; nullptr: not asked for
  bool fp32 = false;    // else in the compute dtype
  const uint8_t* mask = nullptr;
  const int64_t* entries = nullptr;
  int64_t entry_count = 0;
  const int* position = nullptr;
  int64_t extent = 0;
};

// gradient = (keep o p)^T h.
template <class T>
struct Contraction {
  Matrix<const T> h;  // (M, R)
  uint32_t word;
  Gradient gradient;
};

// keep o (h q).
template <class T>
struct Expansion {
  Matrix<const T> h;  // (M, R)
  Matrix<const T> q;  // (R, C) where rank_first, else (C, R)
  uint32_t word;
};

// position[i]: the place of i in the index, or -1.
struct PositionArgs {
  const int64_t* index;  // (count,)
  int64_t count, size;
  int* position;  // (size,)
};

// Which part of a factor trains: all of it, columns of an A, rows of a B, or flat entries.
enum class Trains { kWhole, kColumns, kRows, kEntries };

// A tensor in the compute dtype or in fp32; data may be nullptr.
struct Stored {
  const void* data;
  bool fp32;
};

template <class T>
struct FactorPart {
  Trains trains;
  Stored lora;           // contiguous: (rows, cols), (rows, count), (count, cols) or (count,)
  Stored frozen;         // (rows, cols), contiguous, or nullptr: zeros
  const int64_t* index;  // (count,); nullptr where kWhole
  int64_t count;
  int64_t rows, cols;
  T* out;  // (rows, cols)
};

// Floats of workspace. R: of each member.
template <class T>
int64_t project_workspace(const Device& device, int64_t M, int64_t C, const std::vector<int64_t>& R, bool drops);
template <class T>
int64_t outer_workspace(const Device& device, int64_t M, int64_t C, const std::vector<int64_t>& R, bool drops);
template <class T>
int64_t project_outer_workspace(const Device& device, int64_t M, int64_t N, int64_t R);

// M, C, R >= 1. columns (M, selection.count), or nullptr: the selected columns of p from the same pass.
template <class T>
void project(const Device& device, const Matrix<const T>& p, const std::vector<Projection<T>>& projections,
             bool rank_first, const Dropout& dropout, const Selection& selection, T* columns, float* workspace);

// columns: of p in the mask, which has mask_columns; nullptr: the same. selection: rank last, of dB's rows.
template <class T>
void outer(const Device& device, const Matrix<const T>& p, const std::vector<Contraction<T>>& contractions,
           bool rank_first, const Dropout& dropout, const int64_t* columns, int64_t mask_columns,
           const Selection& selection, float* workspace);

// Whether g and dB come from one pass over dy: where that moves fewer bytes than two passes.
template <class T>
bool one_pass_over_dy(int64_t M, int64_t N, int64_t R, int64_t selected);

// g and dB = dy^T xa from one pass over dy (M, N). R <= 16.
template <class T>
void project_outer(const Device& device, const Matrix<const T>& dy, const Projection<T>& g, const Matrix<const T>& xa,
                   const Selection& selection, const Gradient& dlora_B, float* workspace);

// out (M, C) = sum of the expansions + bias (C,) or nullptr; where add, that added to out in place.
template <class T>
void accumulate(const Device& device, const std::vector<Expansion<T>>& expansions, bool rank_first,
                const Dropout& dropout, const T* bias, bool add, const Matrix<T>& out);

template <class T>
void make_factors(const Device& device, const std::vector<FactorPart<T>>& parts);

void find_positions(const Device& device, const PositionArgs& args);

}  // namespace lorasp::cuda
