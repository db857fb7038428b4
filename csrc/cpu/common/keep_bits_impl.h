// keep_bits.h in the lanes of one instruction set. Included once per instruction set.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

#if defined(LORASP_AVX2) || defined(LORASP_AVX512)

#if defined(LORASP_AVX512)
using Lanes = __m512i;
inline Lanes lanes(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
// Two ways to the high word, so that the shift and the shuffle port share the work.
inline Lanes high_shift(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes high_shuffle(Lanes a) { return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(0xF5)); }
inline Lanes bit_xor(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
inline Lanes bit_xor(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
constexpr int kCounters = 8;
// Ordered so that unpacklo and unpackhi leave counters 0-3 and 4-7 whole and in order.
inline Lanes first_counters() { return _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); }

inline void store_keep(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t threshold, uint8_t* out) {
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const __m512i w01 = _mm512_mask_shuffle_epi32(c0, 0xAAAA, c1, static_cast<_MM_PERM_ENUM>(0xA0));
  const __m512i w23 = _mm512_mask_shuffle_epi32(c2, 0xAAAA, c3, static_cast<_MM_PERM_ENUM>(0xA0));
  const uint64_t low = _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(w01, w23), t);
  const uint64_t high = _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(w01, w23), t);
  const uint64_t bytes = low | (high << 32);
  std::memcpy(out, &bytes, 8);
}
#else
using Lanes = __m256i;
inline Lanes lanes(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes high_shift(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes high_shuffle(Lanes a) { return _mm256_shuffle_epi32(a, 0xF5); }
inline Lanes bit_xor(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
inline Lanes bit_xor(Lanes a, Lanes b, Lanes c) { return bit_xor(bit_xor(a, b), c); }
constexpr int kCounters = 4;
inline Lanes first_counters() { return _mm256_set_epi64x(3, 1, 2, 0); }

inline void store_keep(Lanes c0, Lanes c1, Lanes c2, Lanes c3, uint32_t threshold, uint8_t* out) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const __m256i w01 = _mm256_blend_epi32(c0, _mm256_shuffle_epi32(c1, 0xA0), 0xAA);
  const __m256i w23 = _mm256_blend_epi32(c2, _mm256_shuffle_epi32(c3, 0xA0), 0xAA);
  const __m256i low = _mm256_unpacklo_epi64(w01, w23), high = _mm256_unpackhi_epi64(w01, w23);
  const __m256i keep_low = _mm256_cmpeq_epi16(_mm256_max_epu16(low, t), low);
  const __m256i keep_high = _mm256_cmpeq_epi16(_mm256_max_epu16(high, t), high);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(keep_low, keep_high), 0xD8);
  const uint32_t bytes = static_cast<uint32_t>(_mm256_movemask_epi8(packed));
  std::memcpy(out, &bytes, 4);
}
#endif

constexpr uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

// One byte per counter; the high word of the counters is the same for all. Writes up to kCounters - 1 bytes too many.
// The lanes' high words are garbage throughout: multiply() reads the low ones. Words that hang on no lane stay scalar
// for the first two rounds.
inline void keep_bytes(const KeepMask& mask, uint64_t counter, int64_t count, uint8_t* out) {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    k0[round] = static_cast<uint32_t>(mask.seed) + static_cast<uint32_t>(round) * kPhiloxW0;
    k1[round] = static_cast<uint32_t>(mask.seed >> 32) + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  const uint32_t first_c0 = high_product(kPhiloxM1, mask.purpose) ^ static_cast<uint32_t>(counter >> 32) ^ k0[0];
  const uint32_t first_c1 = kPhiloxM1 * mask.purpose;
  const Lanes m0 = lanes(kPhiloxM0), m1 = lanes(kPhiloxM1);
  const Lanes c2_key = lanes(mask.member ^ k1[0]);
  const Lanes second_c0_key = lanes(first_c1 ^ k0[1]);
  const Lanes second_c2_key = lanes(high_product(kPhiloxM0, first_c0) ^ k1[1]);
  const Lanes second_c3 = lanes(kPhiloxM0 * first_c0);
  Lanes current = add(lanes(counter), first_counters());
  const Lanes step = lanes(kCounters);
  for (int64_t i = 0; i < count; i += kCounters, current = add(current, step)) {
    Lanes p0 = multiply(current, m0);
    Lanes c2 = bit_xor(high_shuffle(p0), c2_key), c3 = p0;
    Lanes p1 = multiply(c2, m1);
    Lanes c0 = bit_xor(high_shift(p1), second_c0_key), c1 = p1;
    c2 = bit_xor(c3, second_c2_key);
    c3 = second_c3;
#pragma GCC unroll 5
    for (int round = 2; round < kPhiloxRounds; ++round) {
      p0 = multiply(c0, m0);
      p1 = multiply(c2, m1);
      c0 = bit_xor(high_shift(p1), c1, lanes(k0[round]));
      c1 = p1;
      c2 = bit_xor(high_shuffle(p0), c3, lanes(k1[round]));
      c3 = p0;
    }
    store_keep(c0, c1, c2, c3, mask.threshold, out + i);
  }
}

#else

constexpr int kCounters = 1;

inline void keep_bytes(const KeepMask& mask, uint64_t counter, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = keep_byte(mask, counter + static_cast<uint64_t>(i));
}

#endif

void keep_bits(const KeepMask& mask, int64_t start, int64_t count, uint32_t* out) {
  constexpr int64_t kBytes = 256;
  uint8_t bytes[kBytes + 8 + kCounters];
  const int shift = static_cast<int>(start % 8);
  uint64_t counter = static_cast<uint64_t>(start) / 8;
  for (int64_t done = 0; done < count; done += 8 * kBytes, counter += kBytes) {
    const int64_t bits = count - done < 8 * kBytes ? count - done : 8 * kBytes;
    const int64_t needed = ceil_div(bits + shift, 8);
    const int64_t until_carry = static_cast<int64_t>((uint64_t{1} << 32) - (counter & 0xFFFFFFFFu));
    const int64_t head = needed < until_carry ? needed : until_carry;
    keep_bytes(mask, counter, head, bytes);
    if (head < needed) keep_bytes(mask, counter + static_cast<uint64_t>(head), needed - head, bytes + head);
    for (int64_t word = 0; word < ceil_div(bits, 32); ++word) {
      uint64_t window;
      std::memcpy(&window, bytes + 4 * word, 8);
      out[done / 32 + word] = static_cast<uint32_t>(window >> shift);
    }
  }
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
