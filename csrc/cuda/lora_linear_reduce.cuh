// out = scale * sum over s of parts[s], rounded once: the end of every split sum, in the order of s, so that the same
// bits come out every run. Each part is a matrix; a slice takes all of it, some of its columns (one member's share of
// products that ran side by side), rows or entries by an index (the part of a factor that trains), or spreads it over a
// larger result that is zero elsewhere.
//
// One thread per element of a slice; blockIdx.y is the slice.
//
// Floor: reads 4 count bytes per element that is summed, writes the elements.
#pragma once
#include "tile.cuh"

namespace lorasp::cuda {

// Element (i, j) of out, i < size / cols, j < cols, takes element (row, j') at parts + row * row_stride + j' of every
// part: row = index[i] or row_map[i], j' = col_map[j], where given. Outside of [0, rows), or negative, or where mask[i,
// j]
// == 0: zero.
template <class T>
struct ReduceSlice {
  const float* parts;
  int64_t part_stride;
  int64_t size, cols;
  int64_t rows, row_stride;
  float scale;
  const uint8_t* mask;
  const int64_t* index;
  const int *row_map, *col_map;
  T* out;
  int64_t out_stride;
};

template <class T>
struct ReduceArgs {
  int64_t count;  // parts
  ReduceSlice<T> slices[kMembers];
};

template <class T>
__global__ void __launch_bounds__(kThreads) lora_linear_reduce_kernel(const ReduceArgs<T> args) {
  const ReduceSlice<T>& slice = args.slices[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= slice.size) return;
  int64_t row = slice.cols < slice.size ? i / slice.cols : 0, col = i - row * slice.cols;
  T* out = slice.out + (row * slice.out_stride + col);
  if (slice.index) row = load_global(slice.index + row);
  if (slice.row_map) row = load_global(slice.row_map + row);
  if (slice.col_map) col = load_global(slice.col_map + col);
  float sum = 0.0f;
  if (row >= 0 && row < slice.rows && col >= 0 && (!slice.mask || load_global(slice.mask + i))) {
    const float* part = slice.parts + (row * slice.row_stride + col);
#pragma unroll 8
    for (int64_t s = 0; s < args.count; ++s) sum += load_global(part + s * slice.part_stride);
  }
  store_global(out, from_float<T>(sum * slice.scale));
}

}  // namespace lorasp::cuda
