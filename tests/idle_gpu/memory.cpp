// Device memory: host memory, zeroed, no more of it than IDLE_GPU_MEMORY says (GiB; default: half of what the host has
// free). Copies and fills must stay inside one allocation, each end on the side that the copy's kind says.
#include <sys/mman.h>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "device.h"

namespace {
using namespace idle_gpu;
using Blocks = std::map<const char*, size_t>;

std::mutex mutex;
Blocks device_blocks, pinned_blocks;
size_t used = 0;

bool inside(const Blocks& blocks, const void* begin, size_t bytes) {
  std::lock_guard<std::mutex> guard(mutex);
  const char* at = static_cast<const char*>(begin);
  auto block = blocks.upper_bound(at);
  if (block == blocks.begin()) return false;
  --block;
  size_t offset = static_cast<size_t>(at - block->first);
  return offset < block->second && bytes <= block->second - offset;
}

bool pageable(const void* p) { return !inside(device_blocks, p, 1) && !inside(pinned_blocks, p, 1); }

bool end_is_right(const void* p, size_t bytes, bool device, bool either) {
  bool there = on_device(p, 1);
  return (either || there == device) && (!there || on_device(p, bytes));
}

cudaError_t check_copy(const void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  bool either = kind == cudaMemcpyDefault;
  if (bytes == 0) return cudaSuccess;
  if (end_is_right(to, bytes, to_device, either) && end_is_right(from, bytes, from_device, either)) return cudaSuccess;
  complain("cannot copy %zu bytes from %p to %p, kind %d: not inside one allocation there", bytes, from, to, int(kind));
  return fail(cudaErrorInvalidValue);
}

size_t free_on_host() {
  size_t kib = 0;
  char line[128];
  std::FILE* file = std::fopen("/proc/meminfo", "r");
  while (file && std::fgets(line, sizeof line, file)) std::sscanf(line, "MemAvailable: %zu kB", &kib);
  if (file) std::fclose(file);
  return kib * 1024;
}
}  // namespace

namespace idle_gpu {
bool on_device(const void* begin, size_t bytes) { return inside(device_blocks, begin, bytes); }

size_t memory_limit() {
  static const char* gib = std::getenv("IDLE_GPU_MEMORY");
  static const size_t limit = gib ? static_cast<size_t>(std::atof(gib) * (1 << 30)) : free_on_host() / 2;
  return limit;
}
}  // namespace idle_gpu

extern "C" {
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  std::lock_guard<std::mutex> guard(mutex);
  return *total = memory_limit(), *free = *total - used, cudaSuccess;
}
cudaError_t cudaMalloc(void** to, size_t bytes) {
  *to = nullptr;
  if (forbidden_by_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  std::lock_guard<std::mutex> guard(mutex);
  if (bytes > memory_limit() - used) return fail(cudaErrorMemoryAllocation);
  // Pages become the process's own as they are touched; cudaFree gives all of them back.
  void* block = mmap(nullptr, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  used += bytes;
  return device_blocks[static_cast<char*>(*to = block)] = bytes, cudaSuccess;
}
cudaError_t cudaFree(void* block) {
  if (block == nullptr) return cudaSuccess;
  if (forbidden_by_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  std::lock_guard<std::mutex> guard(mutex);
  auto found = device_blocks.find(static_cast<char*>(block));
  if (found == device_blocks.end()) return fail(cudaErrorInvalidValue);
  munmap(block, found->second ? found->second : 1);
  used -= found->second;
  return device_blocks.erase(found), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  if (posix_memalign(to, 4096, bytes ? bytes : 1) != 0) return fail(cudaErrorMemoryAllocation);
  std::lock_guard<std::mutex> guard(mutex);
  return pinned_blocks[static_cast<char*>(*to)] = bytes, cudaSuccess;
}
cudaError_t cudaMallocHost(void** to, size_t bytes) { return cudaHostAlloc(to, bytes, 0); }
cudaError_t cudaFreeHost(void* block) {
  std::lock_guard<std::mutex> guard(mutex);
  pinned_blocks.erase(static_cast<char*>(block));
  return std::free(block), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* p) {
  *to = {};
  bool device = on_device(p, 1);
  to->type = device ? cudaMemoryTypeDevice : pageable(p) ? cudaMemoryTypeUnregistered : cudaMemoryTypeHost;
  (device ? to->devicePointer : to->hostPointer) = const_cast<void*>(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (forbidden_by_capture()) return fail(cudaErrorStreamCaptureUnsupported);
  if (cudaError_t status = check_copy(to, from, bytes, kind)) return status;
  return std::memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (cudaError_t status = check_copy(to, from, bytes, kind)) return status;
  if (pageable(to) || pageable(from)) {  // such a copy waits for the stream
    if (cudaError_t status = wait_for(stream)) return status;
  }
  return perform(stream, [=] { std::memmove(to, from, bytes); });
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; ++row) {
    char* target = static_cast<char*>(to) + row * to_pitch;
    const char* source = static_cast<const char*>(from) + row * from_pitch;
    if (cudaError_t status = cudaMemcpyAsync(target, source, width, kind, stream)) return status;
  }
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (bytes > 0 && !on_device(to, bytes)) return fail(cudaErrorInvalidValue);
  return perform(stream, [=] { std::memset(to, value, bytes); });
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, nullptr); }
}
