// out[i] = sum over s of parts[s, i] where mask[i] (0 elsewhere), rounded once: the end of every split sum, in the
// order of s, so that the same bits come out every run.
//
// Floor: reads 4 count size bytes, writes size elements.
#pragma once
#include "tile.cuh"

namespace lorasp::cuda {

template <class T>
struct ReduceArgs {
  const float* parts;  // (count, size)
  int64_t count, size;
  const uint8_t* mask;  // (size,) or nullptr
  T* out;               // (size,)
};

template <class T>
__global__ void __launch_bounds__(kThreads) lora_linear_reduce_kernel(const ReduceArgs<T> args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.size) return;
  float sum = 0.0f;
  if (!args.mask || load_global(args.mask + i)) {
#pragma unroll 8
    for (int64_t s = 0; s < args.count; ++s) sum += load_global(args.parts + (s * args.size + i));
  }
  store_global(args.out + i, from_float<T>(sum));
}

}  // namespace lorasp::cuda
