// One AdamW step over the active entries of up to kItems parameters per launch, in place. Where an entry is active,
// with t the number of its own active steps:
//     m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
//     p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// Everywhere else p, m and v keep their bits, whatever g holds. Arithmetic in fp32, rounded once.
//
// One thread per kVector entries. Steps that whole rows, columns or parameters share are counted up by a kernel before,
// steps of single entries in the pass itself. Vectors without an active entry are neither read nor written.
//
// Floor: reads p, g, m, v and writes p, m, v of what is active, 7 elements an entry; of single entries also 9 bytes of
// `active` and steps. For 40M parameters (rank 16 in every linear layer of an 8-billion Llama) in fp32 on 4.3 TB/s
// [calc]: 1.12 GB, 260 us; half of them by rows 130 us, by entries 1.48 GB, 344 us (most vectors hold an active entry).
#pragma once
#include "vector.cuh"

namespace lorasp::cuda {

// How `active` and steps of a parameter (P, Q) are shaped: one for all, (P, 1), (1, Q), (P, Q).
enum class Grain : int { kAll, kRow, kColumn, kEntry };

template <class T>
struct AdamWItem {
  T* param;
  const T* grad;
  T *exp_avg, *exp_avg_sq;
  int32_t* steps;         // `counters` of them, contiguous, as is active
  const uint8_t* active;  // nullptr: everywhere
  int64_t size, counters;
  Divider columns;
  Grain grain;
  int first_block, first_count_block;
};

struct AdamWHyper {
  float lr, log_beta1, log_beta2, beta2, gain1, gain2, decay, eps;
};

constexpr int kItems = 36;

template <class T>
struct AdamWArgs {
  AdamWHyper hyper;
  int count;
  AdamWItem<T> items[kItems];
};
static_assert(sizeof(AdamWArgs<float>) <= 4096);  // what a kernel's arguments may take

// The last item whose blocks begin at or before this one; those without blocks come before one that has some.
template <class T, class First>
__device__ inline const AdamWItem<T>& item_of_block(const AdamWArgs<T>& args, First&& first) {
  int at = 0;
  for (int step = 32; step > 0; step /= 2)
    if (at + step < args.count && first(args.items[at + step]) <= static_cast<int>(blockIdx.x)) at += step;
  return args.items[at];
}

template <class T>
__global__ void __launch_bounds__(kThreads) partial_adamw_count_kernel(const AdamWArgs<T> args) {
  const AdamWItem<T>& item = item_of_block(args, [](const AdamWItem<T>& i) { return i.first_count_block; });
  const int64_t i =
      static_cast<int64_t>(static_cast<int>(blockIdx.x) - item.first_count_block) * kThreads + threadIdx.x;
  if (i >= item.counters || (item.active && !load_global(item.active + i))) return;
  store_global(item.steps + i, load_global(item.steps + i) + 1);
}

// Which of a vector's entries are active, and their steps, this one included.
template <class T>
struct ActiveEntries {
  uint32_t bits = 0;
  int32_t steps[kVector<T>] = {};

  // Steps of every entry: counted up here.
  __device__ void count(const AdamWItem<T>& item, int64_t index, int valid) {
    using Flags = std::conditional_t<kVector<T> == 8, uint64_t, uint32_t>;
    const uint8_t* active = item.active + index;
    int32_t* counted = item.steps + index;
    const bool at_once = valid == kVector<T> && reinterpret_cast<uintptr_t>(active) % sizeof(Flags) == 0 &&
                         reinterpret_cast<uintptr_t>(counted) % 16 == 0;
    if (at_once) {
      const Flags flags = load_global(reinterpret_cast<const Flags*>(active));
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) bits |= static_cast<uint32_t>(flags >> (8 * i) & 1) << i;
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i)
        if (i < valid && load_global(active + i)) bits |= 1u << i;
    }
    if (bits == 0) return;
#pragma unroll
    for (int first = 0; first < kVector<T>; first += 4) {
      const int last = valid - first < 4 ? valid - first : 4;
      Words words{};
      if (at_once) {
        words = load_global16(counted + first);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < last) words.word[i] = static_cast<uint32_t>(load_global(counted + first + i));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[i] += bits >> (first + i) & 1;
#pragma unroll
      for (int i = 0; i < 4; ++i) steps[first + i] = static_cast<int32_t>(words.word[i]);
      if (at_once) {
        store_global16(counted + first, words);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (i < last) store_global(counted + first + i, steps[first + i]);
      }
    }
  }

  // Steps that entries share.
  __device__ void look_up(const AdamWItem<T>& item, int64_t index, int valid) {
    Divider::Result place{0, 0};
    if (item.grain != Grain::kAll) place = item.columns(index);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i >= valid) break;
      const int64_t counter = item.grain == Grain::kRow      ? place.quotient
                              : item.grain == Grain::kColumn ? place.remainder
                                                             : 0;
      if (!item.active || load_global(item.active + counter)) {
        bits |= 1u << i;
        steps[i] = load_global(item.steps + counter);
      }
      if (++place.remainder == item.columns.divisor()) place = {place.quotient + 1, 0};
    }
  }
};

// 1 - beta^t; 1 - exp(t log beta) would cancel while beta^t is close to 1.
__device__ inline float one_minus_power(float log_beta, int32_t t) { return -expm1f(log_beta * static_cast<float>(t)); }

template <class T>
__global__ void __launch_bounds__(kThreads) partial_adamw_kernel(const AdamWArgs<T> args) {
  const AdamWItem<T>& item = item_of_block(args, [](const AdamWItem<T>& i) { return i.first_block; });
  const int64_t block = static_cast<int>(blockIdx.x) - item.first_block;
  const int64_t index = (block * kThreads + threadIdx.x) * kVector<T>, left = item.size - index;
  if (left <= 0) return;
  const int valid = left < kVector<T> ? static_cast<int>(left) : kVector<T>;
  ActiveEntries<T> active;
  if (item.grain == Grain::kEntry)
    active.count(item, index, valid);
  else
    active.look_up(item, index, valid);
  if (active.bits == 0) return;

  const AdamWHyper& hyper = args.hyper;
  const auto load = [&](const T* from) { return load_vector<T>(from + index, 0, valid, T{}); };
  const Words grad = load(item.grad);
  Words param = load(item.param), exp_avg = load(item.exp_avg), exp_avg_sq = load(item.exp_avg_sq);
  int32_t t = 0;
  float step_size = 0.0f, root = 1.0f;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (!(active.bits >> i & 1)) continue;
    if (active.steps[i] != t) {  // mostly the steps of the entry before
      t = active.steps[i];
      step_size = hyper.lr / one_minus_power(hyper.log_beta1, t);
      root = sqrtf(one_minus_power(hyper.log_beta2, t));
    }
    const float g = to_float(element<T>(grad, i)), p = to_float(element<T>(param, i));
    float m = to_float(element<T>(exp_avg, i)), v = to_float(element<T>(exp_avg_sq, i));
    m += hyper.gain1 * (g - m);
    v = hyper.beta2 * v + hyper.gain2 * g * g;
    set_element<T>(exp_avg, i, from_float<T>(m));
    set_element<T>(exp_avg_sq, i, from_float<T>(v));
    set_element<T>(param, i, from_float<T>(hyper.decay * p - step_size * m / (sqrtf(v) / root + hyper.eps)));
  }
  store_vector<T>(item.exp_avg + index, exp_avg, 0, valid);
  store_vector<T>(item.exp_avg_sq + index, exp_avg_sq, 0, valid);
  store_vector<T>(item.param + index, param, 0, valid);
}

inline AdamWHyper adamw_hyper(double lr, double beta1, double beta2, double eps, double weight_decay) {
  return {static_cast<float>(lr),
          static_cast<float>(std::log(beta1)),
          static_cast<float>(std::log(beta2)),
          static_cast<float>(beta2),
          static_cast<float>(1.0 - beta1),
          static_cast<float>(1.0 - beta2),
          static_cast<float>(1.0 - lr * weight_decay),
          static_cast<float>(eps)};
}

// Parameter (P, Q), or one of any shape as (1, size). grad, moments, steps and active are filled in already.
template <class T>
void shape_item(AdamWItem<T>& item, int64_t P, int64_t Q, Grain grain) {
  item.size = P * Q;
  item.columns = Divider(Q > 0 ? Q : 1);
  item.grain = grain;
  item.counters = grain == Grain::kAll ? 1 : grain == Grain::kRow ? P : grain == Grain::kColumn ? Q : P * Q;
}

// items: `count` of them, any number. No two may share memory.
template <class T>
void partial_adamw(const Device& device, const AdamWItem<T>* items, int64_t count, const AdamWHyper& hyper) {
  constexpr int64_t kMostBlocks = INT32_MAX;
  for (int64_t next = 0; next < count;) {
    AdamWArgs<T> args{hyper, 0, {}};
    int64_t blocks = 0, count_blocks = 0;
    for (; next < count && args.count < kItems; ++next) {
      AdamWItem<T> item = items[next];
      const int64_t own = ceil_div(item.size, kThreads * kVector<T>);
      const int64_t own_count = item.grain == Grain::kEntry ? 0 : ceil_div(item.counters, kThreads);
      if (args.count > 0 && (blocks + own > kMostBlocks || count_blocks + own_count > kMostBlocks)) break;
      item.first_block = static_cast<int>(blocks), item.first_count_block = static_cast<int>(count_blocks);
      blocks += own, count_blocks += own_count;
      args.items[args.count++] = item;
    }
    launch(partial_adamw_count_kernel<T>, {count_blocks}, kThreads, 0, device.stream, args);
    launch(partial_adamw_kernel<T>, {blocks}, kThreads, 0, device.stream, args);
  }
}

}  // namespace lorasp::cuda
