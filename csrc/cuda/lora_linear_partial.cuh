// Factors that train in part (LoRA-SP), and how their selections are looked up. An index holds ascending numbers
// without repeats; looking one up is a binary search, so that no table has to be cleared first and no index, whatever
// it holds, leads outside of memory.
//
// factor: A (R, K) and B (N, R) of up to kMembers members, whole, in the compute dtype: lora itself; or lora's entries
// at their columns (of A), rows (of B) or flat places, and frozen, or zero, elsewhere. Also where fp32 masters are
// rounded and where the A of a group come to lie one under another. Floor: reads and writes R K (N R) elements.
//
// positions: for each of 0 ... size - 1 its place in an index, or -1. Floor: writes 4 size bytes.
#pragma once
#include "lora_linear_launch.h"

namespace lorasp::cuda {

// The place of `key` in index (count,), or -1.
__device__ inline int64_t place_in(const int64_t* index, int64_t count, int64_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (load_global(index + middle) < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && load_global(index + low) == key ? low : -1;
}

static __global__ void __launch_bounds__(kThreads) lora_linear_positions_kernel(const PositionArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < args.size) store_global(args.position + i, static_cast<int>(place_in(args.index, args.count, i)));
}

template <class T>
struct FactorArgs {
  FactorPart<T> parts[kMembers];
};

template <class T>
__device__ T load_stored(const Stored& from, int64_t i) {
  if (from.fp32) return from_float<T>(load_global(static_cast<const float*>(from.data) + i));
  return load_global(static_cast<const T*>(from.data) + i);
}

template <class T>
__global__ void __launch_bounds__(kThreads) lora_linear_factor_kernel(const FactorArgs<T> args) {
  const FactorPart<T>& part = args.parts[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= part.rows * part.cols) return;
  int64_t at = i;
  if (part.trains != Trains::kWhole) {
    const int64_t row = i / part.cols, col = i % part.cols;
    const int64_t key = part.trains == Trains::kColumns ? col : part.trains == Trains::kRows ? row : i;
    at = place_in(part.index, part.count, key);
    if (at >= 0 && part.trains == Trains::kColumns) at += row * part.count;
    if (at >= 0 && part.trains == Trains::kRows) at = at * part.cols + col;
  }
  const T value = at >= 0            ? load_stored<T>(part.lora, at)
                  : part.frozen.data ? load_stored<T>(part.frozen, i)
                                     : from_float<T>(0.0f);
  store_global(part.out + i, value);
}

}  // namespace lorasp::cuda
