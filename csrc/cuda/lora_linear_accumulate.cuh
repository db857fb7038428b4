// out (M, C) = sum of keep o (h q) + bias, or that added to out in place, for h (M, R): the low-rank share of y, xa B^T
// + bias (q = B^T, B lies rank last), and of dx, D o (g A) (q = A, which lies rank first; D's factor is in g). Written
// before the frozen product, which cuBLAS then adds; added in place where somebody else made the product (lora_update).
// A group's share of dx: without dropout its g lie side by side and its A one under another, one h and one q; with it
// each member's product is masked on its own. The sum of a launch is rounded once: with more than kMembers masks the
// next launch adds to it in place and rounds again.
//
// One block per tile of (kBlockM, kBlockC). The product goes through shared memory, so that out is written, and read,
// 16 bytes at a time.
//
// Floor: writes M C elements, in place reads them too, reads M R and R C per tile (from L2). FLOPs 2 M C R. At M =
// 8192, C = 4096, R = 16 in bf16 on 4.3 TB/s beside a 348 us frozen GEMM [calc]: 67 MB, 15.6 us, 4.5 %; in place 134
// MB, 31 us, 9 %. Three members with a mask each: 67 MB, where three launches, two of them in place, move 335.
#pragma once
#include "vector.cuh"

namespace lorasp::cuda {

template <class T>
struct AccumulateMember {
  Matrix<const T> h;  // (M, R)
  Matrix<const T> q;  // (R, C) where rank_first, else (C, R)
  uint32_t word;      // of its mask
};

template <class T>
struct AccumulateArgs {
  int count;  // members
  AccumulateMember<T> members[kMembers];
  bool rank_first;
  KeepMask keep;        // threshold 0: no dropout
  const int64_t* seed;  // on the device; read where threshold > 0
  const T* bias;        // (C,) or nullptr
  bool add;             // to what out holds
  Matrix<T> out;        // (M, C)
};

template <class T, int kRank>
struct AccumulateTiles {
  static constexpr int kBlockM = 16 * kWarps;
  static constexpr int kHBytes = tile_bytes<T>(kBlockM, kRank);
  static constexpr int kRankFirstBytes = tile_bytes<T>(kRank, kBlockC), kRankLastBytes = tile_bytes<T>(kBlockC, kRank);
  static constexpr int kFactorBytes = kHBytes + (kRankFirstBytes > kRankLastBytes ? kRankFirstBytes : kRankLastBytes);
  static constexpr int kSumBytes = tile_bytes<float>(kBlockM, kBlockC);  // over the factors, when they are used up
  static constexpr int kSharedBytes = kFactorBytes > kSumBytes ? kFactorBytes : kSumBytes;
  static_assert(kSharedBytes <= kSharedLimit);
  static constexpr int kMembersBytes = kSharedBytes + kSumBytes;  // the sum of the members before, behind the rest
  static_assert(kMembersBytes <= kSharedLimit);
};

template <class T, int kRank>
__global__ void __launch_bounds__(kThreads) lora_linear_accumulate_kernel(const AccumulateArgs<T> args) {
  using Tiles = AccumulateTiles<T, kRank>;
  using P = Product<T>;
  constexpr int kBlockM = Tiles::kBlockM;
  constexpr int kPStride = tile_stride<T>(kBlockC), kRankStride = tile_stride<T>(kRank);
  constexpr int kSumStride = tile_stride<float>(kBlockC);
  constexpr int kUnits = kBlockC / kUnit, kUnitsPerThread = kBlockM * kUnits / kThreads;
  static_assert(kUnitsPerThread * kUnit <= 32);  // keep bits of a thread's units in one word
  constexpr int kCopy = 16 / static_cast<int>(sizeof(T)), kCopies = kUnit / kCopy;
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 4 ? 1 : kRank / P::kK;  // unrolled further, fp32 spills
  const int warp = threadIdx.x / 32;
  const int64_t M = args.out.rows, C = args.out.cols;
  const int64_t col_blocks = ceil_div(C, kBlockC);
  const int64_t row = blockIdx.x / col_blocks * kBlockM, col = blockIdx.x % col_blocks * kBlockC;
  KeepMask keep = args.keep;
  if (keep.threshold > 0) keep.seed = static_cast<uint64_t>(load_global(args.seed));

  const auto unit_row = [&](int n) { return static_cast<int>(threadIdx.x + n * kThreads) / kUnits; };
  const auto unit_col = [&](int n) { return static_cast<int>(threadIdx.x + n * kThreads) % kUnits * kUnit; };
  const auto unit_at = [&](int n) {
    return args.out.data + ((row + unit_row(n)) * args.out.stride + col + unit_col(n));
  };
  const auto whole = [&](int n) { return args.out.aligned && row + unit_row(n) < M && col + unit_col(n) + kUnit <= C; };
  const Shared<T> h = shared_memory<T>(0), q = shared_memory<T>(Tiles::kHBytes);
  const Shared<float> sum = shared_memory<float>(0), before = shared_memory<float>(Tiles::kSharedBytes);
  uint32_t kept = 0xFFFFFFFFu;
#pragma unroll 1
  for (int number = 0; number < args.count; ++number) {
    const AccumulateMember<T>& member = args.members[number];
    float acc[kBlockC / 8][4] = {};
#pragma unroll 1
    for (int64_t rank = 0; rank < member.h.cols; rank += kRank) {
      if (number > 0 || rank > 0) sync_threads();
      load_tile<kBlockM, kRank, T>(h, member.h, row, rank);
      if (args.rank_first)
        load_tile<kRank, kBlockC, T>(q, member.q, rank, col);
      else
        load_tile<kBlockC, kRank, T>(q, member.q, col, rank);
      commit_copies();
      wait_for_copies<0>();
      sync_threads();
#pragma unroll kUnroll
      for (int k = 0; k < kRank; k += P::kK) {
        const auto a = P::load_a(h + (warp * 16 * kRankStride + k), kRankStride, false);
#pragma unroll
        for (int j = 0; j < kBlockC / 8; ++j)
          P::accumulate(acc[j], a,
                        args.rank_first ? P::load_b(q + (k * kPStride + j * 8), kPStride, false)
                                        : P::load_b(q + (j * 8 * kRankStride + k), kRankStride, true));
      }
    }
    if (keep.threshold > 0) {
      keep.member = member.word;
      kept = 0;
#pragma unroll 1
      for (int n = 0; n < kUnitsPerThread; ++n) {
        const int64_t start = (row + unit_row(n)) * C + col + unit_col(n);
        kept |= (keep_bits(keep, static_cast<uint64_t>(start)) & 0xFFu) << (kUnit * n);
      }
    }
    sync_threads();
#pragma unroll
    for (int j = 0; j < kBlockC / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[(warp * 16 + fragment_row(i)) * kSumStride + j * 8 + fragment_col(i)] = acc[j][i];
    sync_threads();
    if (number == args.count - 1) break;
#pragma unroll 1
    for (int n = 0; n < kUnitsPerThread; ++n) {
      const int at = unit_row(n) * kSumStride + unit_col(n);
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        const float product = kept >> (kUnit * n + e) & 1 ? float(sum[at + e]) : 0.0f;
        before[at + e] = number > 0 ? float(before[at + e]) + product : product;
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kUnitsPerThread; ++n) {
    const int64_t m = row + unit_row(n), c = col + unit_col(n);
    const int valid = m < M ? valid_columns(c, C) : 0;
    if (valid == 0) continue;
    const int at = unit_row(n) * kSumStride + unit_col(n);
    const auto low_rank = [&](int e) {
      float value = args.bias ? to_float(load_global(args.bias + (c + e))) : 0.0f;
      if (args.count > 1) value += before[at + e];
      if (kept >> (kUnit * n + e) & 1) value += sum[at + e];
      return value;
    };
    if (whole(n)) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        Words words{};
        if (args.add) words = load_global16(unit_at(n) + i * kCopy);
#pragma unroll
        for (int e = 0; e < kCopy; ++e)
          set_element<T>(words, e, from_float<T>(to_float(element<T>(words, e)) + low_rank(i * kCopy + e)));
        store_global16(unit_at(n) + i * kCopy, words);
      }
    } else {
#pragma unroll 1
      for (int e = 0; e < valid; ++e) {
        const float start = args.add ? to_float(load_global(unit_at(n) + e)) : 0.0f;
        store_global(unit_at(n) + e, from_float<T>(start + low_rank(e)));
      }
    }
  }
}

}  // namespace lorasp::cuda
