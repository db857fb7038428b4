#include <stdexcept>
#include <string>

#include "primitives.cuh"

namespace lorasp::cuda {

void check_launch(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next one who asks for it, torch for example, finds this error
  throw std::runtime_error(std::string("lorasp: CUDA refuses (") + what + "): " + cudaGetErrorString(status));
}

}  // namespace lorasp::cuda
