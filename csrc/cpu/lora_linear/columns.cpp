#include "columns.h"

#include <algorithm>
#include <cstring>

#include "../common/dtype.h"
#include "../common/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LORASP_TARGET(features) __attribute__((target(features)))
#endif

namespace lorasp {
namespace {

template <class T>
void compress_plain(const T* row, const int64_t* index, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = row[index[i]];
}

uint64_t extract_plain(uint64_t bits, uint64_t mask) {
  uint64_t out = 0;
  for (int n = 0; mask; mask &= mask - 1, ++n) out |= (bits >> __builtin_ctzll(mask) & 1) << n;
  return out;
}

#if defined(__x86_64__)
LORASP_TARGET("avx512f,avx512bw,avx512vl,avx512vbmi2")
void compress_words(const uint16_t* row, uint64_t mask, uint16_t* out) {
  for (int half = 0; half < 2; ++half, row += 32, mask >>= 32) {
    const auto lanes = static_cast<__mmask32>(mask);
    const int count = __builtin_popcount(lanes);
    const __m512i kept = _mm512_maskz_compress_epi16(lanes, _mm512_maskz_loadu_epi16(lanes, row));
    _mm512_mask_storeu_epi16(out, static_cast<__mmask32>((uint64_t{1} << count) - 1), kept);
    out += count;
  }
}

LORASP_TARGET("avx512f")
void compress_words(const uint32_t* row, uint64_t mask, uint32_t* out) {
  for (int quarter = 0; quarter < 4; ++quarter, row += 16, mask >>= 16) {
    const auto lanes = static_cast<__mmask16>(mask);
    const int count = __builtin_popcount(lanes);
    const __m512i kept = _mm512_maskz_compress_epi32(lanes, _mm512_maskz_loadu_epi32(lanes, row));
    _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << count) - 1), kept);
    out += count;
  }
}

LORASP_TARGET("bmi2") uint64_t extract_fast(uint64_t bits, uint64_t mask) { return _pext_u64(bits, mask); }

bool has(const char* feature) {
  const auto features = cpu_features();
  return std::find(features.begin(), features.end(), feature) != features.end();
}

bool compresses(int64_t element_size) {
  static const bool halves = has("avx512_vbmi2");
  return active_isa() >= Isa::kAvx512 && (element_size == 4 || halves);
}

bool extracts() {
  static const bool present = has("bmi2");
  return active_isa() >= Isa::kAvx2 && present;
}
#endif

}  // namespace

Columns::Columns(const int64_t* index, int64_t count, int64_t width)
    : index_(index), count_(count), width_(width), words_(ceil_div(width, 64)), positions_(words_.size() + 1) {
  for (int64_t i = 0; i < count; ++i) words_[index[i] / 64] |= uint64_t{1} << (index[i] % 64);
  for (size_t w = 0; w < words_.size(); ++w) positions_[w + 1] = positions_[w] + __builtin_popcountll(words_[w]);
}

namespace {

struct Span {
  const uint64_t* words;
  const int64_t* positions;
  const int64_t* index;
};

template <class T>
void gather_row(const Span& s, int64_t w0, int64_t w1, const T* row, bool fast, T* out) {
  for (int64_t w = w0; w < w1; ++w) {
    const int64_t at = s.positions[w], count = s.positions[w + 1] - at;
    if (count == 64) {
      std::memcpy(out + at, row + 64 * w, 64 * sizeof(T));
    } else if (count > 0) {
#if defined(__x86_64__)
      if (fast) {
        compress_words(row + 64 * w, s.words[w], out + at);
        continue;
      }
#endif
      compress_plain(row, s.index + at, count, out + at);
    }
  }
}

template <class T>
void gather_rows(const Span& s, int64_t w0, int64_t w1, const void* rows, int64_t ld, int64_t row_count, void* out,
                 int64_t ldo) {
#if defined(__x86_64__)
  const bool fast = compresses(sizeof(T));
#else
  const bool fast = false;
#endif
  for (int64_t m = 0; m < row_count; ++m)
    gather_row(s, w0, w1, static_cast<const T*>(rows) + m * ld, fast, static_cast<T*>(out) + m * ldo);
}

}  // namespace

void Columns::gather(const void* rows, int64_t ld, int64_t row_count, int64_t element_size, int64_t c0, int64_t c1,
                     void* out, int64_t ldo) const {
  const Span span{words_.data(), positions_.data(), index_};
  const auto gather_elements = element_size == 2 ? gather_rows<uint16_t> : gather_rows<uint32_t>;
  gather_elements(span, c0 / 64, ceil_div(c1, 64), rows, ld, row_count, out, ldo);
}

void Columns::scatter(const void* packed, int64_t element_size, void* row) const {
  const auto* in = static_cast<const char*>(packed);
  auto* out = static_cast<char*>(row);
  for (size_t w = 0; w < words_.size(); ++w) {
    const int64_t at = positions_[w], count = positions_[w + 1] - at;
    if (count == 64) {
      std::memcpy(out + 64 * w * element_size, in + at * element_size, 64 * element_size);
      continue;
    }
    for (int64_t i = at; i < at + count; ++i)
      std::memcpy(out + index_[i] * element_size, in + i * element_size, element_size);
  }
}

void Columns::gather_bits(const uint32_t* bits, uint32_t* out) const {
#if defined(__x86_64__)
  const auto extract = extracts() ? extract_fast : extract_plain;
#else
  const auto extract = extract_plain;
#endif
  uint64_t pending = 0;
  int filled = 0;
  const auto put = [&](uint64_t word) {
    std::memcpy(out, &word, sizeof word);
    out += 2;
  };
  for (size_t w = 0; w < words_.size(); ++w) {
    const int count = static_cast<int>(positions_[w + 1] - positions_[w]);
    if (count == 0) continue;
    uint64_t word;
    std::memcpy(&word, bits + 2 * w, sizeof word);
    if (count < 64) word = extract(word, words_[w]);
    pending |= word << filled;
    if (filled + count < 64) {
      filled += count;
      continue;
    }
    put(pending);
    pending = filled == 0 ? 0 : word >> (64 - filled);
    filled += count - 64;
  }
  if (filled > 0) put(pending);
}

}  // namespace lorasp
