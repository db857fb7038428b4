// Which kernels run for which product, on which grid: the launch side of lora_linear without torch. Every sum that is
// split over blocks leaves fp32 partials in `workspace`, which the caller provides, and is finished by the reduction.
//
// Together, beside the frozen GEMMs of 348 us each way at M = 8192, K = N = 4096, R = 16 in bf16 on 132 multiprocessors
// and 4.3 TB/s [calc]: forward 17.6 + 31 us, 14 %; backward 23.4 + 16.6 + 31 us, 20 % (A frozen: 23.4 + 31, 16 %). What
// the accumulation moves is what a GEMM that takes the rank-R product into its own accumulator (plan fused) saves.
#pragma once
#include <type_traits>

#include "lora_linear_accumulate.cuh"
#include "lora_linear_outer.cuh"
#include "lora_linear_project.cuh"
#include "lora_linear_reduce.cuh"

namespace lorasp::cuda {

struct Dropout {
  KeepMask keep{0, 0, 0, 0};
  const int64_t* seed = nullptr;  // on the device
};

// A sum of `length` terms in `parts` pieces of `part` terms each, the last one shorter.
struct Split {
  int64_t parts, part;
};

// Enough blocks for two waves of two blocks per multiprocessor, while the partials, written once and read once, add at
// most a quarter to the stream_bytes that are read anyway. block: what a piece is a multiple of.
inline Split split_sum(int sm_count, int64_t blocks, int64_t length, int64_t block, int64_t stream_bytes,
                       int64_t partial_count) {
  constexpr int64_t kMostParts = 65535;  // of gridDim.y
  const int64_t steps = ceil_div(length, block), affordable = stream_bytes / (8 * 4 * partial_count);
  int64_t parts = ceil_div(int64_t{4} * sm_count, blocks);
  for (const int64_t most : {steps, affordable, kMostParts}) parts = parts < most ? parts : most;
  parts = parts > 1 ? parts : 1;
  const int64_t part = ceil_div(steps, parts) * block;
  return {ceil_div(length, part), part};
}

// f(std::integral_constant<int, kRank>) for the rank block that serves R; wider ranks take several.
template <class T, class F>
auto with_rank_block(int64_t R, F&& f) {
  if (R <= 16) return f(std::integral_constant<int, 16>());
  if (R <= 32 || sizeof(T) == 4) return f(std::integral_constant<int, 32>());
  return f(std::integral_constant<int, sizeof(T) == 4 ? 32 : 64>());
}

// g and dB come from one pass over dy where that moves fewer bytes than two: it saves M N elements and writes and reads
// the row blocks' partials of dB. Its tiles exist for one rank block of 16.
template <class T>
bool one_pass_over_dy(int64_t M, int64_t N, int64_t R) {
  constexpr int kBlockM = ProjectTiles<T, 16, true>::kBlockM;
  return R <= 16 && 2 * 4 * ceil_div(M, kBlockM) * N * R < M * N * static_cast<int64_t>(sizeof(T));
}

// Floats of workspace that project, outer and project_outer need.
template <class T, bool kOuter = false>
Split project_split(const Device& device, int64_t M, int64_t C, int64_t R) {
  return with_rank_block<T>(R, [&](auto rank) {
    constexpr int kRank = kOuter ? 16 : rank();
    const int64_t blocks = ceil_div(M, ProjectTiles<T, kRank, kOuter>::kBlockM) * ceil_div(R, kRank);
    return split_sum(device.sm_count, blocks, C, kBlockC, M * C * static_cast<int64_t>(sizeof(T)), M * R);
  });
}
template <class T>
Split outer_split(const Device& device, int64_t M, int64_t C, int64_t R) {
  return with_rank_block<T>(R, [&](auto rank) {
    const int64_t blocks = ceil_div(C, kBlockC) * ceil_div(R, rank());
    return split_sum(device.sm_count, blocks, M, OuterTiles<T, rank()>::kBlockM,
                     M * C * static_cast<int64_t>(sizeof(T)), C * R);
  });
}
template <class T>
int64_t project_workspace(const Device& device, int64_t M, int64_t C, int64_t R) {
  const int64_t parts = project_split<T>(device, M, C, R).parts;
  return parts > 1 ? parts * M * R : 0;
}
template <class T>
int64_t outer_workspace(const Device& device, int64_t M, int64_t C, int64_t R) {
  return outer_split<T>(device, M, C, R).parts * C * R;
}
template <class T>
int64_t project_outer_workspace(const Device& device, int64_t M, int64_t N, int64_t R) {
  const int64_t parts = project_split<T, true>(device, M, N, R).parts;
  return ceil_div(M, ProjectTiles<T, 16, true>::kBlockM) * N * R + (parts > 1 ? parts * M * R : 0);
}

template <class Out>
void reduce(const Device& device, const float* parts, int64_t count, int64_t size, const uint8_t* mask, Out* out) {
  launch(lora_linear_reduce_kernel<Out>, {ceil_div(size, kThreads)}, kThreads, 0, device.stream,
         ReduceArgs<Out>{parts, count, size, mask, out});
}

// h (M, R) = scale (keep o p) q; q is (R, C) where rank_first, else (C, R). M, C, R >= 1.
template <class T>
void project(const Device& device, const Matrix<const T>& p, const Matrix<const T>& q, bool rank_first, int64_t R,
             float scale, const Dropout& dropout, T* h, float* workspace) {
  const Split split = project_split<T>(device, p.rows, p.cols, R);
  const bool whole = split.parts == 1;
  with_rank_block<T>(R, [&](auto rank) {
    using Tiles = ProjectTiles<T, rank(), false>;
    const Grid grid{ceil_div(p.rows, Tiles::kBlockM), split.parts, ceil_div(R, rank())};
    launch(lora_linear_project_kernel<T, rank(), false>, grid, kThreads, Tiles::kSharedBytes, device.stream,
           ProjectArgs<T>{p,
                          q,
                          rank_first,
                          R,
                          split.part,
                          scale,
                          dropout.keep,
                          dropout.seed,
                          whole ? h : nullptr,
                          workspace,
                          {},
                          nullptr});
  });
  if (!whole) reduce(device, workspace, split.parts, p.rows * R, nullptr, h);
}

// out = (keep o p)^T h where mask, 0 elsewhere: (R, C) where rank_first, else (C, R). M, C, R >= 1.
template <class T, class Out>
void outer(const Device& device, const Matrix<const T>& p, const Matrix<const T>& h, bool rank_first,
           const Dropout& dropout, const uint8_t* mask, Out* out, float* workspace) {
  const Split split = outer_split<T>(device, p.rows, p.cols, h.cols);
  with_rank_block<T>(h.cols, [&](auto rank) {
    using Tiles = OuterTiles<T, rank()>;
    const Grid grid{ceil_div(p.cols, kBlockC), split.parts, ceil_div(h.cols, rank())};
    launch(lora_linear_outer_kernel<T, rank()>, grid, kThreads, Tiles::kSharedBytes, device.stream,
           OuterArgs<T>{p, h, rank_first, split.part, dropout.keep, dropout.seed, workspace});
  });
  reduce(device, workspace, split.parts, p.cols * h.cols, mask, out);
}

// g (M, R) = scale dy B and dB (N, R) = dy^T xa where mask, from one pass over dy. R <= 16.
template <class T, class Out>
void project_outer(const Device& device, const Matrix<const T>& dy, const Matrix<const T>& lora_B,
                   const Matrix<const T>& xa, float scale, const uint8_t* mask, T* g, Out* dlora_B, float* workspace) {
  using Tiles = ProjectTiles<T, 16, true>;
  const int64_t R = xa.cols, row_blocks = ceil_div(dy.rows, Tiles::kBlockM), outer_size = dy.cols * R;
  const Split split = project_split<T, true>(device, dy.rows, dy.cols, R);
  const bool whole = split.parts == 1;
  float* g_parts = workspace + row_blocks * outer_size;
  launch(lora_linear_project_kernel<T, 16, true>, {row_blocks, split.parts}, kThreads, Tiles::kSharedBytes,
         device.stream,
         ProjectArgs<T>{
             dy, lora_B, false, R, split.part, scale, {}, nullptr, whole ? g : nullptr, g_parts, xa, workspace});
  if (!whole) reduce(device, g_parts, split.parts, dy.rows * R, nullptr, g);
  reduce(device, workspace, row_blocks, outer_size, mask, dlora_B);
}

// out (M, C) += keep o (h q) + bias in place; bias is (C,) or nullptr, q is (R, C) where rank_first, else (C, R). M, C,
// R >= 1.
template <class T>
void accumulate(const Device& device, const Matrix<const T>& h, const Matrix<const T>& q, bool rank_first,
                const Dropout& dropout, const T* bias, const Matrix<T>& out) {
  with_rank_block<T>(h.cols, [&](auto rank) {
    using Tiles = AccumulateTiles<T, rank()>;
    const Grid grid{ceil_div(out.rows, Tiles::kBlockM) * ceil_div(out.cols, kBlockC)};
    launch(lora_linear_accumulate_kernel<T, rank()>, grid, kThreads, Tiles::kSharedBytes, device.stream,
           AccumulateArgs<T>{h, q, rank_first, dropout.keep, dropout.seed, bias, out});
  });
}

}  // namespace lorasp::cuda
