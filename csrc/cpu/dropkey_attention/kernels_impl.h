// dropkey_attention.h in terms of an Engine (dropkey_attention_engines.h). Included once per instruction set.
//
// Operands are packed once per head (keys) or per query block (queries), zero-padded to kRows rows and kStep columns:
//     A (rows, depth): [depth / kStep][rows][kStep]             rows of a product
//     B (depth, columns): panels of kPanel columns, a panel [depth / kStep][kStep x kPanel in the engine's order]
//     C (rows, columns), fp32: panels of kPanel columns, a panel [rows][kPanel]
// A logit is z = s * scale [+ bias] and p = 2^(z log2 e - m). Where the scale is all there is to a logit
// (Head::transforms), it is folded into the exponent's factor; factors come in two floats where fp32's rounding counts
// (kFine).
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

static_assert(kRows % kPanelColumns == 0);

// Queries and keys handled together. Chosen by measurement on a 2 MiB L2.
constexpr int64_t kForwardQueries = 64, kForwardKeys = 256;
constexpr int64_t kBackwardQueries = 256, kBackwardKeys = 128;
// o is rescaled only where a row's maximum grows by more than this many powers of two.
constexpr float kSlack = 8.0f;

class Carver {
 public:
  explicit Carver(void* memory) : next_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
  size_t bytes() const { return reinterpret_cast<size_t>(next_); }

 private:
  char* next_;
};

template <class E>
struct Head {
  using Source = typename E::Source;
  const Attention& p;
  const KeyList& keys;
  int64_t b, h, key_head;
  int64_t d, dv;  // padded head dimensions
  int64_t n;      // padded number of keys
  double factor;  // of s in the exponent

  Head(const Attention& p, const KeyList& keys, int64_t b, int64_t h)
      : p(p),
        keys(keys),
        b(b),
        h(h),
        key_head(h / (p.H / p.Hkv)),
        d(round_up(p.D, kRows)),
        dv(round_up(p.Dv, kRows)),
        n(round_up(keys.count, kRows)),
        factor(transforms() ? kLog2e : p.scale * kLog2e) {}

  const Source* rows(const HeadRows& t, int64_t head) const {
    return static_cast<const Source*>(t.data) + b * t.batch + head * t.head;
  }
  bool has_tiles() const { return p.mask.kind != ScoreMask::kNone || p.elements != nullptr; }
  // Where the logits need more than one multiplication before the maximum.
  bool transforms() const { return has_tiles() || keys.bias != nullptr || !(p.scale > 0); }
  // Keys that query i may see, as a count: the list is ascending.
  int64_t limit(int64_t i) const {
    if (!p.is_causal) return keys.count;
    int64_t low = 0, high = keys.count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys.index[middle] <= i)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// kRows rows: row r is source[(index ? index[r] : r) * stride], zero from `count` rows and `cols` columns on.
template <class E>
void stage(const typename E::Source* source, int64_t stride, const int32_t* index, int64_t count, int64_t cols,
           int64_t padded, typename E::T* out) {
  for (int64_t r = 0; r < kRows; ++r, out += padded) {
    if (r >= count) {
      std::memset(out, 0, static_cast<size_t>(padded) * sizeof(*out));
      continue;
    }
    E::copy_row(source + (index ? index[r] : r) * stride, cols, out);
    std::memset(out + cols, 0, static_cast<size_t>(padded - cols) * sizeof(*out));
  }
}

// The keys' operands of a head, any of which may be null: k^T and v^T as B (D, n), k or v as B (n, D).
template <class E>
void pack_keys(const Head<E>& head, const HeadRows& t, int64_t cols, int64_t padded, typename E::T* staged,
               typename E::T* transposed, typename E::T* plain) {
  const auto* source = head.rows(t, head.key_head);
  for (int64_t j = 0; j < head.n; j += kRows) {
    stage<E>(source, t.row, head.keys.index + j, smaller(kRows, head.keys.count - j), cols, padded, staged);
    if (transposed) E::pack_b_transposed(staged, padded, transposed + j * padded);
    if (plain) E::pack_b(staged, padded, plain + j * kPanelColumns, head.n * kPanelColumns);
  }
}

#if defined(LORASP_AVX512)

inline vf load_hiding(const float* p, __mmask16 valid) { return _mm512_maskz_loadu_ps(valid, p); }
inline vf load_hiding(const bf16* p, __mmask16 valid) { return widen(_mm256_maskz_loadu_epi16(valid, p)); }
inline vf load_hiding(const f16* p, __mmask16 valid) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, p)); }
inline vf load_hiding(const uint8_t* p, __mmask16 valid) {
  const __mmask16 open = _mm_test_epi8_mask(_mm_maskz_loadu_epi8(valid, p), _mm_set1_epi8(-1));
  return _mm512_mask_mov_ps(vset(-kInfinity), open, vzero());
}

// out[j] = row[index[j]] for keys of a list given as bits of row[0] ...; values up to `hidden` become -inf, and NaN
// +inf, which no maximum loses and which makes its query NaN.
// Writes up to 15 floats too many.
template <class M>
inline void compress_row(const M* row, const uint32_t* kept, int64_t range, float hidden, float* out) {
  for (int64_t j = 0; j < range; j += 16) {
    const auto bits = static_cast<__mmask16>(kept[j / 32] >> (j % 32));
    const auto valid = static_cast<__mmask16>(range - j >= 16 ? 0xFFFF : (1 << (range - j)) - 1);
    vf value = load_hiding(row + j, valid);
    value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, vset(hidden), _CMP_LE_OQ), vset(-kInfinity));
    value = _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), vset(kInfinity));
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(bits, value));
    out += __builtin_popcount(bits);
  }
}

#endif

// What is added to the logits of queries q0 ... q0 + rows - 1 and keys k0 ... k0 + count - 1; rows
// kBackwardKeys or more apart (`ld`). False where no logit of the block is visible.
template <class E>
bool bias_tile(const Head<E>& head, int64_t q0, int64_t rows, int64_t k0, int64_t count, uint32_t* words, float* tile,
               int64_t ld) {
  const Attention& p = head.p;
  const int32_t* index = head.keys.index + k0;
  const int64_t valid = smaller(count, head.keys.count - k0);
  const bool run = index[valid - 1] - index[0] == valid - 1;
  const ScoreMask& mask = p.mask;
  const int64_t range = index[valid - 1] - index[0] + 1;
#if defined(LORASP_AVX512)
  const bool compresses = !run && mask.key == 1;
  uint32_t* kept = words + p.Sk / 32 + 2;
  if (compresses) {
    std::memset(kept, 0, static_cast<size_t>(range / 32 + 1) * sizeof(uint32_t));
    for (int64_t j = 0; j < valid; ++j) kept[(index[j] - index[0]) / 32] |= 1u << ((index[j] - index[0]) % 32);
  }
#endif
  bool any = false;
  for (int64_t r = 0; r < rows; ++r, tile += ld) {
    const int64_t i = q0 + r;
    const int64_t offset = head.b * mask.batch + head.h * mask.head + i * mask.row;
    float best = -kInfinity;
    const auto additive = [&](auto* data) {
      const auto* row = data + offset;
#if defined(LORASP_AVX512)
      if (compresses) return compress_row(row + index[0], kept, range, mask.hidden, tile);
#endif
      const bool straight = run && mask.key == 1;
      if (straight) row += index[0];
      for (int64_t j = 0; j < valid; ++j) {
        const float value = straight ? E::widen(row[j]) : E::widen(row[index[j] * mask.key]);
        tile[j] = value <= mask.hidden ? -kInfinity : value == value ? value : kInfinity;
      }
    };
    switch (mask.kind) {
      case ScoreMask::kNone:
        for (int64_t j = 0; j < valid; ++j) tile[j] = 0.0f;
        break;
      case ScoreMask::kBool: {
        const auto* row = static_cast<const uint8_t*>(mask.data) + offset;
#if defined(LORASP_AVX512)
        if (compresses) {
          compress_row(row + index[0], kept, range, -kInfinity, tile);
          break;
        }
#endif
        if (run && mask.key == 1) {
          row += index[0];
          for (int64_t j = 0; j < valid; ++j) tile[j] = row[j] ? 0.0f : -kInfinity;
        } else {
          for (int64_t j = 0; j < valid; ++j) tile[j] = row[index[j] * mask.key] ? 0.0f : -kInfinity;
        }
        break;
      }
      case ScoreMask::kF32:
        additive(static_cast<const float*>(mask.data));
        break;
      case ScoreMask::kBF16:
        additive(static_cast<const bf16*>(mask.data));
        break;
      case ScoreMask::kF16:
        additive(static_cast<const f16*>(mask.data));
        break;
    }
    for (int64_t j = valid; j < count; ++j) tile[j] = -kInfinity;
    if (p.elements) {
      const int64_t row = ((head.b * p.H + head.h) * p.Sq + i) * p.Sk;
      p.keep_bits(*p.elements, row + index[0], range, words);
      if (run) {
        for (int64_t j = 0; j < count; j += kWidth) vstore(tile + j, vhide(vload(tile + j), words[j / 32] >> (j % 32)));
      } else {
        for (int64_t j = 0; j < valid; ++j) {
          const int64_t bit = index[j] - index[0];
          if (!(words[bit / 32] >> (bit % 32) & 1)) tile[j] = -kInfinity;
        }
      }
    }
    if (head.keys.bias) {
      for (int64_t j = 0; j < valid; ++j) tile[j] += head.keys.bias[k0 + j];
    }
    vf top = vset(-kInfinity);
    for (int64_t j = 0; j < count; j += kWidth) top = vmax(top, vload(tile + j));
    best = vmax_all(top);
    any = any || best > -kInfinity;
  }
  return any;
}

// s = s * scale + bias, and -inf from each row's limit on. Panels are `rows` rows high.
template <class E>
void shape_logits(const Head<E>& head, float* s, int64_t rows, int64_t k0, int64_t count, const int64_t* limit,
                  const float* tile, int64_t ld) {
  if (head.transforms()) {
    const vf factor = vset(head.p.scale);
    for (int64_t j = 0; j < count; j += kPanelColumns) {
      float* panel = s + j * rows;
      for (int64_t r = 0; r < rows; ++r, panel += kPanelColumns) {
        for (int half = 0; half < kPanelColumns; half += kWidth) {
          vf bias = vzero();
          if (tile) {
            bias = vload(tile + r * ld + j + half);
          } else if (head.keys.bias) {
            bias = vload(head.keys.bias + k0 + j + half);
          }
          vstore(panel + half, vfma(vload(panel + half), factor, bias));
        }
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = limit[r] <= k0 ? 0 : limit[r] - k0; j < count; ++j)
      s[j / kPanelColumns * rows * kPanelColumns + r * kPanelColumns + j % kPanelColumns] = -kInfinity;
  }
}

// 2^(s * factor + base), both in two parts where it matters.
struct Exponent {
  vf high, low;

  // factor > 0. Both parts are positive: a hidden logit, -inf, stays -inf under both.
  explicit Exponent(double factor) {
    float rounded = static_cast<float>(factor);
    if (rounded >= factor) rounded = __builtin_nextafterf(rounded, 0.0f);
    const float rest = static_cast<float>(factor - static_cast<double>(rounded));
    high = vset(rounded);
    low = vset(rest > __FLT_MIN__ ? rest : __FLT_MIN__);
  }
  template <class E>
  vf power(vf s, vf base, vf base_low) const {
    vf x = fused(s, high, base);
    if constexpr (E::kFine) x = vadd(x, vfma(s, low, base_low));
    return vexp2<E::kFine>(x);
  }

 private:
  // The product is as large as the base: its rounding must not show.
  static vf fused(vf a, vf b, vf c) {
#if defined(LORASP_AVX512) || defined(LORASP_AVX2)
    return vfma(a, b, c);
#else
    for (int i = 0; i < kWidth; ++i) c[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
    return c;
#endif
  }
};

template <class E>
struct ForwardScratch {
  typename E::T *staged, *k, *v, *q, *probabilities;
  float *s, *o, *tile, *maximum, *sum;
  int64_t* limit;
  uint32_t* words;

  ForwardScratch(Carver& c, const Head<E>& head) {
    using T = typename E::T;
    staged = c.take<T>(kRows * (head.d > head.dv ? head.d : head.dv));
    k = c.take<T>(head.n * head.d);
    v = c.take<T>(head.n * head.dv);
    q = c.take<T>(kForwardQueries * head.d);
    probabilities = c.take<T>(kForwardQueries * kForwardKeys);
    s = c.take<float>(kForwardQueries * kForwardKeys);
    o = c.take<float>(kForwardQueries * head.dv);
    tile = c.take<float>(head.has_tiles() ? kForwardQueries * kForwardKeys + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + kForwardKeys / 32 : 0);
    maximum = c.take<float>(kForwardQueries);
    sum = c.take<float>(kForwardQueries);
    limit = c.take<int64_t>(kForwardQueries);
  }
};

// Few queries: keys and values are read once, where they lie.
constexpr int64_t kFewQueries = 4;

template <class E>
struct FewScratch {
  float *q, *s, *o, *piece, *tile;
  uint32_t* words;

  FewScratch(Carver& c, const Head<E>& head) {
    q = c.take<float>(head.d);
    s = c.take<float>(head.n + kForwardKeys);
    o = c.take<float>(head.dv);
    piece = c.take<float>(head.dv);
    tile = c.take<float>(head.has_tiles() ? kForwardKeys + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + kForwardKeys / 32 : 0);
  }
};

// sum (count) += weights[j] * row index[j] of v, for `keys` keys.
template <class S>
inline void add_weighted(const S* v, int64_t stride, const int32_t* index, const float* weights, int64_t keys,
                         int64_t count, float* sum) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= count; c += 4 * kWidth) {
    vf acc[4];
    for (int i = 0; i < 4; ++i) acc[i] = vload(sum + c + i * kWidth);
    for (int64_t j = 0; j < keys; ++j) {
      const S* row = v + index[j] * stride + c;
      const vf weight = vset(weights[j]);
      for (int i = 0; i < 4; ++i) acc[i] = vfma(weight, vload(row + i * kWidth), acc[i]);
    }
    for (int i = 0; i < 4; ++i) vstore(sum + c + i * kWidth, acc[i]);
  }
  for (; c < count; ++c)
    for (int64_t j = 0; j < keys; ++j) sum[c] += weights[j] * scalar(v[index[j] * stride + c]);
}

template <class E>
void forward_few(const Head<E>& head, void* memory) {
  using S = typename E::Source;
  const Attention& p = head.p;
  const int32_t* index = head.keys.index;
  Carver carver(memory);
  const FewScratch<E> w(carver, head);
  const S* k = head.rows(p.k, head.key_head);
  const S* v = head.rows(p.v, head.key_head);
  constexpr int64_t kPiece = 128;  // keys summed before they join o: the rounding of a library product
  for (int64_t i = 0; i < p.Sq; ++i) {
    const S* q = head.rows(p.q, head.h) + i * p.q.row;
    S* o = const_cast<S*>(head.rows(p.o, head.h)) + i * p.o.row;
    for (int64_t c = 0; c < p.D; ++c) w.q[c] = scalar(q[c]);
    const int64_t end = head.limit(i);
    float top = -kInfinity;
    for (int64_t k0 = 0; k0 < end; k0 += kForwardKeys) {
      const int64_t count = smaller(kForwardKeys, round_up(end - k0, kRows)), valid = smaller(count, end - k0);
      const bool tiled = head.has_tiles();
      if (tiled && !bias_tile<E>(head, i, 1, k0, count, w.words, w.tile, kForwardKeys)) {
        for (int64_t j = 0; j < count; ++j) w.s[k0 + j] = -kInfinity;
        continue;
      }
      for (int64_t j = 0; j < valid; ++j) {
        const S* row = k + index[k0 + j] * p.k.row;
        vf even = vzero(), odd = vzero();
        int64_t c = 0;
        for (; c + 2 * kWidth <= p.D; c += 2 * kWidth) {
          even = vfma(vload(row + c), vload(w.q + c), even);
          odd = vfma(vload(row + c + kWidth), vload(w.q + c + kWidth), odd);
        }
        float dot = vsum(vadd(even, odd));
        for (; c < p.D; ++c) dot += scalar(row[c]) * w.q[c];
        float z = dot * p.scale;
        if (tiled) {
          z += w.tile[j];
        } else if (head.keys.bias) {
          z += head.keys.bias[k0 + j];
        }
        w.s[k0 + j] = z;
        top = z > top || z != z ? z : top;
      }
      for (int64_t j = valid; j < count; ++j) w.s[k0 + j] = -kInfinity;
    }
    const Exponent exponent(kLog2e);
    const double base = top == -kInfinity ? 0.0 : -kLog2e * top;
    const vf high = vset(static_cast<float>(base)), low = vset(static_cast<float>(base - static_cast<float>(base)));
    vf sums = vzero();
    for (int64_t j = 0; j < end; j += kWidth) {
      const vf weights = exponent.power<E>(vload(w.s + j), high, low);
      vstore(w.s + j, weights);
      sums = vadd(sums, weights);
    }
    const float sum = vsum(sums);
    float* lse = p.lse + (head.b * p.H + head.h) * p.Sq + i;
    *lse = sum == 0.0f ? -kInfinity : static_cast<float>(top + __builtin_log(sum));
    std::memset(w.o, 0, static_cast<size_t>(head.dv) * sizeof(float));
    for (int64_t j = 0; j < end; j += kPiece) {
      std::memset(w.piece, 0, static_cast<size_t>(head.dv) * sizeof(float));
      add_weighted(v, p.v.row, index + j, w.s + j, smaller(kPiece, end - j), p.Dv, w.piece);
      for (int64_t c = 0; c < head.dv; c += kWidth) vstore(w.o + c, vadd(vload(w.o + c), vload(w.piece + c)));
    }
    const vf factor = vset(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t c = 0; c < head.dv; c += kWidth) vstore(w.o + c, vmul(vload(w.o + c), factor));
    E::round_row(w.o, p.Dv, o);
  }
}

template <class E>
size_t forward_bytes(const Attention& p, int64_t keys) {
  Carver carver(nullptr);
  const KeyList list{nullptr, keys, nullptr};
  if (p.Sq <= kFewQueries) {
    FewScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
    return carver.bytes();
  }
  ForwardScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
  return carver.bytes();
}

// One row of a block: p = 2^(s * factor - m), its sum, and o rescaled where m moved.
template <class E>
inline void softmax_row(const ForwardScratch<E>& w, int64_t r, int64_t rows, int64_t count, double factor, int64_t dv,
                        bool first) {
  const float* s = w.s + r * kPanelColumns;
  const int64_t next = rows * kPanelColumns;
  vf top0 = vset(-kInfinity), top1 = top0;
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    top0 = vmax(top0, vload(s + j * rows));
    top1 = vmax(top1, vload(s + j * rows + kWidth));
  }
  const float top = vmax_all(vmax(top0, top1)) * static_cast<float>(factor);
  float m = w.maximum[r];
  if (first || m == -kInfinity) {
    m = top;
  } else if (top > m + kSlack) {
    const float shrink = __builtin_exp2f(m - top);
    w.sum[r] *= shrink;
    float* o = w.o + r * kPanelColumns;
    for (int64_t c = 0; c < dv; c += kPanelColumns, o += next) {
      vstore(o, vmul(vload(o), vset(shrink)));
      vstore(o + kWidth, vmul(vload(o + kWidth), vset(shrink)));
    }
    m = top;
  }
  w.maximum[r] = m;
  const Exponent exponent(factor);
  const vf base = vset(m == -kInfinity ? 0.0f : -m);
  vf sum0 = vzero(), sum1 = vzero();
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    const vf p0 = exponent.power<E>(vload(s + j * rows), base, vzero());
    const vf p1 = exponent.power<E>(vload(s + j * rows + kWidth), base, vzero());
    sum0 = vadd(sum0, p0);
    sum1 = vadd(sum1, p1);
    E::store_a(w.probabilities, rows, r, j, p0, p1);
  }
  w.sum[r] = (first ? 0.0f : w.sum[r]) + vsum(vadd(sum0, sum1));
}

template <class E>
void forward(const Attention& p, const KeyList& keys, const Share& share, void* memory) {
  const Head<E> head(p, keys, share.b, share.h);
  if (p.Sq <= kFewQueries) return forward_few<E>(head, memory);
  Carver carver(memory);
  const ForwardScratch<E> w(carver, head);
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, nullptr);
  pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, nullptr, w.v);
  const auto* q_rows = head.rows(p.q, share.h);
  auto* o_rows = const_cast<typename E::Source*>(head.rows(p.o, share.h));
  float* lse = p.lse + (share.b * p.H + share.h) * p.Sq;
  for (int64_t block = share.first; block * kForwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kForwardQueries, valid = smaller(kForwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, E::kMR);
    for (int64_t r = 0; r < rows; r += kRows) {
      stage<E>(q_rows + (q0 + r) * p.q.row, p.q.row, nullptr, smaller(kRows, valid - r), p.D, head.d, w.staged);
      E::pack_a(w.staged, head.d, smaller(kRows, rows - r), w.q + r * E::kStep, rows);
    }
    for (int64_t r = 0; r < rows; ++r) w.limit[r] = head.limit(smaller(q0 + r, p.Sq - 1));
    const int64_t end = w.limit[rows - 1];
    bool first = true;
    for (int64_t k0 = 0; k0 < end; k0 += kForwardKeys) {
      const int64_t count = smaller(kForwardKeys, round_up(end - k0, kRows));
      const float* tile = nullptr;
      if (head.has_tiles()) {
        if (!bias_tile<E>(head, q0, valid, k0, count, w.words, w.tile, kForwardKeys)) continue;
        for (int64_t r = valid; r < rows; ++r)
          std::memset(w.tile + r * kForwardKeys, 0, static_cast<size_t>(count) * sizeof(float));
        tile = w.tile;
      }
      E::multiply(w.q, rows, rows, w.k + k0 * head.d, head.d * kPanelColumns, count / kPanelColumns, head.d / E::kStep,
                  false, w.s, rows * kPanelColumns);
      shape_logits<E>(head, w.s, rows, k0, count, w.limit, tile, kForwardKeys);
      for (int64_t r = 0; r < rows; ++r) softmax_row<E>(w, r, rows, count, head.factor, head.dv, first);
      E::multiply(w.probabilities, rows, rows, w.v + k0 * kPanelColumns, head.n * kPanelColumns,
                  head.dv / kPanelColumns, count / E::kStep, !first, w.o, rows * kPanelColumns);
      first = false;
    }
    for (int64_t r = 0; r < valid; ++r) {
      const float sum = first ? 0.0f : w.sum[r];
      const bool empty = sum == 0.0f;
      if (empty) {
        std::memset(o_rows + (q0 + r) * p.o.row, 0, static_cast<size_t>(p.Dv) * sizeof(typename E::Source));
        lse[q0 + r] = -kInfinity;
      } else {
        E::store_row(w.o + r * kPanelColumns, rows * kPanelColumns, p.Dv, 1.0f / sum, o_rows + (q0 + r) * p.o.row);
        lse[q0 + r] = static_cast<float>(w.maximum[r] * kLn2 + __builtin_log(sum));
      }
    }
  }
  E::leave();
}

template <class E>
struct BackwardScratch {
  typename E::T *staged, *k, *v, *k_plain, *q, *grad_o, *q_columns, *grad_o_columns, *p, *dz, *dz_rows;
  float *s, *dp, *dq, *dk, *dv, *tile, *delta;
  float *base, *base_low;  // -lse log2 e in two parts; -inf where a query sees nothing
  int64_t* limit;
  uint32_t* words;

  BackwardScratch(Carver& c, const Head<E>& head) {
    using T = typename E::T;
    constexpr int64_t Q = kBackwardQueries, K = kBackwardKeys;
    staged = c.take<T>(2 * kRows * (head.d > head.dv ? head.d : head.dv));
    k = c.take<T>(head.n * head.d);
    v = c.take<T>(head.n * head.dv);
    k_plain = c.take<T>(head.n * head.d);
    q = c.take<T>(Q * head.d);
    q_columns = c.take<T>(Q * head.d);
    grad_o = c.take<T>(Q * head.dv);
    grad_o_columns = c.take<T>(Q * head.dv);
    p = c.take<T>(Q * K);
    dz = c.take<T>(Q * K);
    dz_rows = c.take<T>(Q * K);
    s = c.take<float>(kRows * K);
    dp = c.take<float>(kRows * K);
    dq = c.take<float>(Q * head.d);
    dk = c.take<float>(head.n * head.d);
    dv = c.take<float>(head.n * head.dv);
    tile = c.take<float>(head.has_tiles() ? kRows * K + 16 : 0);
    words = c.take<uint32_t>(head.has_tiles() ? 2 * (head.p.Sk / 32 + 2) + K / 32 : 0);
    base = c.take<float>(Q);
    base_low = c.take<float>(Q);
    delta = c.take<float>(Q);
    limit = c.take<int64_t>(Q);
  }
};

template <class E>
size_t backward_bytes(const Attention& p, int64_t keys) {
  Carver carver(nullptr);
  const KeyList list{nullptr, keys, nullptr};
  BackwardScratch<E> scratch(carver, Head<E>(p, list, 0, 0));
  return carver.bytes();
}

// The queries' operands and row statistics of one block of `rows` (a multiple of kRows) rows.
template <class E>
void pack_queries(const Head<E>& head, const BackwardScratch<E>& w, int64_t q0, int64_t valid, int64_t rows) {
  const Attention& p = head.p;
  const auto* q_rows = head.rows(p.q, head.h);
  const auto* o_rows = head.rows(p.o, head.h);
  const auto* grad_rows = head.rows(p.grad_o, head.h);
  const float* lse = p.lse + (head.b * p.H + head.h) * p.Sq;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t i = q0 + r, count = smaller(kRows, valid - r);
    stage<E>(q_rows + i * p.q.row, p.q.row, nullptr, count, p.D, head.d, w.staged);
    E::pack_a(w.staged, head.d, kRows, w.q + r * E::kStep, rows);
    E::pack_a_transposed(w.staged, head.d, w.q_columns + r * head.d);
    stage<E>(grad_rows + i * p.grad_o.row, p.grad_o.row, nullptr, count, p.Dv, head.dv, w.staged);
    E::pack_a(w.staged, head.dv, kRows, w.grad_o + r * E::kStep, rows);
    E::pack_a_transposed(w.staged, head.dv, w.grad_o_columns + r * head.dv);
    typename E::T* staged_o = w.staged + kRows * head.dv;
    stage<E>(o_rows + i * p.o.row, p.o.row, nullptr, count, p.Dv, head.dv, staged_o);
    for (int64_t m = 0; m < kRows; ++m) {
      const float row_lse = m < count ? lse[i + m] : -kInfinity;
      const double base = row_lse == -kInfinity ? row_lse : -kLog2e * row_lse;
      w.base[r + m] = static_cast<float>(base);
      w.base_low[r + m] = row_lse == -kInfinity ? 0.0f : static_cast<float>(base - static_cast<double>(w.base[r + m]));
      w.delta[r + m] = E::dot(w.staged + m * head.dv, staged_o + m * head.dv, head.dv);
      w.limit[r + m] = head.limit(smaller(i + m, p.Sq - 1));
    }
  }
}

// p = exp(z - lse) and dz = p o (dp - delta) of kRows queries from row r of the block, as products take them.
template <class E>
void differentiate(const BackwardScratch<E>& w, int64_t r, int64_t rows, int64_t count, double factor, bool need_dz) {
  const Exponent exponent(factor);
  for (int64_t j = 0; j < count; j += kPanelColumns) {
    float* s = w.s + j * kRows;
    const float* dp = w.dp + j * kRows;
    typename E::T* p_panel = w.p + j * rows;
    typename E::T* dz_panel = w.dz + j * rows;
    for (int64_t m = 0; m < kRows; m += 2, s += 2 * kPanelColumns, dp += 2 * kPanelColumns) {
      const vf base0 = vset(w.base[r + m]), base1 = vset(w.base[r + m + 1]);
      const vf low0 = vset(w.base_low[r + m]), low1 = vset(w.base_low[r + m + 1]);
      const vf p00 = exponent.power<E>(vload(s), base0, low0);
      const vf p01 = exponent.power<E>(vload(s + kWidth), base0, low0);
      const vf p10 = exponent.power<E>(vload(s + kPanelColumns), base1, low1);
      const vf p11 = exponent.power<E>(vload(s + kPanelColumns + kWidth), base1, low1);
      E::store_b(p_panel, r + m, p00, p01, p10, p11);
      if (!need_dz) continue;
      const vf delta0 = vset(-w.delta[r + m]), delta1 = vset(-w.delta[r + m + 1]);
      const vf dz00 = vmul(p00, vadd(vload(dp), delta0)), dz01 = vmul(p01, vadd(vload(dp + kWidth), delta0));
      const vf dz10 = vmul(p10, vadd(vload(dp + kPanelColumns), delta1));
      const vf dz11 = vmul(p11, vadd(vload(dp + kPanelColumns + kWidth), delta1));
      E::store_both(dz_panel, w.dz_rows, rows, r + m, j, dz00, dz01, dz10, dz11);
    }
  }
}

// Logits and dp of kRows queries from row r of the block at q0; false where none is visible.
template <class E>
bool scores(const Head<E>& head, const BackwardScratch<E>& w, int64_t q0, int64_t valid, int64_t r, int64_t rows,
            int64_t k0, int64_t count, bool need_dp) {
  const float* tile = nullptr;
  if (head.has_tiles()) {
    const int64_t tile_rows = smaller(kRows, valid - r);
    if (!bias_tile<E>(head, q0 + r, tile_rows, k0, count, w.words, w.tile, kBackwardKeys)) return false;
    for (int64_t m = tile_rows; m < kRows; ++m)
      std::memset(w.tile + m * kBackwardKeys, 0, static_cast<size_t>(count) * sizeof(float));
    tile = w.tile;
  }
  E::multiply(w.q + r * E::kStep, rows, kRows, w.k + k0 * head.d, head.d * kPanelColumns, count / kPanelColumns,
              head.d / E::kStep, false, w.s, kRows * kPanelColumns);
  shape_logits<E>(head, w.s, kRows, k0, count, w.limit + r, tile, kBackwardKeys);
  if (need_dp)
    E::multiply(w.grad_o + r * E::kStep, rows, kRows, w.v + k0 * head.dv, head.dv * kPanelColumns,
                count / kPanelColumns, head.dv / E::kStep, false, w.dp, kRows * kPanelColumns);
  return true;
}

// Adds the transposed accumulators (D, n) to the rows of the keys they belong to.
template <class E>
void add_rows(const Head<E>& head, const float* accumulator, int64_t cols, int64_t padded, float factor, float* out) {
  float block[16 * 16];
  for (int64_t j = 0; j < head.keys.count; j += kPanelColumns) {
    const float* panel = accumulator + j * padded;
    for (int64_t c = 0; c < cols; c += 16) {
      const int64_t width = smaller(16, cols - c);
      for (int64_t first = 0; first < kPanelColumns; first += 16) {
        const int64_t columns = smaller(16, kPanelColumns - first);
        E::transpose(panel + c * kPanelColumns + first, kPanelColumns, columns, block);
        for (int64_t m = 0; m < columns; ++m) {
          const int64_t key = j + E::column(first + m);
          if (key >= head.keys.count) continue;
          float* row = out + head.keys.index[key] * cols + c;
          for (int64_t x = 0; x < width; ++x) row[x] += factor * block[m * 16 + x];
        }
      }
    }
  }
}

template <class E>
void backward(const Attention& p, const KeyList& keys, const Share& share, const Gradients& out, void* memory) {
  using T = typename E::T;
  const Head<E> head(p, keys, share.b, share.h);
  Carver carver(memory);
  const BackwardScratch<E> w(carver, head);
  const bool need_dz = out.dq || out.dk;
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, out.dq ? w.k_plain : nullptr);
  if (need_dz) pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, w.v, nullptr);
  if (out.dk) std::memset(w.dk, 0, static_cast<size_t>(head.n * head.d) * sizeof(float));
  if (out.dv) std::memset(w.dv, 0, static_cast<size_t>(head.n * head.dv) * sizeof(float));
  for (int64_t block = share.first; block * kBackwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kBackwardQueries, valid = smaller(kBackwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, kRows);
    pack_queries<E>(head, w, q0, valid, rows);
    if (out.dq) std::memset(w.dq, 0, static_cast<size_t>(rows * head.d) * sizeof(float));
    const int64_t end = w.limit[rows - 1];
    for (int64_t k0 = 0; k0 < end; k0 += kBackwardKeys) {
      const int64_t count = smaller(kBackwardKeys, round_up(end - k0, kRows));
      int64_t start = 0;  // rows before it see nothing of this block
      while (start + kRows < rows && w.limit[start + kRows - 1] <= k0) start += kRows;
      bool any = false;
      for (int64_t r = start; r < rows; r += kRows) {
        if (scores<E>(head, w, q0, valid, r, rows, k0, count, need_dz)) {
          differentiate<E>(w, r, rows, count, head.factor, need_dz);
          any = true;
          continue;
        }
        for (int64_t j = 0; j < count; j += kPanelColumns) {
          std::memset(w.p + j * rows + r * kPanelColumns, 0, sizeof(T) * kRows * kPanelColumns);
          if (need_dz) std::memset(w.dz + j * rows + r * kPanelColumns, 0, sizeof(T) * kRows * kPanelColumns);
        }
        if (need_dz) {
          for (int64_t j = 0; j < count; j += E::kStep)
            std::memset(w.dz_rows + j * rows + r * E::kStep, 0, sizeof(T) * kRows * E::kStep);
        }
      }
      if (!any) continue;
      const int64_t steps = (rows - start) / E::kStep, panels = count / kPanelColumns;
      if (out.dv)
        E::multiply(w.grad_o_columns + start * head.dv, head.dv, head.dv, w.p + start * kPanelColumns,
                    rows * kPanelColumns, panels, steps, true, w.dv + k0 * head.dv, head.dv * kPanelColumns);
      if (out.dk)
        E::multiply(w.q_columns + start * head.d, head.d, head.d, w.dz + start * kPanelColumns, rows * kPanelColumns,
                    panels, steps, true, w.dk + k0 * head.d, head.d * kPanelColumns);
      if (out.dq)
        E::multiply(w.dz_rows + start * E::kStep, rows, rows - start, w.k_plain + k0 * kPanelColumns,
                    head.n * kPanelColumns, head.d / kPanelColumns, count / E::kStep, true,
                    w.dq + start * kPanelColumns, rows * kPanelColumns);
    }
    if (out.dq) {
      auto* dq = static_cast<typename E::Source*>(out.dq);
      for (int64_t r = 0; r < valid; ++r)
        E::store_row(w.dq + r * kPanelColumns, rows * kPanelColumns, p.D, p.scale, dq + (q0 + r) * out.dq_row);
    }
  }
  if (out.dk) add_rows<E>(head, w.dk, p.D, head.d, p.scale, out.dk);
  if (out.dv) add_rows<E>(head, w.dv, p.Dv, head.dv, 1.0f, out.dv);
  E::leave();
}

template <class E>
void mask_gradient(const Attention& p, const KeyList& keys, const Share& share, const MaskGradient& out, void* memory) {
  const Head<E> head(p, keys, share.b, share.h);
  Carver carver(memory);
  const BackwardScratch<E> w(carver, head);
  E::enter();
  pack_keys<E>(head, p.k, p.D, head.d, w.staged, w.k, nullptr);
  pack_keys<E>(head, p.v, p.Dv, head.dv, w.staged, w.v, nullptr);
  const Exponent exponent(head.factor);
  for (int64_t block = share.first; block * kBackwardQueries < p.Sq; block += share.step) {
    const int64_t q0 = block * kBackwardQueries, valid = smaller(kBackwardQueries, p.Sq - q0);
    const int64_t rows = round_up(valid, kRows);
    pack_queries<E>(head, w, q0, valid, rows);
    for (int64_t k0 = 0; k0 < w.limit[rows - 1]; k0 += kBackwardKeys) {
      const int64_t count = smaller(kBackwardKeys, round_up(w.limit[rows - 1] - k0, kRows));
      for (int64_t r = 0; r < rows; r += kRows) {
        if (!scores<E>(head, w, q0, valid, r, rows, k0, count, true)) continue;
        for (int64_t m = 0; m < smaller(kRows, valid - r); ++m) {
          const vf base = vset(w.base[r + m]), low = vset(w.base_low[r + m]), delta = vset(-w.delta[r + m]);
          float dz[kBackwardKeys];
          for (int64_t j = 0; j < count; j += kWidth) {
            const int64_t at = (j / kPanelColumns * kRows + m) * kPanelColumns + j % kPanelColumns;
            const vf p_lanes = exponent.power<E>(vload(w.s + at), base, low);
            vstore(dz + j, vmul(p_lanes, vadd(vload(w.dp + at), delta)));
          }
          float* row = out.data + (q0 + r + m) * out.row;
          const int64_t last = smaller(count, keys.count - k0);
          const int32_t* index = keys.index + k0;
          if (out.key == 1 && index[last - 1] - index[0] == last - 1) {
            for (int64_t j = 0; j < last; ++j) row[index[0] + j] += dz[j];
          } else {
            for (int64_t j = 0; j < last; ++j) row[index[j] * out.key] += dz[j];
          }
        }
      }
    }
  }
  E::leave();
}

template <class E>
void round_rows(const float* in, int64_t rows, int64_t cols, void* out, int64_t out_row) {
  auto* row = static_cast<typename E::Source*>(out);
  for (int64_t r = 0; r < rows; ++r, in += cols, row += out_row) E::round_row(in, cols, row);
}

template <class E>
constexpr AttentionKernels make_attention() {
  return {kForwardQueries,   kBackwardQueries, forward_bytes<E>, forward<E>,
          backward_bytes<E>, backward<E>,      mask_gradient<E>, round_rows<E>};
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
