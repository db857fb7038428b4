// An H200 that is not there, shared by the stand-ins of CUDA's libraries: its limits, and what they keep of its state.
// Device memory is host memory, copies and fills are performed, kernels and matrix products do nothing.
#pragma once
#include <cuda_runtime_api.h>
#include <cstddef>
#include <cstdio>
#include <functional>

#if CUDART_VERSION < 13000 || CUDART_VERSION >= 14000
#error "the idle GPU is written for the headers of CUDA 13"
#endif

namespace idle_gpu {

constexpr const char* kName = "idle GPU (H200 that computes nothing)";
constexpr int kMultiprocessors = 132;
constexpr int kRegisters = 65536;
constexpr int kThreadsPerBlock = 1024;
constexpr int kBlockZ = 64;
constexpr int kGridX = 2147483647;
constexpr int kGridYZ = 65535;
constexpr int kSharedDefault = 49152;  // dynamic shared memory of a kernel that did not opt in to more
constexpr int kSharedOptin = 232448;
constexpr int kSharedReserved = 1024;
constexpr int kL2Bytes = 60 << 20;

// Goes to stderr, so that a refusal can be read whatever becomes of the status.
template <typename... Values>
void complain(const char* format, Values... values) {
  std::fputs("idle GPU: ", stderr);
  std::fprintf(stderr, format, values...);
  std::fputc('\n', stderr);
}

// What cudaGetLastError returns next.
cudaError_t fail(cudaError_t status);
// cudaDeviceAttr and CUdevice_attribute have the same values.
int attribute(int which);
// A function of libcuda.so.1; null where the stand-in has none.
void* driver_function(const char* name);

struct Launch {
  const char* kernel;
  size_t grid[3], block[3], shared, shared_limit;
};
// Whether hardware would take the launch; then it is counted, and a node of the graph that `stream` records.
bool launch(const Launch& asked, cudaStream_t stream);

// Whether one allocation on the device holds all of these bytes.
bool on_device(const void* begin, size_t bytes);
size_t memory_limit();

// Runs `work`, or records it in the graph that `stream` is being captured into.
cudaError_t perform(cudaStream_t stream, std::function<void()> work);
// Waiting for a stream that is being captured fails, and its capture with it.
cudaError_t wait_for(cudaStream_t stream);
// Whether CUDA forbids this thread what is unsafe while a graph is captured: allocating, loading a module.
bool forbidden_by_capture();

}  // namespace idle_gpu

// For cublas.cpp's stubs and for Python.
extern "C" {
void idle_gpu_count_product();
long idle_gpu_launches();
}
