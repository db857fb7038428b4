// The forward of consistency: for every row of logits a and b (B, T, V), P = softmax(a), Q = softmax(b), the divergence
// and stats (max a, 1 / sum exp(a - max a), the same of b, KL(P|Q), KL(Q|P)).
//
// Every thread streams over its part of a row once and keeps sums over it, relative to the maxima it has met. The sums
// of threads are merged over the warp, the block and, where few rows would leave multiprocessors idle, over the blocks
// that share a row, by a second kernel, always in one order: the same bits every run. No softmax is stored.
//
// Floor: reads 2 V elements a row, writes 28 bytes (and 48 for each block of a shared row, read again). At 2048 x 32000
// in bf16 on 4.3 TB/s [calc]: 262 MB, 61 us, where the softmaxes alone, written and read once in bf16, are 524 MB. The
// loop has about 220 instructions per vector of bf16 (machine code for sm_90), while its bytes take 248 issue slots on
// 132 multiprocessors at 1.98 GHz [calc].
#pragma once
#include "vector.cuh"

namespace lorasp::cuda {

constexpr int kStats = 6;

// Logits (B, T, V) with unit stride in the row.
template <class T>
struct LogitRows {
  T* data;
  int64_t stride_b, stride_t;

  __device__ T* at(const Divider::Result& row) const {
    return data + (row.quotient * stride_b + row.remainder * stride_t);
  }
};

// How far p lies behind a multiple of 16 bytes, in elements: vectors that begin there are moved at once.
template <class T>
__device__ inline int elements_past_vector(const T* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kVector<T>);
}
// Vectors that cover a row wherever it begins.
template <class T>
int64_t vectors_of_row(int64_t V) {
  return ceil_div(V + kVector<T> - 1, kVector<T>);
}

// exp, as exact as entries of type T call for.
template <class T>
__device__ inline float exponential(float v) {
  if constexpr (sizeof(T) == 4)
    return expf(v);
  else
    return power_of_2(v * 1.44269504f);
}

__device__ inline bool is_finite(float v) { return v - v == 0.0f; }

// A sum and what rounding took from it: gradients are differences of probabilities, no better than their sum.
struct Sum {
  float value = 0.0f, rest = 0.0f;

  __device__ float total() const { return is_finite(value) ? value + rest : value; }
  // Knuth's TwoSum, whose result does not depend on which of the two is added to which.
  __device__ void add(const Sum& more) {
    const float before = value;
    value += more.value;
    const float seen = value - before;
    rest = (rest + more.rest) + ((before - (value - seen)) + (more.value - seen));
  }
  __device__ void subtract_multiple(float factor, const Sum& of) {
    const float product = factor * of.value;
    add({-product, -multiply_add(factor, of.value, -product) - factor * of.rest});
  }
};

// a / b, rounded about once.
__device__ inline float quotient(const Sum& a, const Sum& b) {
  const float near = a.total() / b.total();
  const float left = (multiply_add(-near, b.value, a.value) + a.rest) - near * b.rest;
  return is_finite(left) ? near + left / b.total() : near;
}

// Of one side of a stretch of a row: its maximum; with x = a - base a, y = b - base b and d = x - y, sum exp(x) and
// sum exp(x) d, or of b: exp(y). The base is at most kSlack below the maximum.
struct SideSums {
  float top = -INFINITY, base = -INFINITY;
  Sum weight, dot;

  __device__ float finite_base() const { return base == -INFINITY ? 0.0f : base; }

  // To another base, by `factor`, from which d is `moved` less. What is no longer seen adds nothing.
  __device__ void rescale(float factor, float moved) {
    if (weight.value == 0.0f || factor == 0.0f) {
      weight = dot = {};
      return;
    }
    if (moved != 0.0f) dot.subtract_multiple(moved, weight);
    for (Sum* sum : {&weight, &dot}) sum->value *= factor, sum->rest *= factor;
  }
};

constexpr float kSlack = 8.0f;  // e^8: nothing is lost, and bases move seldom

struct PairSums {
  SideSums a, b;

  template <class T>
  __device__ void raise(float base_a, float base_b) {
    const float old_a = a.finite_base(), old_b = b.finite_base();
    a.base = fmaxf(a.base, base_a), b.base = fmaxf(b.base, base_b);
    const float change_a = a.finite_base() - old_a, change_b = b.finite_base() - old_b;
    a.rescale(exponential<T>(-change_a), change_a - change_b);
    b.rescale(exponential<T>(-change_b), change_a - change_b);
  }
};

// kVector entries of both sides.
template <class T>
__device__ inline void add_vector(PairSums& sums, const Words& words_a, const Words& words_b) {
  float x[kVector<T>], y[kVector<T>], top_a = -INFINITY, top_b = -INFINITY;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    x[i] = to_float(element<T>(words_a, i)), y[i] = to_float(element<T>(words_b, i));
    top_a = fmaxf(top_a, x[i]), top_b = fmaxf(top_b, y[i]);
  }
  sums.a.top = fmaxf(sums.a.top, top_a), sums.b.top = fmaxf(sums.b.top, top_b);
  if (top_a > sums.a.base + kSlack || top_b > sums.b.base + kSlack) sums.raise<T>(top_a, top_b);
  const float base_a = sums.a.finite_base(), base_b = sums.b.finite_base();
  float weight_a = 0.0f, weight_b = 0.0f, dot_a = 0.0f, dot_b = 0.0f;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    x[i] -= base_a, y[i] -= base_b;
    const float p = exponential<T>(x[i]), q = exponential<T>(y[i]), d = x[i] - y[i];
    weight_a += p, weight_b += q;
    if (p != 0.0f) dot_a = multiply_add(p, d, dot_a);
    if (q != 0.0f) dot_b = multiply_add(q, d, dot_b);
  }
  sums.a.weight.add({weight_a, 0.0f}), sums.b.weight.add({weight_b, 0.0f});
  sums.a.dot.add({dot_a, 0.0f}), sums.b.dot.add({dot_b, 0.0f});
}

// log of (sum exp(a - max a) / sum exp(b - max b)), the same number in forward and backward: d - KL(P|Q) then does not
// depend on its rounding.
__device__ inline float log_weight_ratio(float over_a, float over_b) { return logf(over_b / over_a); }

struct ConsistencyResult {
  const uint8_t* mask;  // (B T,) or nullptr
  bool symmetric;       // kl, else js
  float* rows;          // (B T,)
  float* stats;         // (B T, kStats)

  __device__ bool kept(int64_t row) const { return !mask || load_global(mask + row) != 0; }

  __device__ void write(int64_t row, const PairSums& s) const {
    const float over_a = quotient({1.0f, 0.0f}, s.a.weight), over_b = quotient({1.0f, 0.0f}, s.b.weight);
    const float log_ratio = log_weight_ratio(over_a, over_b);
    // Divided when it is small, where the distributions are close: kl then does not depend on log_ratio's rounding.
    Sum dot_a = s.a.dot, dot_b = s.b.dot;
    dot_a.subtract_multiple(log_ratio, s.a.weight);
    dot_b.subtract_multiple(log_ratio, s.b.weight);
    const float kl_ab = quotient(dot_a, s.a.weight), kl_ba = -quotient(dot_b, s.b.weight);
    put(row, symmetric ? 0.5f * (kl_ab + kl_ba) : kl_ab, {s.a.top, over_a, s.b.top, over_b, kl_ab, kl_ba});
  }
  __device__ void leave_out(int64_t row) const { put(row, 0.0f, {}); }

 private:
  struct Stats {
    float value[kStats];
  };
  __device__ void put(int64_t row, float divergence, const Stats& s) const {
    store_global(rows + row, divergence);
#pragma unroll
    for (int i = 0; i < kStats; ++i) store_global(stats + (row * kStats + i), s.value[i]);
  }
};

constexpr int kNumbers = sizeof(PairSums) / sizeof(float);
constexpr int kMergeSharedBytes = kWarps * kNumbers * static_cast<int>(sizeof(float));

template <class F>
__device__ inline void for_each_number(PairSums& s, F&& f) {
  int i = 0;
  for (SideSums* side : {&s.a, &s.b})
    for (float* v :
         {&side->top, &side->base, &side->weight.value, &side->weight.rest, &side->dot.value, &side->dot.rest})
      f(i++, *v);
}

// Every lane of the warp gets the same bits: each step combines two lanes alike.
__device__ inline float highest_of_warp(float v) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
__device__ inline void add_warp(Sum& sum) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const float value = shuffle_xor(sum.value, mask), rest = shuffle_xor(sum.rest, mask);
    sum.add({value, rest});
  }
}

// The sums of all lanes of the warp, in all of them. Each lane is brought to the common maxima once: where the bulk of
// the sums is, next to the maxima, that costs the least rounding.
__device__ inline PairSums merge_warp(PairSums sums) {
  sums.a.top = highest_of_warp(sums.a.top), sums.b.top = highest_of_warp(sums.b.top);
  sums.raise<float>(sums.a.top, sums.b.top);
  add_warp(sums.a.weight), add_warp(sums.a.dot);
  add_warp(sums.b.weight), add_warp(sums.b.dot);
  return sums;
}

// Of all threads of the block, in its first warp.
__device__ inline PairSums merge_block(PairSums sums) {
  static_assert(kWarps <= 32);
  const Shared<float> room = shared_memory<float>(0);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  sums = merge_warp(sums);
  if (lane == 0) for_each_number(sums, [&](int i, float& v) { room[warp * kNumbers + i] = v; });
  sync_threads();
  if (warp > 0) return sums;
  sums = {};
  if (lane < kWarps) for_each_number(sums, [&](int i, float& v) { v = room[lane * kNumbers + i]; });
  return merge_warp(sums);
}

template <class T>
struct ConsistencyForwardArgs {
  LogitRows<const T> a, b;
  Divider T_;
  int64_t rows, V;
  bool warp_per_row;  // else `parts` blocks per row
  int64_t parts, part_vectors;
  float* partials;  // (B T, parts, kNumbers) where parts > 1
  ConsistencyResult result;
};

template <class T>
__global__ void __launch_bounds__(kThreads) consistency_forward_kernel(const ConsistencyForwardArgs<T> args) {
  const int64_t block = blockIdx.x, warp = threadIdx.x / 32;
  const int64_t row = args.warp_per_row ? block * kWarps + warp : block / args.parts;
  if (row >= args.rows) return;
  const int64_t part = args.warp_per_row ? 0 : block % args.parts;
  const int threads = args.warp_per_row ? 32 : kThreads;
  const bool kept = args.result.kept(row);
  PairSums sums;
  if (kept) {
    const Divider::Result place = args.T_(row);
    const T* a = args.a.at(place);
    const T* b = args.b.at(place);
    const int past = elements_past_vector(a);
    const T nothing = from_float<T>(-INFINITY);
    const int64_t first = part * args.part_vectors, end = first + args.part_vectors;
    for (int64_t v = first + threadIdx.x % threads; v < end; v += threads) {
      const int64_t at = v * kVector<T> - past, left = args.V - at;
      if (left <= 0) break;
      const int from = at < 0 ? past : 0, to = left < kVector<T> ? static_cast<int>(left) : kVector<T>;
      add_vector<T>(sums, load_vector<T>(a + at, from, to, nothing), load_vector<T>(b + at, from, to, nothing));
    }
  }
  sums = args.warp_per_row ? merge_warp(sums) : merge_block(sums);
  if (threadIdx.x % threads != 0) return;
  if (args.parts > 1)
    for_each_number(sums, [&](int i, float& v) { store_global(args.partials + (block * kNumbers + i), v); });
  else if (kept)
    args.result.write(row, sums);
  else
    args.result.leave_out(row);
}

struct ConsistencyMergeArgs {
  int64_t parts;  // at most kThreads
  float* partials;
  ConsistencyResult result;
};

// One block per row: thread t takes part t.
static __global__ void __launch_bounds__(kThreads) consistency_merge_kernel(const ConsistencyMergeArgs args) {
  const int64_t row = blockIdx.x;
  PairSums sums;
  if (threadIdx.x < args.parts)
    for_each_number(sums, [&](int i, float& v) {
      v = load_global(args.partials + ((row * args.parts + threadIdx.x) * kNumbers + i));
    });
  sums = merge_block(sums);
  if (threadIdx.x != 0) return;
  if (args.result.kept(row))
    args.result.write(row, sums);
  else
    args.result.leave_out(row);
}

template <class T>
struct ConsistencyBackwardArgs {
  LogitRows<const T> a, b;
  LogitRows<T> da, db;  // data nullptr: not needed; may be where a and b are
  Divider T_, row_threads;
  int64_t rows, V;
  const float *drows, *stats;
  const uint8_t* mask;  // (B T,) or nullptr
  bool symmetric;
};

// dlogits and dother, row_threads threads per row, each for every row_threads-th vector of both:
//     da = alpha P (d - KL(P|Q)) + beta (P - Q)          db = beta Q (-d - KL(Q|P)) + alpha (Q - P)
// with d = log P - log Q, (alpha, beta) = (1/2, 1/2) for kl and (1, 0) for js.
//
// Floor: reads 2 V elements a row, writes V per needed gradient. At 2048 x 32000 in bf16 on 4.3 TB/s [calc]: both 524
// MB, 122 us; one 393 MB, 91 us. About 360 instructions per vector of bf16 (machine code for sm_90), while its bytes
// take 496 issue slots, those of one gradient 372 [calc, as above].
template <class T>
__global__ void __launch_bounds__(kThreads) consistency_backward_kernel(const ConsistencyBackwardArgs<T> args) {
  const Divider::Result thread = args.row_threads(static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  const int64_t row = thread.quotient;
  if (row >= args.rows) return;
  const Divider::Result place = args.T_(row);
  const T* a = args.a.at(place);
  const T* b = args.b.at(place);
  const int past = elements_past_vector(a);
  const bool kept = !args.mask || load_global(args.mask + row) != 0;
  const float* stats = args.stats + row * kStats;
  const float top_a = load_global(stats), over_a = load_global(stats + 1);
  const float top_b = load_global(stats + 2), over_b = load_global(stats + 3);
  const float kl_ab = load_global(stats + 4), kl_ba = load_global(stats + 5);
  const float log_ratio = log_weight_ratio(over_a, over_b), drow = load_global(args.drows + row);
  const float alpha = args.symmetric ? 0.5f : 1.0f;
  const float factor = alpha * (is_finite(args.symmetric ? kl_ab + kl_ba : kl_ab) ? drow : NAN);
#pragma unroll 1
  for (int64_t v = thread.remainder;; v += args.row_threads.divisor()) {
    const int64_t at = v * kVector<T> - past, left = args.V - at;
    if (left <= 0) break;
    const int from = at < 0 ? past : 0, to = left < kVector<T> ? static_cast<int>(left) : kVector<T>;
    Words da{}, db{};
    if (kept) {
      const Words words_a = load_vector<T>(a + at, from, to, T{}), words_b = load_vector<T>(b + at, from, to, T{});
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) {
        const float x = to_float(element<T>(words_a, i)) - top_a, y = to_float(element<T>(words_b, i)) - top_b;
        const float p = exponential<T>(x) * over_a, q = exponential<T>(y) * over_b, d = x - y - log_ratio;
        float ga = p == 0.0f ? 0.0f : p * (d - kl_ab), gb = 0.0f;
        if (args.symmetric) {  // for js the inverse divergence may be infinite where the gradient is not
          ga += p - q;
          gb = q == 0.0f ? 0.0f : q * (-d - kl_ba);
        }
        gb += q - p;
        set_element<T>(da, i, from_float<T>(ga * factor));
        set_element<T>(db, i, from_float<T>(gb * factor));
      }
    }
    if (args.da.data) store_vector<T>(args.da.at(place) + at, da, from, to);
    if (args.db.data) store_vector<T>(args.db.at(place) + at, db, from, to);
  }
}

}  // namespace lorasp::cuda
