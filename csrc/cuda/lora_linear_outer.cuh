// (keep o p)^T h for p (M, C) and h (M, R): dA (R, C), rank first, from x and g; dB (C, R) from dy and xa. A group's dA
// come from one pass over x: without dropout its g lie side by side and are one h; with it each member has its own
// mask. The blocks that read one tile of x, of all members and rank blocks, lie side by side in the grid, so that the
// cache serves all but the first. LoRA-SP: p may be x[:, J], whose mask is J's columns of x's; of dB only selected rows
// may be wanted.
//
// Block ((i * rank blocks + j) * members + member, s) sums rows s * part ... of columns i * kBlockC ... for rank block
// j into fp32 partials (parts, R, C) or (parts, C, R), which lora_linear_reduce_kernel adds in order, masks and rounds.
//
// Floor: reads M C elements once (from L2 once more per further rank block or member) and M R per column block (from
// L2), writes 4 parts R C bytes. FLOPs 2 M C R. At M = 8192, C = 4096, R = 16 in bf16 on 132 multiprocessors and 4.3
// TB/s beside a 348 us frozen GEMM [calc]: 67 + 4 MB (8 parts, written and read), 16.6 us, 4.8 %; the dA of three
// members 67 + 13 MB, 18.5 us, where three launches take 50; with half of the columns half of that.
#pragma once
#include "tile.cuh"

namespace lorasp::cuda {

template <class T>
struct OuterMember {
  Matrix<const T> h;  // (M, R)
  uint32_t word;      // of its mask
  float* out_parts;   // (parts, R, C) where rank_first, else (parts, selected, R)
};

template <class T>
struct OuterArgs {
  Matrix<const T> p;       // (M, C)
  int count, rank_blocks;  // of members, and of each one's ranks
  OuterMember<T> members[kMembers];
  bool rank_first;
  int64_t part;            // rows, a multiple of the tile's
  KeepMask keep;           // threshold 0: no dropout
  const int64_t* seed;     // on the device; read where threshold > 0
  const int64_t* columns;  // (C,): the mask's column of each column of p, or nullptr: the same
  int64_t mask_columns;    // C where columns is nullptr
  const int* position;     // rank last, (C,): the row among `selected` of each column, negative: none; or nullptr
  int64_t selected;        // C where position is nullptr
};

template <class T, int kRank>
struct OuterTiles {
  static constexpr int kBlockM = sizeof(T) == 4 ? 64 : 128;
  static constexpr int kStages = kRank == 64 ? 2 : 3;
  static constexpr int kPBytes = tile_bytes<T>(kBlockM, kBlockC);
  static constexpr int kStageBytes = kPBytes + tile_bytes<T>(kBlockM, kRank);
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

template <class T, int kRank>
__global__ void __launch_bounds__(kThreads) lora_linear_outer_kernel(const OuterArgs<T> args) {
  using Tiles = OuterTiles<T, kRank>;
  using P = Product<T>;
  constexpr int kBlockM = Tiles::kBlockM, kStages = Tiles::kStages;
  constexpr int kPStride = tile_stride<T>(kBlockC), kRankStride = tile_stride<T>(kRank);
  static_assert(kBlockC == 8 * kWarps);  // warp w: columns 8 w ... 8 w + 7 of the tile
  const int warp = threadIdx.x / 32;
  const int shares = args.count * args.rank_blocks, share = static_cast<int>(blockIdx.x % shares);
  const OuterMember<T>& member = args.members[share % args.count];
  const int64_t M = args.p.rows, C = args.p.cols, R = member.h.cols;
  const int64_t col = static_cast<int64_t>(blockIdx.x / shares) * kBlockC;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * args.part;
  const int64_t rank = static_cast<int64_t>(share / args.count) * kRank;
  if (rank >= R) return;
  const int64_t last_row = first_row + args.part < M ? first_row + args.part : M;
  const int steps = static_cast<int>(ceil_div(last_row - first_row, kBlockM));
  KeepMask keep = args.keep;
  keep.member = member.word;
  if (keep.threshold > 0) keep.seed = static_cast<uint64_t>(load_global(args.seed));

  const auto p_tile = [](int step) { return shared_memory<T>(step % kStages * Tiles::kStageBytes); };
  const auto h_tile = [](int step) { return shared_memory<T>(step % kStages * Tiles::kStageBytes + Tiles::kPBytes); };
  const auto load = [&](int step) {
    if (step < steps) {
      const int64_t row = first_row + static_cast<int64_t>(step) * kBlockM;
      load_tile<kBlockM, kBlockC, T>(p_tile(step), args.p, row, col);
      load_tile<kBlockM, kRank, T>(h_tile(step), member.h, row, rank);
    }
    commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);

  float acc[kRank / 16][4] = {};
  for (int step = 0; step < steps; ++step) {
    const Shared<T> p = p_tile(step), h = h_tile(step);
    wait_for_copies<kStages - 2>();
    if (keep.threshold > 0) {
      const int64_t row = first_row + static_cast<int64_t>(step) * kBlockM;
      if (args.columns)
        drop_selected_tile<kBlockM, kBlockC, T>(p, keep, row, col, C, args.columns, args.mask_columns);
      else
        drop_tile<kBlockM, kBlockC, T>(p, keep, row, col, C);
    }
    sync_threads();
    load(step + kStages - 1);
#pragma unroll 4
    for (int m = 0; m < kBlockM; m += P::kK) {
      const auto b = P::load_b(p + (m * kPStride + warp * 8), kPStride, false);
#pragma unroll
      for (int j = 0; j < kRank / 16; ++j)
        P::accumulate(acc[j], P::load_a(h + (m * kRankStride + j * 16), kRankStride, true), b);
    }
  }

  const int64_t rows = args.rank_first ? C : args.selected;
  float* out = member.out_parts + blockIdx.y * R * rows;
#pragma unroll
  for (int j = 0; j < kRank / 16; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t r = rank + j * 16 + fragment_row(i), c = col + warp * 8 + fragment_col(i);
      if (r >= R || c >= C) continue;
      const int64_t place = args.position ? load_global(args.position + c) : c;
      if (place >= 0) store_global(out + (args.rank_first ? r * C + place : place * R + r), acc[j][i]);
    }
}

}  // namespace lorasp::cuda
