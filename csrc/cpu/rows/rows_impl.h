// rows.h in the lanes of one instruction set. Included once per instruction set, after its simd_*.h and simd_softmax.h.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

template <class A, class B>
struct Common {
  using type = float;
};
template <class A>
struct Common<A, A> {
  using type = A;
};

inline float negative_infinity(const float*) { return -__builtin_inff(); }
inline bf16 negative_infinity(const bf16*) { return {0xFF80}; }
inline f16 negative_infinity(const f16*) { return {0xFC00}; }

// The last, incomplete vector of a row, filled up with `fill`.
template <class T>
struct Tail {
  T data[kWidth];
  Tail(const T* from, int64_t count, T fill) {
    for (int i = 0; i < kWidth; ++i) data[i] = i < count ? from[i] : fill;
  }
};
template <class T>
inline void store_tail(T* p, int64_t count, vf v) {
  T data[kWidth];
  vstore(data, v);
  for (int64_t i = 0; i < count; ++i) p[i] = data[i];
}

template <class X, class R, class O, bool kResidual>
void cut(const void* x_, const void* residual_, const uint32_t* bits, float scale, int64_t count, void* out_) {
  const X* x = static_cast<const X*>(x_);
  const R* residual = static_cast<const R*>(residual_);
  O* out = static_cast<O*>(out_);
  const vf factor = vset(scale);
  const auto keep = [&](int64_t i, vf v) {
    v = vmul(v, factor);
    return bits == nullptr ? v : vkeep(v, bits[i / 32] >> (i % 32));
  };
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    vf v = keep(i, vload(x + i));
    if constexpr (kResidual) v = vadd(v, vload(residual + i));
    vstore(out + i, v);
  }
  if (i < count) {
    vf v = keep(i, vload(Tail<X>(x + i, count - i, X{}).data));
    if constexpr (kResidual) v = vadd(v, vload(Tail<R>(residual + i, count - i, R{}).data));
    store_tail(out + i, count - i, v);
  }
}

struct Pair {
  vf a, b;
};
struct Sums {
  double a, b;
};

// The sum of add(v, &run) over vectors 0 ... count - 1: short runs in fp32, summed in double.
template <class F>
inline Sums sum_in_runs(int64_t count, const F& add) {
  constexpr int64_t kRun = 16;
  Sums all{0.0, 0.0};
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = first + kRun < count ? first + kRun : count;
    Pair run{vzero(), vzero()};
    for (int64_t v = first; v < last; ++v) add(v, &run);
    all.a += static_cast<double>(vsum(run.a));
    all.b += static_cast<double>(vsum(run.b));
  }
  return all;
}

// One side's running softmax: the highest value, the finite one its exponents refer to, sum exp, sum exp d.
struct Side {
  double highest = -__builtin_inf(), reference = 0.0, sum = 0.0, dot = 0.0;

  // Refers to `value` if it is higher; returns how far the reference moved.
  double raise(float value) {
    if (!(value > highest)) return 0.0;
    const double move = value - reference, rescale = sum == 0.0 ? 1.0 : __builtin_exp(-move);
    highest = reference = value;
    sum *= rescale;
    dot = rescale == 0.0 ? 0.0 : dot * rescale;
    return move;
  }
};

// In pieces that stay in L1: the maximum, then the sums of exp, then those of exp d with d = a - b - shift. shift is
// the log ratio of the sums so far: so d is small where the distributions are close, and its sums lose nothing. fp32
// within a piece, double across pieces.
template <class T>
void pair_stats(const void* a_, const void* b_, int64_t count, PairStats* stats) {
  constexpr int64_t kPiece = 2048;
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  const T lowest = negative_infinity(static_cast<const T*>(nullptr));
  alignas(64) float p[kPiece], q[kPiece];
  Side side_a, side_b;
  double shift = 0.0;
  const auto shift_to = [&](double target) {
    if (target == shift) return;
    side_a.dot -= (target - shift) * side_a.sum;
    side_b.dot -= (target - shift) * side_b.sum;
    shift = target;
  };
  for (int64_t start = 0; start < count; start += kPiece, a += kPiece, b += kPiece) {
    const int64_t length = count - start < kPiece ? count - start : kPiece;
    const int64_t whole = length / kWidth, vectors = ceil_div(length, static_cast<int64_t>(kWidth));
    const Tail<T> tail_a(a + whole * kWidth, length % kWidth, lowest),
        tail_b(b + whole * kWidth, length % kWidth, lowest);
    const auto load_a = [&](int64_t v) { return vload(v < whole ? a + v * kWidth : tail_a.data); };
    const auto load_b = [&](int64_t v) { return vload(v < whole ? b + v * kWidth : tail_b.data); };

    vf highest_a = load_a(0), highest_b = load_b(0);
    for (int64_t v = 1; v < vectors; ++v) {
      highest_a = vmax(highest_a, load_a(v));
      highest_b = vmax(highest_b, load_b(v));
    }
    // What is subtracted from a - b moves with the references; the sums of exp d follow.
    const double moved = side_a.raise(vmax_all(highest_a)) - side_b.raise(vmax_all(highest_b));
    shift_to(shift + moved);
    shift -= moved;

    const vf reference_a = vset(static_cast<float>(side_a.reference));
    const vf reference_b = vset(static_cast<float>(side_b.reference));
    const Sums sums = sum_in_runs(vectors, [&](int64_t v, Pair* run) {
      const vf x = vexp(vsub(load_a(v), reference_a)), y = vexp(vsub(load_b(v), reference_b));
      vstore(p + v * kWidth, x);
      vstore(q + v * kWidth, y);
      run->a = vadd(run->a, x);
      run->b = vadd(run->b, y);
    });
    const double ratio = __builtin_log((side_a.sum + sums.a) / (side_b.sum + sums.b));
    if (ratio - ratio == 0.0) shift_to(ratio);

    const vf subtracted = vset(static_cast<float>(shift));
    const Sums dots = sum_in_runs(vectors, [&](int64_t v, Pair* run) {
      const vf d = vsub(vsub(vsub(load_a(v), reference_a), vsub(load_b(v), reference_b)), subtracted);
      run->a = vfma_nonzero(vload(p + v * kWidth), d, run->a);
      run->b = vfma_nonzero(vload(q + v * kWidth), d, run->b);
    });
    // The vectors had shift rounded to a float.
    const double rest = static_cast<double>(static_cast<float>(shift)) - shift;
    side_a.sum += sums.a;
    side_b.sum += sums.b;
    side_a.dot += dots.a + rest * sums.a;
    side_b.dot += dots.b + rest * sums.b;
  }
  shift_to(__builtin_log(side_a.sum / side_b.sum));
  *stats = {side_a.highest,   1.0 / side_a.sum,        side_b.highest,
            1.0 / side_b.sum, side_a.dot / side_a.sum, -side_b.dot / side_b.sum};
}

// da = weight_ab p (d - kl_ab) + weight_ba (p - q)          db = weight_ba q (-d - kl_ba) + weight_ab (q - p)
template <class T>
void pair_gradient(const void* a_, const void* b_, int64_t count, const PairGradient& row, void* da_, void* db_) {
  const T* a = static_cast<const T*>(a_);
  const T* b = static_cast<const T*>(b_);
  T* da = static_cast<T*>(da_);
  T* db = static_cast<T*>(db_);
  const vf max_a = vset(row.max_a), over_a = vset(row.over_a);
  const vf max_b = vset(row.max_b), over_b = vset(row.over_b);
  const vf ab = vset(row.weight_ab), ba = vset(row.weight_ba), limit = vset(1e30f), minus_limit = vset(-1e30f);
  const vf ratio = vset(row.log_ratio), kl_ab = vset(row.kl_ab), minus_kl_ba = vset(-row.kl_ba);
  const auto gradients = [&](vf x, vf y, vf* dx, vf* dy) {
    x = vsub(x, max_a);
    y = vsub(y, max_b);
    // Finite, so that it times a probability of 0 is 0.
    const vf d = vmax(vmin(vsub(vsub(x, y), ratio), limit), minus_limit);
    const vf p = vmul(vexp(x), over_a), q = vmul(vexp(y), over_b);
    *dx = vfma(p, vmul(ab, vsub(d, kl_ab)), vmul(ba, vsub(p, q)));
    *dy = vfma(q, vmul(ba, vsub(minus_kl_ba, d)), vmul(ab, vsub(q, p)));
  };
  vf dx, dy;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    gradients(vload(a + i), vload(b + i), &dx, &dy);
    if (da != nullptr) vstore(da + i, dx);
    if (db != nullptr) vstore(db + i, dy);
  }
  if (i < count) {
    gradients(vload(Tail<T>(a + i, count - i, T{}).data), vload(Tail<T>(b + i, count - i, T{}).data), &dx, &dy);
    if (da != nullptr) store_tail(da + i, count - i, dx);
    if (db != nullptr) store_tail(db + i, count - i, dy);
  }
}

template <class X, class R>
constexpr RowKernels::Cut adding() {
  return cut<X, R, typename Common<X, R>::type, true>;
}
template <class X, class O>
constexpr RowKernels::Cut converting() {
  return cut<X, X, O, false>;
}

}  // namespace

const RowKernels kRowKernels = {{{adding<float, float>(), adding<float, bf16>(), adding<float, f16>()},
                                 {adding<bf16, float>(), adding<bf16, bf16>(), adding<bf16, f16>()},
                                 {adding<f16, float>(), adding<f16, bf16>(), adding<f16, f16>()}},
                                {{converting<float, float>(), converting<float, bf16>(), converting<float, f16>()},
                                 {converting<bf16, float>(), converting<bf16, bf16>(), converting<bf16, f16>()},
                                 {converting<f16, float>(), converting<f16, bf16>(), converting<f16, f16>()}},
                                {pair_stats<float>, pair_stats<bf16>, pair_stats<f16>},
                                {pair_gradient<float>, pair_gradient<bf16>, pair_gradient<f16>}};

}  // namespace lorasp::LORASP_ISA
