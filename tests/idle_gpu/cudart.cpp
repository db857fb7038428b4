// Stands in for libcudart with memory.cpp and streams.cpp: the device, its errors and its kernels. Launches are checked
// against the device's limits. Not checked: what a kernel reads and writes, how many registers it takes.
// IDLE_GPU_TRACE=1 writes every launch to stderr. What is written nowhere here returns cudaErrorNotSupported.
#include <dlfcn.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "device.h"

namespace {
using namespace idle_gpu;

struct Kernel {
  std::string name;
  int shared_limit = kSharedDefault;
};

const std::map<int, int> kAttributes = {
    {cudaDevAttrMaxThreadsPerBlock, kThreadsPerBlock},
    {cudaDevAttrMaxBlockDimX, kThreadsPerBlock},
    {cudaDevAttrMaxBlockDimY, kThreadsPerBlock},
    {cudaDevAttrMaxBlockDimZ, kBlockZ},
    {cudaDevAttrMaxGridDimX, kGridX},
    {cudaDevAttrMaxGridDimY, kGridYZ},
    {cudaDevAttrMaxGridDimZ, kGridYZ},
    {cudaDevAttrMaxSharedMemoryPerBlock, kSharedDefault},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, kSharedOptin},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, kSharedOptin + kSharedReserved},
    {cudaDevAttrMaxRegistersPerBlock, kRegisters},
    {cudaDevAttrMaxRegistersPerMultiprocessor, kRegisters},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, kMultiprocessors},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrL2CacheSize, kL2Bytes},
    {cudaDevAttrClockRate, 1980000},        // kHz
    {cudaDevAttrMemoryClockRate, 3201000},  // kHz
    {cudaDevAttrGlobalMemoryBusWidth, 6144},
};

const std::map<int, const char*> kErrors = {
    {cudaSuccess, "no error"},
    {cudaErrorInvalidValue, "invalid argument"},
    {cudaErrorMemoryAllocation, "out of memory"},
    {cudaErrorInvalidConfiguration, "invalid configuration argument"},
    {cudaErrorInvalidDevice, "invalid device ordinal"},
    {cudaErrorInvalidDeviceFunction, "invalid device function"},
    {cudaErrorInvalidResourceHandle, "invalid resource handle"},
    {cudaErrorNotSupported, "operation not supported by the idle GPU"},
    {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureUnmatched, "the capture was not initiated in this stream"},
    {cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"},
};

std::mutex mutex;
std::map<const void*, Kernel> kernels;
thread_local cudaError_t last_error = cudaSuccess;
thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} call_configuration;

cudaError_t launch_function(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  Launch asked{nullptr, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, 0};
  {
    std::lock_guard<std::mutex> guard(mutex);
    auto kernel = kernels.find(function);
    if (kernel == kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
    asked.kernel = kernel->second.name.c_str();
    asked.shared_limit = static_cast<size_t>(kernel->second.shared_limit);
  }
  return launch(asked, stream) ? cudaSuccess : fail(cudaErrorInvalidConfiguration);
}
}  // namespace

namespace idle_gpu {
cudaError_t fail(cudaError_t status) { return last_error = status; }

int attribute(int which) {
  auto found = kAttributes.find(which);
  return found == kAttributes.end() ? 1 : found->second;
}

void* driver_function(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  if (driver == nullptr) return nullptr;
  void* second = dlsym(driver, (std::string(name) + "_v2").c_str());
  return second ? second : dlsym(driver, name);
}

bool launch(const Launch& asked, cudaStream_t stream) {
  static const bool trace = std::getenv("IDLE_GPU_TRACE") != nullptr;
  const size_t *grid = asked.grid, *block = asked.block, threads = block[0] * block[1] * block[2];
  bool grid_fits = grid[0] <= kGridX && grid[1] <= kGridYZ && grid[2] <= kGridYZ;
  bool block_fits = threads <= kThreadsPerBlock && block[2] <= kBlockZ;
  bool possible = grid_fits && block_fits && grid[0] * grid[1] * grid[2] * threads > 0;
  possible = possible && asked.shared <= asked.shared_limit;
  if (trace || !possible)
    complain("%s %s, grid %zu %zu %zu, block %zu %zu %zu, shared %zu of %zu", possible ? "launches" : "cannot launch",
             asked.kernel, grid[0], grid[1], grid[2], block[0], block[1], block[2], asked.shared, asked.shared_limit);
  if (possible) perform(stream, nullptr);
  return possible;
}
}  // namespace idle_gpu

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  return std::snprintf(id, static_cast<size_t>(size), "0000:00:00.0"), cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* to, int) {
  *to = {};
  std::snprintf(to->name, sizeof to->name, "%s", kName);
  to->totalGlobalMem = memory_limit();
  to->sharedMemPerBlock = kSharedDefault, to->sharedMemPerBlockOptin = kSharedOptin;
  to->sharedMemPerMultiprocessor = kSharedOptin + kSharedReserved, to->reservedSharedMemPerBlock = kSharedReserved;
  to->regsPerBlock = to->regsPerMultiprocessor = kRegisters;
  to->totalConstMem = 65536, to->l2CacheSize = kL2Bytes, to->memoryBusWidth = 6144, to->textureAlignment = 512;
  to->maxThreadsPerBlock = to->maxThreadsDim[0] = to->maxThreadsDim[1] = kThreadsPerBlock;
  to->maxThreadsDim[2] = kBlockZ, to->maxGridSize[0] = kGridX;
  to->maxGridSize[1] = to->maxGridSize[2] = kGridYZ;
  to->warpSize = 32, to->major = 9, to->minor = 0, to->multiProcessorCount = kMultiprocessors;
  to->maxThreadsPerMultiProcessor = 2048, to->maxBlocksPerMultiProcessor = 32;
  to->concurrentKernels = to->unifiedAddressing = to->cooperativeLaunch = to->ECCEnabled = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t status) { return status == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t status) {
  auto found = kErrors.find(status);
  return found == kErrors.end() ? "an error of the idle GPU" : found->second;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = driver_function(name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// What nvcc writes around kernels.
void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(std::calloc(1, sizeof(void*))); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** binary) { std::free(binary); }
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  std::lock_guard<std::mutex> guard(mutex);
  kernels[function].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return call_configuration = {grid, block, shared, static_cast<cudaStream_t>(stream)}, 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = call_configuration.grid, *block = call_configuration.block, *shared = call_configuration.shared;
  return *static_cast<cudaStream_t*>(stream) = call_configuration.stream, cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch_function(function, grid, block, shared, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch_function(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t stream) {
  return launch_function(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* asked, const void* function, void**) {
  return launch_function(function, asked->gridDim, asked->blockDim, asked->dynamicSmemBytes, asked->stream);
}
cudaError_t __cudaGetKernel(cudaKernel_t* to, const void* function) {
  return *to = static_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t cudaGetKernel(cudaKernel_t* to, const void* function) { return __cudaGetKernel(to, function); }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute which, int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kSharedOptin) return fail(cudaErrorInvalidValue);
  std::lock_guard<std::mutex> guard(mutex);
  return kernels[function].shared_limit = value, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* to, const void* function) {
  *to = {};
  to->maxThreadsPerBlock = kThreadsPerBlock, to->numRegs = 64, to->binaryVersion = to->ptxVersion = 90;
  std::lock_guard<std::mutex> guard(mutex);
  return to->maxDynamicSharedSizeBytes = kernels[function].shared_limit, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
  return *count = 2, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int, size_t) {
  return *count = 2, cudaSuccess;
}
}
