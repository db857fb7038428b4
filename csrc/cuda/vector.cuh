// What one thread of the elementwise kernels holds: 16 bytes of neighbouring elements, moved in one access where they
// lie at a multiple of 16 and all belong to the tensor, else element by element.
#pragma once
#include <cmath>
#include <type_traits>

#include "tile.cuh"

namespace lorasp::cuda {

template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <class T>
__device__ inline T element(const Words& words, int i) {
  T value;
  if constexpr (sizeof(T) == 2)
    value.bits = static_cast<uint16_t>(words.word[i / 2] >> 16 * (i % 2));
  else
    value = bits_to_float(words.word[i]);
  return value;
}

template <class T>
__device__ inline void set_element(Words& words, int i, T value) {
  if constexpr (sizeof(T) == 2) {
    const int shift = 16 * (i % 2);
    words.word[i / 2] = (words.word[i / 2] & ~(0xFFFFu << shift)) | static_cast<uint32_t>(value.bits) << shift;
  } else {
    words.word[i] = float_to_bits(value);
  }
}

template <class T>
__device__ inline bool moves_at_once(const T* p, int first, int last) {
  return first <= 0 && last >= kVector<T> && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Elements p[first] ... p[last - 1] of p[0] ... p[kVector - 1], the others `outside`.
template <class T>
__device__ inline Words load_vector(const T* p, int first, int last, T outside) {
  if (moves_at_once(p, first, last)) return load_global16(p);
  Words words{};
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) set_element<T>(words, i, i >= first && i < last ? load_global(p + i) : outside);
  return words;
}

template <class T>
__device__ inline void store_vector(T* p, const Words& words, int first, int last) {
  if (moves_at_once<T>(p, first, last)) return store_global16(p, words);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i)
    if (i >= first && i < last) store_global(p + i, element<T>(words, i));
}

// Division of n, 0 <= n < 2^63, by what a whole launch divides by: a multiplication and a shift. With 2^(b - 1) < d <=
// 2^b and m = ceil(2^(63 + b) / d) = (2^(63 + b) + e) / d, e < d <= 2^b:
//     n m / 2^(63 + b) = n / d + n e / (d 2^(63 + b)), and n e < 2^(63 + b), so that the excess is below 1 / d.
class Divider {
 public:
  Divider() = default;  // by 1
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    if (divisor == 1) return;
    int b = 1;
    while (b < 63 && int64_t{1} << b < divisor) ++b;
    const unsigned __int128 d = static_cast<uint64_t>(divisor);
    multiplier_ = static_cast<uint64_t>(((static_cast<unsigned __int128>(1) << (63 + b)) + d - 1) / d);
    shift_ = b - 1;
  }

  struct Result {
    int64_t quotient, remainder;
  };
  __device__ Result operator()(int64_t n) const {
    const int64_t q =
        multiplier_ == 0 ? n : static_cast<int64_t>(multiply_high(static_cast<uint64_t>(n), multiplier_) >> shift_);
    return {q, n - q * divisor_};
  }
  LORASP_HOST_DEVICE int64_t divisor() const { return divisor_; }

 private:
  int64_t divisor_ = 1;
  uint64_t multiplier_ = 0;
  int shift_ = 0;
};

}  // namespace lorasp::cuda
