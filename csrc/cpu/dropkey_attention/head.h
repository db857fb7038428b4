// One head as an Engine (engines.h) takes it: operands packed and zero-padded to kRows rows and kStep columns, once per
// head (keys) or per query block (queries).
//     A (rows, depth): [depth / kStep][rows][kStep]             rows of a product
//     B (depth, columns): panels of kPanelColumns columns, a panel [depth / kStep][kStep x kPanelColumns, the engine's
//     order] C (rows, columns), fp32: panels of kPanelColumns columns, a panel [rows][kPanelColumns]
#pragma once
#include "engines.h"

namespace lorasp::LORASP_ISA {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

static_assert(kRows % kPanelColumns == 0);

// Queries and keys handled together. Chosen by measurement on a 2 MiB L2.
constexpr int64_t kForwardQueries = 64, kForwardKeys = 256;
constexpr int64_t kBackwardQueries = 256, kBackwardKeys = 128;

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

}  // namespace
}  // namespace lorasp::LORASP_ISA
