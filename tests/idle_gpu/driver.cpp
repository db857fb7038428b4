// Stands in for libcuda.so.1, as far as torch, Inductor and Triton's launcher ask. Checked: launches, pointers that are
// not on the device, tensor maps (the rules of cuTensorMapEncodeTiled, and that the tensor lies in one allocation),
// modules loaded during a capture. What is not written here returns CUDA_ERROR_NOT_SUPPORTED.
#include <cuda.h>
#include <atomic>
#include <cstring>
#include <string>

#include "device.h"

namespace {
using namespace idle_gpu;

struct Function {
  std::string name;
  size_t shared_limit = kSharedDefault;
};

Function& function_of(CUfunction function) { return *reinterpret_cast<Function*>(function); }
const CUcontext kContext = reinterpret_cast<CUcontext>(0x10);

CUresult load_module(CUmodule* module) {
  static std::atomic<unsigned long long> modules{0};
  if (forbidden_by_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  return *module = reinterpret_cast<CUmodule>(modules += 16), CUDA_SUCCESS;
}

size_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 4;
  }
}

size_t swizzle_bytes(CUtensorMapSwizzle swizzle) {
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE) return SIZE_MAX;
  if (swizzle == CU_TENSOR_MAP_SWIZZLE_32B) return 32;
  return swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 128;
}

// Null if the map is right. Sizes in elements, strides in bytes.
const char* fault_of_map(size_t element, cuuint32_t rank, const void* base, const cuuint64_t* sizes,
                         const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, size_t swizzle) {
  if (rank < 1 || rank > 5) return "rank is not 1 to 5";
  if (reinterpret_cast<size_t>(base) % 16 != 0) return "the address is no multiple of 16";
  size_t extent = element;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) return "a size is not 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return "a side of the box is not 1 to 256";
    if (steps[i] < 1 || steps[i] > 8) return "an element stride is not 1 to 8";
    if (i > 0 && (strides[i - 1] % 16 != 0 || strides[i - 1] >= 1ull << 40)) return "a stride is no multiple of 16";
    extent += (sizes[i] - 1) * (i == 0 ? element : strides[i - 1]);
  }
  if (box[0] * element % 16 != 0) return "the box's rows are no multiple of 16 bytes";
  if (box[0] * element > swizzle) return "the box's rows are longer than the swizzle";
  return on_device(base, extent) ? nullptr : "the tensor does not lie in one allocation on the device";
}
}  // namespace

extern "C" {
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuGetProcAddress_v2(const char* name, void** to, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
  *to = driver_function(name);
  if (result) *result = *to ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *to ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetErrorString(CUresult status, const char** text) {
  return *text = cudaGetErrorString(static_cast<cudaError_t>(status)), CUDA_SUCCESS;  // of one numbering
}
CUresult cuGetErrorName(CUresult status, const char** text) { return cuGetErrorString(status, text); }

CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetName(char* to, int size, CUdevice) {
  return std::snprintf(to, static_cast<size_t>(size), "%s", kName), CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid* to, CUdevice) { return *to = {}, CUDA_SUCCESS; }
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return *bytes = memory_limit(), CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = kContext, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = kContext, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return *context = kContext, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

CUresult cuModuleLoad(CUmodule* module, const char*) { return load_module(module); }
CUresult cuModuleLoadData(CUmodule* module, const void*) { return load_module(module); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return load_module(module);
}
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* to, CUmodule, const char* name) {
  return *to = reinterpret_cast<CUfunction>(new Function{name}), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = 0;  // static shared memory, spills
  if (which == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 64;
  if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = kThreadsPerBlock;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  if (which != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > kSharedOptin) return CUDA_ERROR_INVALID_VALUE;
  return function_of(function).shared_limit = static_cast<size_t>(value), CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) {
  return *count = 2, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = kMultiprocessors, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void**, void**) {
  const Function& f = function_of(function);
  Launch asked{f.name.c_str(), {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, f.shared_limit};
  return launch(asked, stream) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, arguments, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                   CUstream stream, void** arguments) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments,
                        nullptr);
}
CUresult cuPointerGetAttribute(void* to, CUpointer_attribute which, CUdeviceptr p) {
  if (which != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  if (!on_device(reinterpret_cast<void*>(p), 1)) return CUDA_ERROR_INVALID_VALUE;
  return std::memcpy(to, &p, sizeof p), CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  *to = {};
  const char* fault = fault_of_map(element_bytes(type), rank, base, sizes, strides, box, steps, swizzle_bytes(swizzle));
  if (fault == nullptr) return CUDA_SUCCESS;
  complain("cannot make a tensor map of rank %u at %p, %llu elements a row: %s", rank, base,
           static_cast<unsigned long long>(sizes[0]), fault);
  return CUDA_ERROR_INVALID_VALUE;
}
}
