// h (M, R) = scale (keep o p) q: xa of the forward (p = x, q = A^T, which lies rank first) and g of the backward
// (p = dy, q = B, which lies rank last). With kOuter also the row-block partials of dB (C, R) = p^T xa from the same
// pass. A group's xa come from one pass over x: without dropout its A lie one under another and are one q; with it each
// member has its own mask. The blocks that read one tile of x, of all members and rank blocks, lie side by side in the
// grid, so that the cache serves all but the first. The same pass copies selected columns of x (LoRA-SP keeps x[:, J]).
//
// Block ((i * rank blocks + j) * members + member, s) sums columns s * part ... of row block i for rank block j. Where
// one part covers C, h is the result, else h_parts holds fp32 partials (parts, M, R), which lora_linear_reduce_kernel
// adds in order and scales. A step's tiles arrive by cp.async kStages - 1 steps ahead.
//
// Floor: reads M C elements once (from L2 once more per further rank block or member) and C R per row block (from L2),
// writes M R, or 4 parts M R bytes, and M |J|; with kOuter reads M R more and writes 4 ceil(M / kBlockM) C R bytes
// (only selected columns' rows of them). FLOPs 2 M C R, with kOuter 4 M C R. At M = 8192, C = 4096, R = 16 in bf16 on
// 132 multiprocessors and 4.3 TB/s beside a 348 us frozen GEMM [calc], partials written and read: xa 67 + 8 MB (8
// parts), 17.6 us, 5.1 %; the xa of three members 67 + 16 MB (5 parts), 19.2 us, where three launches take 53; x[:, J]
// of half of the columns beside them 34 MB more, 7.8 us, where a gather of its own takes 15.6 (single columns: 23.4); g
// and dB in one pass 67 + 17 + 17 MB (16 parts, 32 row blocks), 23.4 us, 6.7 %, where two kernels take 34 us, 9.8 %;
// half of dB's rows 8.4 MB less, 21.5 us.
#pragma once
#include "tile.cuh"

namespace lorasp::cuda {

template <class T>
struct ProjectMember {
  Matrix<const T> q;  // (R, C) where rank_first, else (C, R)
  int64_t R;
  float scale;
  uint32_t word;  // of its mask
  T* h;           // (M, R), or nullptr where h_parts is meant
  int64_t h_stride;
  float* h_parts;  // (parts, M, R), not scaled
};

template <class T>
struct ProjectArgs {
  Matrix<const T> p;       // (M, C)
  int count, rank_blocks;  // of members, and of each one's ranks; 1 with kOuter
  ProjectMember<T> members[kMembers];
  bool rank_first;
  int64_t part;         // columns, a multiple of kBlockC
  KeepMask keep;        // threshold 0: no dropout
  const int64_t* seed;  // on the device; read where threshold > 0
  const int* position;  // (C,): the place of each selected column among `selected`, negative elsewhere; or nullptr
  int64_t selected;     // C where position is nullptr
  T* columns;           // not kOuter: (M, selected) = the selected columns of p, or nullptr
  Matrix<const T> xa;   // kOuter: (M, R)
  float* outer_parts;   // kOuter: (row blocks, selected, R)
};

template <class T, int kRank, bool kOuter>
struct ProjectTiles {
  // Twice the rows halve the partials of dB.
  static constexpr int kRowTiles = kOuter && sizeof(T) == 2 ? 2 : 1;
  static constexpr int kBlockM = 16 * kWarps * kRowTiles;
  static constexpr int kStages = kOuter || sizeof(T) == 4 ? 2 : 3;
  static constexpr int kPBytes = tile_bytes<T>(kBlockM, kBlockC);
  static constexpr int kRankFirstBytes = tile_bytes<T>(kRank, kBlockC), kRankLastBytes = tile_bytes<T>(kBlockC, kRank);
  static constexpr int kStageBytes = kPBytes + (kRankFirstBytes > kRankLastBytes ? kRankFirstBytes : kRankLastBytes);
  static constexpr int kXaBytes = kOuter ? tile_bytes<T>(kBlockM, kRank) : 0;
  static constexpr int kSharedBytes = kStages * kStageBytes + kXaBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

// The selected columns of a tile of p to their places in out (p.rows, count): this thread's units of a tile that
// load_tile filled and whose copies it waited for.
template <int kRows, class T>
__device__ void store_columns(Shared<T> tile, const Matrix<const T>& p, int64_t row, int64_t col, const int* position,
                              int64_t count, T* out) {
  constexpr int kUnits = kBlockC / kUnit, kStride = tile_stride<T>(kBlockC), kCopy = 16 / static_cast<int>(sizeof(T));
  static_assert(kThreads % kUnits == 0);  // the units of a thread lie one under another
  const int64_t c = col + static_cast<int>(threadIdx.x) % kUnits * kUnit;
  const int valid = valid_columns(c, p.cols);
  int place[kUnit];
#pragma unroll
  for (int i = 0; i < kUnit; ++i) place[i] = i < valid ? load_global(position + (c + i)) : -1;
  // Places ascend: eight of them in a row, on the 16-byte grid of out.
  const bool run =
      place[0] >= 0 && place[kUnit - 1] == place[0] + kUnit - 1 && place[0] % kCopy == 0 && count % kCopy == 0;
  for (int u = threadIdx.x; u < kRows * kUnits && row + u / kUnits < p.rows; u += kThreads) {
    const Shared<T> unit = tile + (u / kUnits * kStride + u % kUnits * kUnit);
    T* to = out + (row + u / kUnits) * count;
    if (run) {
#pragma unroll
      for (int i = 0; i < kUnit; i += kCopy) store_global16(to + (place[0] + i), load_shared16<T>(unit + i));
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i)
        if (place[i] >= 0) store_global(to + place[i], static_cast<T>(unit[i]));
    }
  }
}

template <class T, int kRank, bool kOuter>
__global__ void __launch_bounds__(kThreads, kOuter ? 2 : 3) lora_linear_project_kernel(const ProjectArgs<T> args) {
  using Tiles = ProjectTiles<T, kRank, kOuter>;
  using P = Product<T>;
  constexpr int kBlockM = Tiles::kBlockM, kRowTiles = Tiles::kRowTiles, kStages = Tiles::kStages;
  constexpr int kPStride = tile_stride<T>(kBlockC), kRankStride = tile_stride<T>(kRank);
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 4 ? 4 : kBlockC / P::kK;
  const int warp = threadIdx.x / 32;
  const int shares = kOuter ? 1 : args.count * args.rank_blocks, share = static_cast<int>(blockIdx.x % shares);
  const int number = kOuter ? 0 : share % args.count;
  const int64_t row_block = blockIdx.x / shares;
  const ProjectMember<T>& member = args.members[number];
  const int64_t M = args.p.rows, C = args.p.cols, R = member.R;
  const int64_t row = row_block * kBlockM;
  const int64_t first_col = static_cast<int64_t>(blockIdx.y) * args.part;
  const int64_t rank = kOuter ? 0 : static_cast<int64_t>(share / args.count) * kRank;
  const bool gathers = !kOuter && args.columns && number == 0 && rank == 0;
  if (rank >= R) return;
  const int64_t last_col = first_col + args.part < C ? first_col + args.part : C;
  const int steps = static_cast<int>(ceil_div(last_col - first_col, kBlockC));
  KeepMask keep = args.keep;
  keep.member = member.word;
  if (keep.threshold > 0) keep.seed = static_cast<uint64_t>(load_global(args.seed));

  const auto p_tile = [](int step) { return shared_memory<T>(step % kStages * Tiles::kStageBytes); };
  const auto q_tile = [](int step) { return shared_memory<T>(step % kStages * Tiles::kStageBytes + Tiles::kPBytes); };
  const Shared<T> xa_tile = shared_memory<T>(kStages * Tiles::kStageBytes);
  const auto load = [&](int step) {
    if (step < steps) {
      const int64_t col = first_col + static_cast<int64_t>(step) * kBlockC;
      load_tile<kBlockM, kBlockC, T>(p_tile(step), args.p, row, col);
      if (args.rank_first)
        load_tile<kRank, kBlockC, T>(q_tile(step), member.q, rank, col);
      else
        load_tile<kBlockC, kRank, T>(q_tile(step), member.q, col, rank);
    }
    commit_copies();
  };
  if constexpr (kOuter) load_tile<kBlockM, kRank, T>(xa_tile, args.xa, row, rank);
  for (int step = 0; step < kStages - 1; ++step) load(step);

  float acc[kRowTiles][kRank / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    const int64_t col = first_col + static_cast<int64_t>(step) * kBlockC;
    const Shared<T> p = p_tile(step), q = q_tile(step);
    wait_for_copies<kStages - 2>();
    if constexpr (!kOuter)
      if (gathers) store_columns<kBlockM, T>(p, args.p, row, col, args.position, args.selected, args.columns);
    if (keep.threshold > 0) drop_tile<kBlockM, kBlockC, T>(p, keep, row, col, C);
    sync_threads();
    load(step + kStages - 1);
#pragma unroll kUnroll
    for (int k = 0; k < kBlockC; k += P::kK) {
      typename P::A a[kRowTiles];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
        a[i] = P::load_a(p + ((warp * kRowTiles + i) * 16 * kPStride + k), kPStride, false);
#pragma unroll
      for (int j = 0; j < kRank / 8; ++j) {
        const auto b = args.rank_first ? P::load_b(q + (j * 8 * kPStride + k), kPStride, true)
                                       : P::load_b(q + (k * kRankStride + j * 8), kRankStride, false);
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) P::accumulate(acc[i][j], a[i], b);
      }
    }
    if constexpr (kOuter) {  // warp w: columns 8 w ... 8 w + 7 of xa^T p over all rows
      static_assert(kBlockC == 8 * kWarps);
#pragma unroll
      for (int j = 0; j < kRank / 16; ++j) {
        float part[4] = {};
#pragma unroll 4
        for (int m = 0; m < kBlockM; m += P::kK) {
          const auto a = P::load_a(xa_tile + (m * kRankStride + j * 16), kRankStride, true);
          P::accumulate(part, a, P::load_b(p + (m * kPStride + warp * 8), kPStride, false));
        }
        for (int i = 0; i < 4; ++i) {
          const int64_t r = rank + j * 16 + fragment_row(i), c = col + warp * 8 + fragment_col(i);
          if (r >= R || c >= last_col) continue;
          const int64_t place = args.position ? load_global(args.position + c) : c;
          if (place >= 0) store_global(args.outer_parts + ((row_block * args.selected + place) * R + r), part[i]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < kRank / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t m = row + (warp * kRowTiles + i) * 16 + fragment_row(e), r = rank + j * 8 + fragment_col(e);
        if (m >= M || r >= R) continue;
        if (member.h)
          store_global(member.h + (m * member.h_stride + r), from_float<T>(acc[i][j][e] * member.scale));
        else
          store_global(member.h_parts + ((blockIdx.y * M + m) * R + r), acc[i][j][e]);
      }
}

}  // namespace lorasp::cuda
