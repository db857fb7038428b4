// The compute dtypes, torch-free.
#pragma once
#include <cstdint>

namespace lorasp {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
enum class DType { kF32, kBF16, kF16 };  // tables of kernels follow this order

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace lorasp
