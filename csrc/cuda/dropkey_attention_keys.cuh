// The key lists of dropped columns: for each of B H rows the sorted keys that are kept, in the form that the attention
// kernels walk (triton_kernels/dropkey_attention_fwd.py builds the same). rank (B H, Sk + 1) counts the kept keys
// before key n, so that rank[Sk] is how many are kept; index (B H, Sk) holds the kept keys in order and behind them the
// dropped ones, from the back: a permutation, through which every row of a gradient is written once.
//
// One block per row walks it kThreads * kUnit keys at a time, kUnit keys per thread. Each key's place is known from a
// scan over the block, so that no atomics are needed and the same list comes out every run.
//
// Floor: writes 8 B H Sk bytes, reads nothing. One Philox call (7 rounds) per kUnit keys.
#pragma once
#include "tile.cuh"

namespace lorasp::cuda {

struct KeysArgs {
  int64_t Sk;
  KeepMask keep;
  const int64_t* seed;  // on the device
  int* index;           // (B H, Sk)
  int* rank;            // (B H, Sk + 1)
};

constexpr int kKeysSharedBytes = 2 * kWarps * static_cast<int>(sizeof(int));

// The sum of `count` over the block's threads before this one, and over all of them. `room`: kWarps ints of shared
// memory that no thread reads or writes until the next call's barrier.
__device__ inline int sum_before(int count, Shared<int> room, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int below = shuffle_up(sum, distance);
    if (lane >= distance) sum += below;
  }
  if (lane == 31) room[warp] = sum;
  sync_threads();
  int before = sum - count;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    const int warp_sum = room[w];
    if (w < warp) before += warp_sum;
    total += warp_sum;
  }
  return before;
}

static __global__ void __launch_bounds__(kThreads) dropkey_attention_keys_kernel(const KeysArgs args) {
  const int64_t row = blockIdx.x, Sk = args.Sk;
  int* index = args.index + row * Sk;
  int* rank = args.rank + row * (Sk + 1);
  KeepMask keep = args.keep;
  keep.seed = static_cast<uint64_t>(load_global(args.seed));
  int kept_before = 0, step = 0;
  for (int64_t start = 0; start < Sk; start += kThreads * kUnit, ++step) {
    const int64_t first = start + threadIdx.x * kUnit;
    const int valid = valid_columns(first, Sk);
    const uint32_t bits = keep_bits(keep, static_cast<uint64_t>(row * Sk + first)) & ((1u << valid) - 1);
    int total;
    // Two rooms in turn: a step's barrier parts a room's readers from the step after the next, which writes it again.
    const Shared<int> room = shared_memory<int>(step % 2 * kWarps * static_cast<int>(sizeof(int)));
    int before = kept_before + sum_before(count_bits(bits), room, total);
    for (int i = 0; i < valid; ++i) {
      const int key = static_cast<int>(first) + i;
      const bool kept = bits >> i & 1;
      store_global(rank + key, before);
      store_global(index + (kept ? before : static_cast<int>(Sk) - 1 - (key - before)), key);
      before += kept;
    }
    kept_before += total;
  }
  if (threadIdx.x == 0) store_global(rank + Sk, kept_before);
}

// rows = B H. Sk in [0, 2^31 - 1).
inline void dropkey_attention_keys(const Device& device, int64_t rows, const KeysArgs& args) {
  launch(dropkey_attention_keys_kernel, {rows}, kThreads, kKeysSharedBytes, device.stream, args);
}

}  // namespace lorasp::cuda
