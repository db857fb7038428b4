// The skinny products in terms of vector lanes. Included once per instruction set, after its simd_*.h. A Dot says how
// elements are loaded, paired and multiplied: kPair elements along the reduced dimension share one 32-bit lane;
// products are summed in fp32.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline uint32_t low_bits(int64_t count) { return count >= 32 ? ~0u : (1u << count) - 1u; }
inline uint32_t bits_at(const uint32_t* bits, int64_t c) { return bits[c / 32] >> (c % 32); }

constexpr uint8_t kNaturalOrder[kPanel] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                           16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Elements are widened to fp32 as they are loaded.
template <class T>
struct Wide {
  using X = T;
  using W = float;
  using Lane = float;
  using Frag = vf2;
  static constexpr const uint8_t* kPanelOrder = kNaturalOrder;
  static constexpr int kPair = 1;
  static constexpr int kStep = 2 * kWidth;

  static Frag load(const T* p) { return vload2(p); }
  static Frag load(const T* p, uint32_t bits) { return vload2(p, bits); }
  static Frag load_tail(const T* p, int64_t count, uint32_t bits) { return vload2_tail(p, count, bits); }
  static void store_weight(W* p, Frag w) {
    vstore(p, w.a);
    vstore(p + kWidth, w.b);
  }
  static vf dot(Frag x, const W* w, vf acc) { return vfma(x.b, vload(w + kWidth), vfma(x.a, vload(w), acc)); }
  static vf madd(vf acc, vf lanes, Lane scalar) { return vfma(lanes, vset(scalar), acc); }

  // (rows, R) as lanes for update, paired along R, and for outer, paired along the rows.
  static void pack_rows(const T* s, int64_t rows, int64_t R, Lane* out) {
    const int64_t count = rows * R;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) vstore(out + i, vload(s + i));
    if (i < count) {
      T padded[kWidth] = {};
      float wide[kWidth];
      std::memcpy(padded, s + i, static_cast<size_t>(count - i) * sizeof(T));
      vstore(wide, vload(padded));
      std::memcpy(out + i, wide, static_cast<size_t>(count - i) * sizeof(float));
    }
  }
  static void pack_columns(const T* s, int64_t rows, int64_t R, Lane* out) { pack_rows(s, rows, R, out); }
  static void pack_panel(const T (*rows)[kPanel], Lane* out) {
    for (int j = 0; j < kPanel; j += kWidth) vstore(out + j, vload(rows[0] + j));
  }

  // kPanel columns of the kPair rows that start at row m as lanes, in the order of kPanelOrder.
  static void stage(const Block& x, int64_t m, int64_t c, Lane* out) {
    const T* row = static_cast<const T*>(x.data) + m * x.ld + c;
    const int64_t cols = least(kPanel, x.cols - c);
    T padded[kPanel];
    if (cols < kPanel) {
      std::memset(padded, 0, sizeof padded);
      std::memcpy(padded, row, static_cast<size_t>(cols) * sizeof(T));
      row = padded;
    }
    const uint32_t bits = x.bits ? x.bits[m * kMaskWords + c / 32] : 0;
    for (int j = 0; j < kPanel; j += kWidth) {
      const vf v = vload(row + j);
      vstore(out + j, x.bits ? vkeep(v, bits >> j) : v);
    }
  }
};

// rowdot: x and w meet along the columns, both contiguous there.

template <class Dot>
size_t rowdot_bytes(int64_t cols, int64_t R) {
  return static_cast<size_t>(round_up(cols, Dot::kStep) * R) * sizeof(typename Dot::W);
}

template <class Dot>
void pack_rowdot(const Factor& w, int64_t cols, int64_t R, void* packed) {
  using T = typename Dot::X;
  auto* out = static_cast<typename Dot::W*>(packed);
  for (int64_t r = 0; r < R; ++r) {
    const T* row = static_cast<const T*>(w.data) + r * w.stride_r;
    for (int64_t c = 0; c < cols; c += Dot::kStep, out += Dot::kStep) {
      const int64_t count = least(Dot::kStep, cols - c);
      if (w.stride_c == 1) {
        Dot::store_weight(out,
                          count == Dot::kStep ? Dot::load(row + c) : Dot::load_tail(row + c, count, low_bits(count)));
        continue;
      }
      T column[Dot::kStep] = {};
      for (int64_t j = 0; j < count; ++j) column[j] = row[(c + j) * w.stride_c];
      Dot::store_weight(out, Dot::load(column));
    }
  }
}

template <class Dot, int MR, int NR, bool kMasked>
void dot_tile(const typename Dot::X* x, int64_t ld, const uint32_t* bits, int64_t cols, const typename Dot::W* w,
              int64_t ldw, float* out, int64_t ldo) {
  vf acc[MR][NR];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j) acc[i][j] = vzero();
  int64_t c = 0;
  typename Dot::Frag frag[MR];
  for (; c + Dot::kStep <= cols; c += Dot::kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
      frag[i] = kMasked ? Dot::load(x + i * ld + c, bits_at(bits + i * kMaskWords, c)) : Dot::load(x + i * ld + c);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][j] = Dot::dot(frag[i], w + j * ldw + c, acc[i][j]);
  }
  if (c < cols) {
    const uint32_t valid = low_bits(cols - c);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const uint32_t keep = kMasked ? bits_at(bits + i * kMaskWords, c) & valid : valid;
      frag[i] = Dot::load_tail(x + i * ld + c, cols - c, keep);
    }
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[i][j] = Dot::dot(frag[i], w + j * ldw + c, acc[i][j]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) out[i * ldo + j] += vsum(acc[i][j]);
}

template <class Dot, int MR, int NR, bool kMasked>
void dot_ranks(const typename Dot::X* x, int64_t ld, const uint32_t* bits, int64_t cols, const typename Dot::W* w,
               int64_t ldw, int64_t ranks, float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + NR <= ranks; r += NR) dot_tile<Dot, MR, NR, kMasked>(x, ld, bits, cols, w + r * ldw, ldw, out + r, ldo);
  if constexpr (NR > 1) {
    if (r < ranks) dot_ranks<Dot, MR, NR / 2, kMasked>(x, ld, bits, cols, w + r * ldw, ldw, ranks - r, out + r, ldo);
  }
}

template <class Dot, int MR, bool kMasked>
void dot_rows(const Block& x, int64_t c, int64_t cols, int64_t m, int64_t rows, const typename Dot::W* w, int64_t ldw,
              int64_t ranks, float* out, int64_t ldo) {
  const auto* data = static_cast<const typename Dot::X*>(x.data) + c;
  for (; rows >= MR; m += MR, rows -= MR) {
    const uint32_t* bits = kMasked ? x.bits + m * kMaskWords + c / 32 : nullptr;
    dot_ranks<Dot, MR, kDotRanks, kMasked>(data + m * x.ld, x.ld, bits, cols, w + c, ldw, ranks, out + m * ldo, ldo);
  }
  if constexpr (MR > 1) {
    if (rows > 0) dot_rows<Dot, MR / 2, kMasked>(x, c, cols, m, rows, w, ldw, ranks, out, ldo);
  }
}

template <class Dot>
void rowdot(const Block& x, const void* packed, int64_t R, bool accumulate, float* out, void*) {
  constexpr int64_t kCols = 512, kRows = 8;  // 8 rows and 4 ranks of 512 columns stay in L1
  const auto* w = static_cast<const typename Dot::W*>(packed);
  const int64_t ldw = round_up(x.cols, Dot::kStep);
  if (!accumulate) std::memset(out, 0, static_cast<size_t>(x.rows * R) * sizeof(float));
  for (int64_t c = 0; c < x.cols; c += kCols) {
    const int64_t cols = least(kCols, x.cols - c);
    for (int64_t m = 0; m < x.rows; m += kRows) {
      const int64_t rows = least(kRows, x.rows - m);
      for (int64_t r = 0; r < R; r += kDotRanks) {
        const int64_t ranks = least(kDotRanks, R - r);
        if (x.bits) {
          dot_rows<Dot, kDotRows, true>(x, c, cols, m, rows, w + r * ldw, ldw, ranks, out + r, R);
        } else {
          dot_rows<Dot, kDotRows, false>(x, c, cols, m, rows, w + r * ldw, ldw, ranks, out + r, R);
        }
      }
    }
  }
}

// update and outer: a panel of kPanel columns, C (MI, kPanel) += L (MI, Q) P (Q, kPanel), L broadcast lane by lane.

template <class Dot, int MI>
inline void panel_product(const typename Dot::Lane* l, int64_t stride_i, int64_t stride_q, int64_t Q,
                          const typename Dot::Lane* p, vf (&acc)[MI][kPanelVectors]) {
  for (int64_t q = 0; q < Q; ++q) {
    vf lanes[kPanelVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v)
      lanes[v] = vload(reinterpret_cast<const float*>(p + q * kPanel) + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < MI; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v)
        acc[i][v] = Dot::madd(acc[i][v], lanes[v], l[i * stride_i + q * stride_q]);
    }
  }
}

template <class Dot>
int64_t factor_lanes(int64_t R) {
  return ceil_div(R, Dot::kPair);
}

template <class Dot>
size_t update_bytes(int64_t cols, int64_t R) {
  return static_cast<size_t>(round_up(cols, kPanel) * factor_lanes<Dot>(R)) * sizeof(typename Dot::Lane);
}

// Panels of (lanes of R, kPanel).
template <class Dot>
void pack_update(const Factor& w, int64_t cols, int64_t R, void* packed) {
  using T = typename Dot::X;
  auto* out = static_cast<typename Dot::Lane*>(packed);
  for (int64_t c = 0; c < cols; c += kPanel) {
    const int64_t count = least(kPanel, cols - c);
    for (int64_t r = 0; r < R; r += Dot::kPair, out += kPanel) {
      T rows[Dot::kPair][kPanel] = {};
      for (int64_t pair = 0; pair < least(Dot::kPair, R - r); ++pair) {
        const T* row = static_cast<const T*>(w.data) + (r + pair) * w.stride_r + c * w.stride_c;
        if (w.stride_c == 1) {
          std::memcpy(rows[pair], row, static_cast<size_t>(count) * sizeof(T));
        } else {
          for (int64_t j = 0; j < count; ++j) rows[pair][j] = row[j * w.stride_c];
        }
      }
      Dot::pack_panel(rows, out);
    }
  }
}

template <class Dot, int MI>
void update_rows(typename Dot::X* y, int64_t ld, const uint32_t* bits, int64_t rows, int64_t cols,
                 const typename Dot::Lane* s, int64_t lds, const typename Dot::Lane* p) {
  using T = typename Dot::X;
  for (; rows >= MI; rows -= MI, y += MI * ld, s += MI * lds, bits += bits ? MI * kMaskWords : 0) {
    for (int c = 0; c < cols; c += kPanelVectors * kWidth) {
      vf acc[MI][kPanelVectors];
      for (int i = 0; i < MI; ++i)
        for (int v = 0; v < kPanelVectors; ++v) acc[i][v] = vzero();
      panel_product<Dot, MI>(s, lds, 1, lds, p + c, acc);
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i) {
        T* row = y + i * ld + c;
        T padded[kPanelVectors * kWidth];
        const int64_t count = least(kPanelVectors * kWidth, cols - c);
        T* target = row;
        if (count < kPanelVectors * kWidth) {
          std::memset(padded, 0, sizeof padded);
          std::memcpy(padded, row, static_cast<size_t>(count) * sizeof(T));
          target = padded;
        }
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) {
          const vf added = bits ? vkeep(acc[i][v], bits[i * kMaskWords] >> (c + v * kWidth)) : acc[i][v];
          vstore(target + v * kWidth, vadd(vload(target + v * kWidth), added));
        }
        if (target == padded) std::memcpy(row, padded, static_cast<size_t>(count) * sizeof(T));
      }
    }
  }
  if constexpr (MI > 1) {
    if (rows > 0) update_rows<Dot, MI / 2>(y, ld, bits, rows, cols, s, lds, p);
  }
}

template <class Dot>
void update(const Block& y, const void* s, const void* packed, int64_t R, void* scratch) {
  using T = typename Dot::X;
  constexpr int64_t kCols = 256, kRows = kPanelRows;
  const int64_t lanes = factor_lanes<Dot>(R);
  auto* wide = static_cast<typename Dot::Lane*>(scratch);  // (rows, lanes)
  Dot::pack_rows(static_cast<const T*>(s), y.rows, R, wide);
  for (int64_t c0 = 0; c0 < y.cols; c0 += kCols) {
    for (int64_t m = 0; m < y.rows; m += kRows) {
      for (int64_t c = c0; c < least(c0 + kCols, y.cols); c += kPanel) {
        update_rows<Dot, kPanelRows>(static_cast<T*>(y.data) + m * y.ld + c, y.ld,
                                     y.bits ? y.bits + m * kMaskWords + c / 32 : nullptr, least(kRows, y.rows - m),
                                     least(kPanel, y.cols - c), wide + m * lanes, lanes,
                                     static_cast<const typename Dot::Lane*>(packed) + c * lanes);
      }
    }
  }
}

template <class Dot, int MI>
void outer_ranks(const typename Dot::Lane* s, int64_t lds, int64_t Q, int64_t ranks, const typename Dot::Lane* staged,
                 bool accumulate, float* acc_panel) {
  for (; ranks >= MI; ranks -= MI, s += MI, acc_panel += MI * kPanel) {
    for (int c = 0; c < kPanel; c += kPanelVectors * kWidth) {
      vf acc[MI][kPanelVectors];
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i)
        for (int v = 0; v < kPanelVectors; ++v) acc[i][v] = vzero();
      panel_product<Dot, MI>(s, 1, lds, Q, staged + c, acc);
#pragma GCC unroll 8
      for (int i = 0; i < MI; ++i)
        for (int v = 0; v < kPanelVectors; ++v) {
          // Blocks of rows are summed apart: one fp32 chain over all of M would round several times worse.
          float* out = acc_panel + i * kPanel + c + v * kWidth;
          vstore(out, accumulate ? vadd(vload(out), acc[i][v]) : acc[i][v]);
        }
    }
  }
  if constexpr (MI > 1) {
    if (ranks > 0) outer_ranks<Dot, MI / 2>(s, lds, Q, ranks, staged, accumulate, acc_panel);
  }
}

template <class Dot>
void outer(const Block& x, const void* s, int64_t R, bool accumulate, float* acc, void* scratch) {
  using Lane = typename Dot::Lane;
  Lane staged[kBlockM / Dot::kPair * kPanel];
  auto* columns = static_cast<Lane*>(scratch);  // (rows / kPair, R)
  const int64_t Q = ceil_div(x.rows, Dot::kPair);
  Dot::pack_columns(static_cast<const typename Dot::X*>(s), x.rows, R, columns);
  for (int64_t c = 0; c < x.cols; c += kPanel, acc += rank_padded(R) * kPanel) {
    for (int64_t q = 0; q < Q; ++q) Dot::stage(x, q * Dot::kPair, c, staged + q * kPanel);
    outer_ranks<Dot, kPanelRows>(columns, R, Q, R, staged, accumulate, acc);
  }
}

template <class Dot>
size_t scratch_bytes(int64_t R) {
  return static_cast<size_t>(kBlockM * R) * sizeof(typename Dot::Lane);
}

template <class T>
void round(const float* in, float scale, int64_t count, void* out) {
  auto* target = static_cast<T*>(out);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) vstore(target + i, vmul(vload(in + i), vset(scale)));
  if (i < count) {
    float padded[kWidth] = {};
    T rounded[kWidth];
    std::memcpy(padded, in + i, static_cast<size_t>(count - i) * sizeof(float));
    vstore(rounded, vmul(vload(padded), vset(scale)));
    std::memcpy(target + i, rounded, static_cast<size_t>(count - i) * sizeof(T));
  }
}

template <class Dot>
constexpr Kernels make_kernels() {
  return {rowdot_bytes<Dot>, update_bytes<Dot>, scratch_bytes<Dot>,     pack_rowdot<Dot>, pack_update<Dot>, rowdot<Dot>,
          update<Dot>,       outer<Dot>,        round<typename Dot::X>, nullptr,          Dot::kPanelOrder};
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
