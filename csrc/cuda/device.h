// Device and stream of a call.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>

namespace lorasp::cuda {

// Makes a tensor's device the current one for as long as it lives.
class DeviceScope {
 public:
  static constexpr const char* kName = "cuda";
  static bool holds(const Tensor& t) { return t.is_cuda(); }
  static constexpr auto addmm_out = &aoti_torch_cuda_addmm_out;

  explicit DeviceScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    device_.stream = static_cast<cudaStream_t>(stream);
    check_launch(cudaDeviceGetAttribute(&device_.sm_count, cudaDevAttrMultiProcessorCount, t.get_device_index()),
                 "multiprocessor count");
  }
  const Device& device() const { return device_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_{};
};

}  // namespace lorasp::cuda

#define LORASP_DISPATCH_KEY CUDA
