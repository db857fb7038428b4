// csrc/cuda/device.h for the CPU: the operators take CPU tensors, all of whose memory the kernels may touch.
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

namespace lorasp::cuda {

class DeviceScope {
 public:
  static constexpr const char* kName = "cpu";
  static bool holds(const Tensor& t) { return t.is_cpu(); }
  static constexpr auto addmm_out = &aoti_torch_cpu_addmm_out;

  explicit DeviceScope(const Tensor&) { emulation::GlobalMemory::instance().open(); }
  Device device() const { return {4, nullptr}; }
};

}  // namespace lorasp::cuda

#define LORASP_DISPATCH_KEY CPU
