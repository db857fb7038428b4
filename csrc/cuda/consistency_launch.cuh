// Which kernels of consistency run on which grid: the launch side without torch.
#pragma once
#include "consistency.cuh"

namespace lorasp::cuda {

// How the rows are shared out: a warp each while a row is short; else a block, or several, each with a part of the row,
// until there are two waves of two blocks per multiprocessor or a thread has but one vector left.
struct ConsistencySplit {
  bool warp_per_row;
  int64_t parts, part_vectors;
};

template <class T>
ConsistencySplit consistency_split(const Device& device, int64_t rows, int64_t V) {
  constexpr int64_t kShortRow = 2048;
  const int64_t vectors = vectors_of_row<T>(V);
  if (V <= kShortRow) return {true, 1, vectors};
  int64_t parts = ceil_div(int64_t{4} * device.sm_count, rows);
  for (const int64_t most : {ceil_div(vectors, kThreads), int64_t{kThreads}}) parts = parts < most ? parts : most;
  const int64_t part_vectors = ceil_div(vectors, parts);
  return {false, ceil_div(vectors, part_vectors), part_vectors};
}

// Floats of workspace.
template <class T>
int64_t consistency_workspace(const Device& device, int64_t rows, int64_t V) {
  const int64_t parts = consistency_split<T>(device, rows, V).parts;
  return parts > 1 ? rows * parts * kNumbers : 0;
}

// B T in [1, 2^31), V >= 1.
template <class T>
void consistency_forward(const Device& device, int64_t B, int64_t T_, int64_t V, const LogitRows<const T>& a,
                         const LogitRows<const T>& b, const ConsistencyResult& result, float* workspace) {
  const int64_t rows = B * T_;
  const ConsistencySplit split = consistency_split<T>(device, rows, V);
  const int64_t blocks = split.warp_per_row ? ceil_div(rows, kWarps) : rows * split.parts;
  launch(consistency_forward_kernel<T>, {blocks}, kThreads, kMergeSharedBytes, device.stream,
         ConsistencyForwardArgs<T>{a, b, Divider(T_), rows, V, split.warp_per_row, split.parts, split.part_vectors,
                                   workspace, result});
  if (split.parts > 1)
    launch(consistency_merge_kernel, {rows}, kThreads, kMergeSharedBytes, device.stream,
           ConsistencyMergeArgs{split.parts, workspace, result});
}

template <class T>
void consistency_backward(const Device& device, int64_t B, int64_t T_, int64_t V, ConsistencyBackwardArgs<T> args) {
  constexpr int64_t kVectorsPerThread = 4, kLongRow = 128;  // vectors: four share what a thread does once per row
  const int64_t vectors = vectors_of_row<T>(V);
  const int64_t row_threads = vectors < kLongRow ? vectors : ceil_div(vectors, kVectorsPerThread);
  args.T_ = Divider(T_), args.row_threads = Divider(row_threads), args.rows = B * T_, args.V = V;
  launch(consistency_backward_kernel<T>, {ceil_div(args.rows * row_threads, kThreads)}, kThreads, 0, device.stream,
         args);
}

}  // namespace lorasp::cuda
