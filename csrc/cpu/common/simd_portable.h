// Four float lanes in GCC's and Clang's vector extension: any CPU.
#pragma once

namespace lorasp::LORASP_ISA {
namespace {

constexpr int kWidth = 4;
constexpr int kDotRows = 2, kDotRanks = 4;
constexpr int kPanelRows = 4, kPanelVectors = 2;

typedef float vf __attribute__((vector_size(16)));
struct vf2 {
  vf a, b;
};

inline vf vset(float v) { return vf{v, v, v, v}; }
inline vf vzero() { return vset(0.0f); }
inline vf vadd(vf a, vf b) { return a + b; }
inline vf vmul(vf a, vf b) { return a * b; }
inline vf vfma(vf a, vf b, vf c) { return a * b + c; }
inline float vsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline vf vkeep(vf v, uint32_t bits) {
  for (int i = 0; i < kWidth; ++i) v[i] = (bits >> i) & 1 ? v[i] : 0.0f;
  return v;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float widen(float v) { return v; }
inline float widen(bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return from_bits(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  if (magnitude < 0x400u) return from_bits(sign | to_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

// Round to nearest, ties to even.
inline void narrow(float v, float* out) { *out = v; }
inline void narrow(float v, bf16* out) {
  const uint32_t bits = to_bits(v);
  out->bits = v != v ? 0x7FC0 : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}
inline void narrow(float v, f16* out) {
  const uint32_t bits = to_bits(v), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // 65520 and above round to infinity
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition of 0.5 rounds at 2^-24
    half = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

template <class T>
inline vf vload(const T* p) {
  return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
inline void vstore(T* p, vf v) {
  for (int i = 0; i < kWidth; ++i) narrow(v[i], p + i);
}

template <class T>
inline vf2 vload2(const T* p) {
  return {vload(p), vload(p + kWidth)};
}
template <class T>
inline vf2 vload2(const T* p, uint32_t bits) {
  return {vkeep(vload(p), bits), vkeep(vload(p + kWidth), bits >> kWidth)};
}
// The first `count` elements; those after them are not read and count as 0.
template <class T>
inline vf2 vload2_tail(const T* p, int64_t count, uint32_t bits) {
  T padded[2 * kWidth];
  for (int i = 0; i < 2 * kWidth; ++i) padded[i] = i < count ? p[i] : T{};
  return vload2(padded, bits);
}

}  // namespace
}  // namespace lorasp::LORASP_ISA
