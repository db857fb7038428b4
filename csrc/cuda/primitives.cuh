// What the kernels ask of the machine, behind functions, so that the same kernels run on a GPU and, in tests, on a CPU
// (tests/cuda_emulation has every name below once more). Torch-free; needs sm_80.
#pragma once
#include <cstdint>

#include "../philox.h"

namespace lorasp::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// What one thread moves in one memory access.
struct alignas(16) Words {
  uint32_t word[4];
};

LORASP_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lorasp::cuda

#if !defined(__CUDACC__)
#include "emulated_primitives.h"
#else

namespace lorasp::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float to_float(f16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float v) { return __float_as_uint(v); }

// Rounded to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) {
  bf16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float v) {
  f16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ int count_bits(uint32_t v) { return __popc(v); }
// The upper half of the product.
__device__ __forceinline__ uint64_t multiply_high(uint64_t a, uint64_t b) { return __umul64hi(a, b); }
// 2^v in one instruction; 0 where that is below 2^-126.
__device__ __forceinline__ float power_of_2(float v) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
}

template <class T>
__device__ __forceinline__ T load_global(const T* p) {
  return *p;
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T v) {
  *p = v;
}
// 16 bytes at a multiple of 16. Stores are PTX: nvcc takes those of a uint4 or a struct apart.
__device__ __forceinline__ Words load_global16(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_global16(void* p, Words v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// A place in the block's shared memory; p[i] reads and writes, p + i moves.
template <class T>
using Shared = T*;

template <class T>
__device__ __forceinline__ Shared<T> shared_memory(int byte_offset) {
  extern __shared__ __align__(16) unsigned char lorasp_shared_memory[];
  return reinterpret_cast<T*>(lorasp_shared_memory + byte_offset);
}
template <class T>
__device__ __forceinline__ Words load_shared16(Shared<T> p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
__device__ __forceinline__ void store_shared16(Shared<T> p, Words v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }

// Copies `bytes` (0 to 16) to 16 bytes of shared memory and zero-fills the rest. Both ends at multiples of 16.
template <class T>
__device__ __forceinline__ void copy_async16(Shared<T> to, const void* from, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's newest groups are under way; other threads need a barrier besides.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four (two) 8 x 8 matrices of 16-bit elements; lane 8 i + j of the warp brings the address of row j of matrix i. Lane
// l receives elements (l / 4, 2 (l % 4)) and the one to its right, or of the transposed matrices.
template <bool kTransposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
template <bool kTransposed, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[2], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
}

// acc (16 x 8) += a (16 x 16) b (16 x 8) by the warp, fragments as the PTX ISA lays out mma.m16n8k16.
template <class T>
__device__ __forceinline__ void multiply_matrices(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_matrices<bf16>(float (&acc)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply_matrices<f16>(float (&acc)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The value of the lane `distance` below; lanes without one keep their own.
__device__ __forceinline__ int shuffle_up(int v, int distance) { return __shfl_up_sync(0xFFFFFFFFu, v, distance); }
// The value of the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, v, mask); }

// Launches kernel(args) on the stream; throws std::runtime_error where CUDA refuses.
using Stream = cudaStream_t;
struct Grid {
  int64_t x = 1, y = 1, z = 1;
};
void check_launch(cudaError_t status, const char* what);

template <class Args>
void launch(void (*kernel)(Args), Grid grid, int threads, int shared_bytes, Stream stream, const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr int kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn)
    check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                 "shared memory");
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  void* arguments[] = {const_cast<Args*>(&args)};
  check_launch(cudaLaunchKernel(kernel, blocks, dim3(threads), arguments, shared_bytes, stream), "launch");
}

}  // namespace lorasp::cuda
#endif
