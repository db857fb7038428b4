// Every kernel of the linear operators, compiled once for the three of them.
#include "lora_linear_launch.cuh"

namespace lorasp::cuda {

#define LORASP_INSTANTIATE(T)                                                                                          \
  template int64_t project_workspace<T>(const Device&, int64_t, int64_t, const std::vector<int64_t>&, bool);           \
  template int64_t outer_workspace<T>(const Device&, int64_t, int64_t, const std::vector<int64_t>&, bool);             \
  template int64_t project_outer_workspace<T>(const Device&, int64_t, int64_t, int64_t);                               \
  template void project(const Device&, const Matrix<const T>&, const std::vector<Projection<T>>&, bool,                \
                        const Dropout&, const Selection&, T*, float*);                                                 \
  template void outer(const Device&, const Matrix<const T>&, const std::vector<Contraction<T>>&, bool, const Dropout&, \
                      const int64_t*, int64_t, const Selection&, float*);                                              \
  template bool one_pass_over_dy<T>(int64_t, int64_t, int64_t, int64_t);                                               \
  template void project_outer(const Device&, const Matrix<const T>&, const Projection<T>&, const Matrix<const T>&,     \
                              const Selection&, const Gradient&, float*);                                              \
  template void accumulate(const Device&, const std::vector<Expansion<T>>&, bool, const Dropout&, const T*, bool,      \
                           const Matrix<T>&);                                                                          \
  template void make_factors(const Device&, const std::vector<FactorPart<T>>&);

LORASP_INSTANTIATE(float)
LORASP_INSTANTIATE(bf16)
LORASP_INSTANTIATE(f16)

void find_positions(const Device& device, const PositionArgs& args) {
  launch(lora_linear_positions_kernel, {ceil_div(args.size, kThreads)}, kThreads, 0, device.stream, args);
}

}  // namespace lorasp::cuda
