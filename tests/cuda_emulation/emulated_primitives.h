// csrc/cuda/primitives.cuh for the CPU: the same names, executed by the emulator.
#pragma once
#include <cmath>

#include "emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

inline Block& block() { return *Block::current(); }
inline void fail(const std::string& message) { block().fail(message); }
inline int running_thread() { return block().thread(); }
inline int64_t running_thread_of_grid() {
  return ((static_cast<int64_t>(blockIdx.z) << 16 | blockIdx.y) << 20 | blockIdx.x) << 11 | running_thread();
}

}  // namespace emulation

namespace lorasp::cuda {

inline float bits_to_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline uint32_t float_to_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return bits_to_float(static_cast<uint32_t>(v.bits) << 16); }
inline float to_float(f16 v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                          : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return v.bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
T from_float(float v);
template <>
inline float from_float<float>(float v) {
  return v;
}
template <>
inline bf16 from_float<bf16>(float v) {
  if (std::isnan(v)) return {0x7FFF};
  const uint32_t bits = float_to_bits(v);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline f16 from_float<f16>(float v) {
  const uint16_t sign = float_to_bits(v) >> 16 & 0x8000;
  if (std::isnan(v)) return {0x7FFF};
  v = std::fabs(v);
  if (v >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  const int exponent = v < 0x1p-14f ? -14 : std::ilogb(v);
  // nearbyint rounds to nearest even; a carry out of the fraction raises the exponent as it should.
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(v, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (fraction + ((exponent + 14) << 10)))};
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline int count_bits(uint32_t v) { return __builtin_popcount(v); }
inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline float power_of_2(float v) {
  const float power = std::exp2(v);
  return power < 0x1p-126f ? 0.0f : power;
}

template <class T>
T load_global(const T* p) {
  emulation::GlobalMemory::instance().check_read(p, sizeof(T), sizeof(T));
  return *p;
}
template <class T>
void store_global(T* p, T v) {
  emulation::GlobalMemory::instance().check_write(p, sizeof(T));
  *p = v;
}
inline Words load_global16(const void* p) { return load_global(static_cast<const Words*>(p)); }
inline void store_global16(void* p, Words v) { store_global(static_cast<Words*>(p), v); }

// A byte offset into the running block's shared memory.
template <class T>
struct SharedPlace {
  int at;

  struct Element {
    int at;
    operator T() const {
      T v;
      emulation::block().shared.read(at, &v, sizeof(T), emulation::running_thread());
      return v;
    }
    Element& operator=(const T& v) {
      emulation::block().shared.write(at, &v, sizeof(T), emulation::running_thread());
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
  };
  Element operator[](int i) const { return {at + i * static_cast<int>(sizeof(T))}; }
  SharedPlace operator+(int i) const { return {at + i * static_cast<int>(sizeof(T))}; }
};
template <class T>
using Shared = SharedPlace<T>;

template <class T>
Shared<T> shared_memory(int byte_offset) {
  return {byte_offset};
}
template <class T>
Words load_shared16(Shared<T> p) {
  return Shared<Words>{p.at}[0];
}
template <class T>
void store_shared16(Shared<T> p, Words v) {
  Shared<Words>{p.at}[0] = v;
}

inline void sync_threads(int line = __builtin_LINE()) { emulation::block().barrier(line); }

template <class T>
void copy_async16(Shared<T> to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulation::fail("copies " + std::to_string(bytes) + " bytes asynchronously");
  if (bytes > 0) emulation::GlobalMemory::instance().check_read(from, bytes, 16);
  emulation::block().shared.begin_copy(to.at, 16, emulation::running_thread());
  emulation::block().copies().add({to.at, from, bytes});
}
inline void commit_copies() { emulation::block().copies().commit(); }
template <int kPending>
void wait_for_copies() {
  for (const auto& copy : emulation::block().copies().finish(kPending)) {
    Words words{};
    std::memcpy(&words, copy.from, static_cast<size_t>(copy.bytes));
    emulation::block().shared.end_copy(copy.to, &words, 16, emulation::running_thread());
  }
}

// The fragment layouts are those of the PTX ISA, "Warp-level matrix instructions", for ldmatrix and mma.m16n8k16.
template <int kMatrices, bool kTransposed>
struct MatrixLoad {
  int row;  // byte offset of the row this lane brings
  uint32_t* to;

  static void run(void* const (&lanes)[emulation::kWarp]) {
    uint16_t elements[kMatrices][8][8];
    for (int i = 0; i < kMatrices * 8; ++i)
      emulation::block().shared.read(static_cast<MatrixLoad*>(lanes[i])->row, elements[i / 8][i % 8], 16, -2);
    for (int lane = 0; lane < emulation::kWarp; ++lane)
      for (int m = 0; m < kMatrices; ++m) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = kTransposed ? elements[m][j][i] : elements[m][i][j];
        const uint32_t high = kTransposed ? elements[m][j + 1][i] : elements[m][i][j + 1];
        static_cast<MatrixLoad*>(lanes[lane])->to[m] = low | high << 16;
      }
  }
};
template <bool kTransposed, class T, int kMatrices>
void load_matrices(uint32_t (&to)[kMatrices], Shared<T> row, int line = __builtin_LINE()) {
  using Load = MatrixLoad<kMatrices, kTransposed>;
  Load load{row.at, to};
  emulation::block().warp_operation({"load_matrices", line, &Load::run}, &load);
}

template <class T>
struct MatrixProduct {
  float* acc;
  const uint32_t *a, *b;

  static float half(uint32_t word, int i) { return to_float(T{static_cast<uint16_t>(word >> 16 * i)}); }
  static void run(void* const (&lanes)[emulation::kWarp]) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      const auto& brought = *static_cast<MatrixProduct*>(lanes[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i) a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = half(brought.a[i / 2], i % 2);
      for (int i = 0; i < 4; ++i) b[pair + i % 2 + i / 2 * 8][group] = half(brought.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < emulation::kWarp; ++lane)
      for (int i = 0; i < 4; ++i) {
        float& acc = static_cast<MatrixProduct*>(lanes[lane])->acc[i];
        for (int k = 0; k < 16; ++k) acc += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      }
  }
};
template <class T>
void multiply_matrices(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  MatrixProduct<T> product{acc, a, b};
  emulation::block().warp_operation({"multiply_matrices", line, &MatrixProduct<T>::run}, &product);
}

struct ShuffleUp {
  int value, distance;

  static void run(void* const (&lanes)[emulation::kWarp]) {
    for (int lane = emulation::kWarp - 1; lane >= 0; --lane) {
      auto& mine = *static_cast<ShuffleUp*>(lanes[lane]);
      if (lane >= mine.distance) mine.value = static_cast<ShuffleUp*>(lanes[lane - mine.distance])->value;
    }
  }
};
inline int shuffle_up(int v, int distance, int line = __builtin_LINE()) {
  ShuffleUp shuffle{v, distance};
  emulation::block().warp_operation({"shuffle_up", line, &ShuffleUp::run}, &shuffle);
  return shuffle.value;
}

struct ShuffleXor {
  float value;
  int mask;

  static void run(void* const (&lanes)[emulation::kWarp]) {
    float values[emulation::kWarp];
    for (int lane = 0; lane < emulation::kWarp; ++lane) values[lane] = static_cast<ShuffleXor*>(lanes[lane])->value;
    for (int lane = 0; lane < emulation::kWarp; ++lane) {
      auto& mine = *static_cast<ShuffleXor*>(lanes[lane]);
      mine.value = values[(lane ^ mine.mask) % emulation::kWarp];
    }
  }
};
inline float shuffle_xor(float v, int mask, int line = __builtin_LINE()) {
  ShuffleXor shuffle{v, mask};
  emulation::block().warp_operation({"shuffle_xor", line, &ShuffleXor::run}, &shuffle);
  return shuffle.value;
}

using Stream = void*;
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// Refuses what some device that the kernels are for would refuse.
template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, Stream, const Args& args) {
  constexpr int64_t kGridX = 2147483647, kGridYZ = 65535;
  constexpr int kThreadsPerBlock = 1024, kSharedPerBlock = 101376;  // sm_120's, the smallest
  const auto within = [](int64_t count, int64_t most) { return count >= 0 && count <= most; };
  if (!within(grid.x, kGridX) || !within(grid.y, kGridYZ) || !within(grid.z, kGridYZ) ||
      !within(threads, kThreadsPerBlock) || !within(shared_bytes, kSharedPerBlock))
    throw emulation::Error("no device launches (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " +
                           std::to_string(grid.z) + ") blocks of " + std::to_string(threads) + " threads and " +
                           std::to_string(shared_bytes) + " bytes");
  emulation::run_grid(grid.x, grid.y, grid.z, threads, shared_bytes, [&] { kernel(args); });
}

}  // namespace lorasp::cuda
