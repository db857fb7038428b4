// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): the bits of every random mask.
// Element i of a mask takes 16-bit half i % 8 (low half of word 0 first) of
//   philox(counter = (lo32(i / 8), hi32(i / 8), purpose, member), key = (lo32(seed), hi32(seed)))
// and is kept iff half >= threshold: one counter makes one byte of a little-endian bitmap.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LORASP_HOST_DEVICE __host__ __device__
#else
#define LORASP_HOST_DEVICE
#endif

namespace lorasp {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// As in lorasp/rng.py.
constexpr uint32_t kPurposeLoRADropout = 0, kPurposeDropKey = 1, kPurposeHiddenCut = 2;

struct KeepMask {
  uint64_t seed;
  uint32_t purpose;
  uint32_t member;
  uint32_t threshold;  // 0 keeps everything
};

// round(65536 p); also 65536, which is no threshold, where p is not in [0, 1).
inline uint32_t drop_threshold(double p) {
  return p >= 0.0 && p < 1.0 ? static_cast<uint32_t>(std::nearbyint(p * 65536)) : 65536;
}

// Length of the dropped run of `size` positions, p in [0, 1).
inline int64_t span_length(double p, int64_t size) {
  const int64_t share = static_cast<int64_t>(p * static_cast<double>(size));
  const int64_t length = share > 1 ? share : 1, most = size > 1 ? size - 1 : 0;
  return p == 0.0 ? 0 : length < most ? length : most;
}

struct PhiloxWords {
  uint32_t word[4];
};

LORASP_HOST_DEVICE constexpr PhiloxWords philox4x32_7(uint64_t counter, uint32_t purpose, uint32_t member,
                                                      uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = purpose, c3 = member;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c0, p1 = static_cast<uint64_t>(kPhiloxM1) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The keep bits of elements 8 * counter ... 8 * counter + 7.
LORASP_HOST_DEVICE constexpr uint8_t keep_byte(const KeepMask& mask, uint64_t counter) {
  const PhiloxWords r = philox4x32_7(counter, mask.purpose, mask.member, mask.seed);
  uint8_t byte = 0;
  for (int half = 0; half < 8; ++half) {
    const uint32_t value = (r.word[half / 2] >> (16 * (half % 2))) & 0xFFFFu;
    byte |= static_cast<uint8_t>((value >= mask.threshold) << half);
  }
  return byte;
}

}  // namespace lorasp
