// Which kernels run for which product, on which grid: the launch side of the linear operators (lora_linear_launch.h).
//
// Together, beside the frozen GEMMs of 348 us each way at M = 8192, K = N = 4096, R = 16 in bf16 on 132 multiprocessors
// and 4.3 TB/s [calc]: forward 17.6 + 15.6 us, 9.5 %; backward 23.4 + 16.6 + 15.6 us, 16 % (A frozen: 23.4 + 15.6, 11
// %). The low-rank share of y and dx is written first and cuBLAS adds the frozen product onto it (beta = 1): the kernel
// writes M N elements, and the GEMM reads them in its epilogue, at most 235 MB, 55 us of memory time beside 348 us of
// tensor cores. The other way round, a kernel after the GEMM, reads and writes them while nothing else runs: 31 us
// instead of 15.6, forward 14 %, backward 20 %. Both round twice; here it is the low-rank share that is rounded first,
// by at most half an eps of |y| + |x W^T|, as is x W^T there. What is left is what a GEMM that takes the rank-R product
// into its own accumulator (plan fused) saves.
//
// Three members of that shape, q, k and v, beside 1044 us each way [calc]: forward one pass over x, three writes, 19.2
// + 47 us, 6.3 % (x[:, J] kept: 7.8 us more); backward three passes over dy, one over x, one write of dx, into which
// three GEMMs add, 70 + 18.5 + 15.6 us, 10 %.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "lora_linear_accumulate.cuh"
#include "lora_linear_launch.h"
#include "lora_linear_outer.cuh"
#include "lora_linear_partial.cuh"
#include "lora_linear_project.cuh"
#include "lora_linear_reduce.cuh"

namespace lorasp::cuda {

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

// The ranks of a launch: of `masks` members that have one each, or of one that stands for all.
struct Ranks {
  int64_t masks, widest, total;

  Ranks(const std::vector<int64_t>& R, bool drops)
      : masks(drops ? static_cast<int64_t>(R.size()) : 1), total(std::accumulate(R.begin(), R.end(), int64_t{0})) {
    widest = drops ? *std::max_element(R.begin(), R.end()) : total;
  }
};

// f(std::integral_constant<int, kRank>) for the rank block that serves R; wider ranks take several.
template <class T, class F>
auto with_rank_block(int64_t R, F&& f) {
  if (R <= 16) return f(std::integral_constant<int, 16>());
  if (R <= 32 || sizeof(T) == 4) return f(std::integral_constant<int, 32>());
  return f(std::integral_constant<int, sizeof(T) == 4 ? 32 : 64>());
}

// It saves M N elements and writes and reads the row blocks' partials of dB. Its tiles exist for one rank block of 16.
template <class T>
bool one_pass_over_dy(int64_t M, int64_t N, int64_t R, int64_t selected) {
  constexpr int kBlockM = ProjectTiles<T, 16, true>::kBlockM;
  return R <= 16 && 2 * 4 * ceil_div(M, kBlockM) * selected * R < M * N * static_cast<int64_t>(sizeof(T));
}

template <class T, bool kOuter = false>
Split project_split(const Device& device, int64_t M, int64_t C, const Ranks& ranks) {
  return with_rank_block<T>(ranks.widest, [&](auto rank) {
    constexpr int kRank = kOuter ? 16 : rank();
    const int64_t blocks =
        ceil_div(M, ProjectTiles<T, kRank, kOuter>::kBlockM) * ranks.masks * ceil_div(ranks.widest, kRank);
    return split_sum(device.sm_count, blocks, C, kBlockC, M * C * static_cast<int64_t>(sizeof(T)), M * ranks.total);
  });
}
template <class T>
Split outer_split(const Device& device, int64_t M, int64_t C, const Ranks& ranks) {
  return with_rank_block<T>(ranks.widest, [&](auto rank) {
    const int64_t blocks = ceil_div(C, kBlockC) * ranks.masks * ceil_div(ranks.widest, rank());
    return split_sum(device.sm_count, blocks, M, OuterTiles<T, rank()>::kBlockM,
                     M * C * static_cast<int64_t>(sizeof(T)), C * ranks.total);
  });
}
// Whether a projection leaves partials: its sum is split, or several members' columns lie side by side.
inline bool leaves_partials(const Split& split, const Ranks& ranks, size_t count) {
  return split.parts > 1 || ranks.masks < static_cast<int64_t>(count);
}
template <class T>
int64_t project_workspace(const Device& device, int64_t M, int64_t C, const std::vector<int64_t>& R, bool drops) {
  const Ranks ranks(R, drops);
  const Split split = project_split<T>(device, M, C, ranks);
  return leaves_partials(split, ranks, R.size()) ? split.parts * M * ranks.total : 0;
}
template <class T>
int64_t outer_workspace(const Device& device, int64_t M, int64_t C, const std::vector<int64_t>& R, bool drops) {
  const Ranks ranks(R, drops);
  return outer_split<T>(device, M, C, ranks).parts * C * ranks.total;
}
template <class T>
int64_t project_outer_workspace(const Device& device, int64_t M, int64_t N, int64_t R) {
  const int64_t parts = project_split<T, true>(device, M, N, Ranks({R}, false)).parts;
  return ceil_div(M, ProjectTiles<T, 16, true>::kBlockM) * N * R + (parts > 1 ? parts * M * R : 0);
}

template <class T>
void reduce(const Device& device, int64_t count, const std::vector<ReduceSlice<T>>& slices) {
  for (size_t first = 0; first < slices.size(); first += kMembers) {
    ReduceArgs<T> args{count, {}};
    int64_t blocks = 0, n = 0;
    for (size_t i = first; i < slices.size() && n < kMembers; ++i, ++n) {
      args.slices[n] = slices[i];
      blocks = std::max(blocks, ceil_div(slices[i].size, kThreads));
    }
    launch(lora_linear_reduce_kernel<T>, {blocks, n}, kThreads, 0, device.stream, args);
  }
}

// h (M, R) from R columns of parts whose rows have `total`.
template <class T>
ReduceSlice<T> projected(const Projection<T>& projection, const float* parts, int64_t M, int64_t total) {
  const bool whole = projection.R == total && projection.h_stride == total;
  ReduceSlice<T> slice{};
  slice.parts = parts, slice.part_stride = M * total, slice.rows = M, slice.row_stride = total;
  slice.size = M * projection.R, slice.cols = whole ? slice.size : projection.R;
  slice.scale = projection.scale, slice.out = projection.h, slice.out_stride = projection.h_stride;
  return slice;
}

// A gradient from rows * cols sums that lie together in every part; cols: R of a dB.
template <class T>
ReduceSlice<T> summed(const Gradient& gradient, const float* parts, int64_t part_stride, int64_t rows, int64_t cols,
                      bool rank_first) {
  ReduceSlice<T> slice{};
  slice.parts = parts, slice.part_stride = part_stride, slice.scale = 1.0f, slice.mask = gradient.mask;
  slice.out = static_cast<T*>(gradient.out);
  slice.size = slice.cols = rows * cols, slice.rows = rows;
  if (gradient.entries) {
    slice.rows = rows * cols;
    slice.index = gradient.entries, slice.size = gradient.entry_count, slice.cols = slice.row_stride = 1;
  } else if (gradient.position) {
    (rank_first ? slice.col_map : slice.row_map) = gradient.position;
    slice.row_stride = cols, slice.cols = rank_first ? gradient.extent : cols;
    slice.size = (rank_first ? rows : gradient.extent) * slice.cols;
  }
  slice.out_stride = slice.cols;
  return slice;
}

// The gradients that are asked for, in either dtype.
template <class T>
class Gradients {
 public:
  void add(const Gradient& gradient, const float* parts, int64_t part_stride, int64_t rows, int64_t cols,
           bool rank_first) {
    if (!gradient.out) return;
    if (gradient.fp32)
      masters_.push_back(summed<float>(gradient, parts, part_stride, rows, cols, rank_first));
    else
      rounded_.push_back(summed<T>(gradient, parts, part_stride, rows, cols, rank_first));
  }
  void reduce(const Device& device, int64_t count) const {
    cuda::reduce(device, count, masters_);
    cuda::reduce(device, count, rounded_);
  }

 private:
  std::vector<ReduceSlice<float>> masters_;
  std::vector<ReduceSlice<T>> rounded_;
};

// Of members that share one mask: the one matrix in which their h lie side by side, or their q one under another.
template <class T>
Matrix<const T> joined_h(Matrix<const T> first, const Ranks& ranks, size_t count) {
  if (ranks.masks < static_cast<int64_t>(count)) first.cols = ranks.total;
  return first;
}
template <class T>
Matrix<const T> joined_q(Matrix<const T> first, const Ranks& ranks, size_t count) {
  if (ranks.masks < static_cast<int64_t>(count)) first.rows = ranks.total;
  return first;
}

// f(first, n) for each launch of at most kMembers of `count`.
template <class F>
void by_members(int64_t count, F&& f) {
  for (int64_t first = 0; first < count; first += kMembers) f(first, std::min<int64_t>(kMembers, count - first));
}

template <class T>
void project(const Device& device, const Matrix<const T>& p, const std::vector<Projection<T>>& projections,
             bool rank_first, const Dropout& dropout, const Selection& selection, T* columns, float* workspace) {
  std::vector<int64_t> R;
  for (const Projection<T>& m : projections) R.push_back(m.R);
  const bool drops = dropout.keep.threshold > 0;
  const Ranks ranks(R, drops);
  const Split split = project_split<T>(device, p.rows, p.cols, ranks);
  const bool partials = leaves_partials(split, ranks, R.size());
  std::vector<ProjectMember<T>> members;
  std::vector<ReduceSlice<T>> slices;
  int64_t before = 0;
  for (const Projection<T>& m : projections) {
    const bool joins = !drops && before > 0;
    const int64_t width = drops ? m.R : ranks.total;
    float* parts = partials ? workspace + (drops ? split.parts * p.rows * before : before) : nullptr;
    if (!joins)
      members.push_back({rank_first ? joined_q(m.q, ranks, R.size()) : m.q, width, m.scale, m.word,
                         partials ? nullptr : m.h, m.h_stride, parts});
    if (partials) slices.push_back(projected(m, parts, p.rows, width));
    before += m.R;
  }
  with_rank_block<T>(ranks.widest, [&](auto rank) {
    using Tiles = ProjectTiles<T, rank(), false>;
    by_members(ranks.masks, [&](int64_t first, int64_t n) {
      ProjectArgs<T> args{};
      args.p = p, args.count = static_cast<int>(n), args.rank_first = rank_first, args.part = split.part;
      std::copy_n(members.begin() + first, n, args.members);
      args.keep = dropout.keep, args.seed = dropout.seed;
      args.position = selection.position, args.selected = selection.position ? selection.count : p.cols;
      args.columns = first == 0 ? columns : nullptr;
      args.rank_blocks = static_cast<int>(ceil_div(ranks.widest, rank()));
      const Grid grid{ceil_div(p.rows, Tiles::kBlockM) * n * args.rank_blocks, split.parts};
      launch(lora_linear_project_kernel<T, rank(), false>, grid, kThreads, Tiles::kSharedBytes, device.stream, args);
    });
  });
  reduce(device, split.parts, slices);
}

template <class T>
void outer(const Device& device, const Matrix<const T>& p, const std::vector<Contraction<T>>& contractions,
           bool rank_first, const Dropout& dropout, const int64_t* columns, int64_t mask_columns,
           const Selection& selection, float* workspace) {
  std::vector<int64_t> R;
  for (const Contraction<T>& m : contractions) R.push_back(m.h.cols);
  const bool drops = dropout.keep.threshold > 0;
  const Ranks ranks(R, drops);
  const Split split = outer_split<T>(device, p.rows, p.cols, ranks);
  const int64_t selected = selection.position ? selection.count : p.cols;
  std::vector<OuterMember<T>> members;
  Gradients<T> gradients;
  int64_t before = 0;
  for (const Contraction<T>& m : contractions) {
    const int64_t width = drops ? m.h.cols : ranks.total, C = rank_first ? p.cols : selected;
    float* parts = workspace + (drops ? split.parts : 1) * before * C;
    if (drops || before == 0) members.push_back({joined_h(m.h, ranks, R.size()), m.word, parts});
    gradients.add(m.gradient, parts, width * C, rank_first ? m.h.cols : C, rank_first ? C : m.h.cols, rank_first);
    before += m.h.cols;
  }
  with_rank_block<T>(ranks.widest, [&](auto rank) {
    using Tiles = OuterTiles<T, rank()>;
    by_members(ranks.masks, [&](int64_t first, int64_t n) {
      OuterArgs<T> args{};
      args.p = p, args.count = static_cast<int>(n), args.rank_first = rank_first, args.part = split.part;
      std::copy_n(members.begin() + first, n, args.members);
      args.keep = dropout.keep, args.seed = dropout.seed;
      args.columns = columns, args.mask_columns = columns ? mask_columns : p.cols;
      args.position = selection.position, args.selected = selected;
      args.rank_blocks = static_cast<int>(ceil_div(ranks.widest, rank()));
      const Grid grid{ceil_div(p.cols, kBlockC) * n * args.rank_blocks, split.parts};
      launch(lora_linear_outer_kernel<T, rank()>, grid, kThreads, Tiles::kSharedBytes, device.stream, args);
    });
  });
  gradients.reduce(device, split.parts);
}

template <class T>
void project_outer(const Device& device, const Matrix<const T>& dy, const Projection<T>& g, const Matrix<const T>& xa,
                   const Selection& selection, const Gradient& dlora_B, float* workspace) {
  using Tiles = ProjectTiles<T, 16, true>;
  const int64_t M = dy.rows, R = xa.cols, row_blocks = ceil_div(M, Tiles::kBlockM);
  const int64_t selected = selection.position ? selection.count : dy.cols, outer_size = selected * R;
  const Split split = project_split<T, true>(device, M, dy.cols, Ranks({R}, false));
  const bool whole = split.parts == 1;
  float* g_parts = workspace + row_blocks * outer_size;
  ProjectArgs<T> args{};
  args.p = dy, args.count = args.rank_blocks = 1, args.part = split.part;
  args.members[0] = {g.q, R, g.scale, 0, whole ? g.h : nullptr, g.h_stride, g_parts};
  args.position = selection.position, args.selected = selected;
  args.xa = xa, args.outer_parts = workspace;
  launch(lora_linear_project_kernel<T, 16, true>, {row_blocks, split.parts}, kThreads, Tiles::kSharedBytes,
         device.stream, args);
  if (!whole) reduce<T>(device, split.parts, {projected(g, g_parts, M, R)});
  Gradients<T> gradients;
  gradients.add(dlora_B, workspace, outer_size, selected, R, false);
  gradients.reduce(device, row_blocks);
}

template <class T>
void accumulate(const Device& device, const std::vector<Expansion<T>>& expansions, bool rank_first,
                const Dropout& dropout, const T* bias, bool add, const Matrix<T>& out) {
  std::vector<int64_t> R;
  for (const Expansion<T>& m : expansions) R.push_back(m.h.cols);
  const Ranks ranks(R, dropout.keep.threshold > 0);
  with_rank_block<T>(ranks.widest, [&](auto rank) {
    using Tiles = AccumulateTiles<T, rank()>;
    by_members(ranks.masks, [&](int64_t first, int64_t n) {
      AccumulateArgs<T> args{};
      args.count = static_cast<int>(n), args.rank_first = rank_first;
      for (int64_t i = 0; i < n; ++i) {
        const Expansion<T>& m = expansions[first + i];
        args.members[i] = {joined_h(m.h, ranks, R.size()), rank_first ? joined_q(m.q, ranks, R.size()) : m.q, m.word};
      }
      args.keep = dropout.keep, args.seed = dropout.seed;
      args.bias = first == 0 ? bias : nullptr, args.add = add || first > 0, args.out = out;
      const Grid grid{ceil_div(out.rows, Tiles::kBlockM) * ceil_div(out.cols, kBlockC)};
      const int shared_bytes = n > 1 ? Tiles::kMembersBytes : Tiles::kSharedBytes;
      launch(lora_linear_accumulate_kernel<T, rank()>, grid, kThreads, shared_bytes, device.stream, args);
    });
  });
}

template <class T>
void make_factors(const Device& device, const std::vector<FactorPart<T>>& parts) {
  by_members(static_cast<int64_t>(parts.size()), [&](int64_t first, int64_t n) {
    FactorArgs<T> args{};
    int64_t blocks = 0;
    for (int64_t i = 0; i < n; ++i) {
      args.parts[i] = parts[first + i];
      blocks = std::max(blocks, ceil_div(args.parts[i].rows * args.parts[i].cols, kThreads));
    }
    launch(lora_linear_factor_kernel<T>, {blocks, n}, kThreads, 0, device.stream, args);
  });
}

}  // namespace lorasp::cuda
