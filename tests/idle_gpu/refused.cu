// A launch that the device refuses, by the CUDA kernels' own `launch`.
#include <stdexcept>

#include "primitives.cuh"

struct Nothing {};
static __global__ void idle_kernel(Nothing) {}

// What cudaGetLastError has to say after the exception; -1 where there is none.
extern "C" int error_left_by_a_refused_launch(int64_t grid_y, int shared_bytes) {
  try {
    lorasp::cuda::launch(idle_kernel, {1, grid_y}, 32, shared_bytes, nullptr, Nothing{});
  } catch (const std::runtime_error&) {
    return cudaGetLastError();
  }
  return -1;
}
