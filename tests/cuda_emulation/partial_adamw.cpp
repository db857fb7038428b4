// partial_adamw's kernels alone, for ctypes.
#include "harness.h"
#include "partial_adamw.cuh"

using namespace lorasp::cuda;

namespace {

struct Operand {
  void *param, *grad, *exp_avg, *exp_avg_sq;
  int32_t* steps;
  const uint8_t* active;
  int64_t P, Q;
  int grain;
};

template <class T>
void step(const Operand* operands, int64_t count, const AdamWHyper& hyper) {
  std::vector<AdamWItem<T>> items;
  for (const Operand* o = operands; o < operands + count; ++o) {
    AdamWItem<T> item{static_cast<T*>(o->param),
                      static_cast<const T*>(o->grad),
                      static_cast<T*>(o->exp_avg),
                      static_cast<T*>(o->exp_avg_sq),
                      o->steps,
                      o->active,
                      0,
                      0,
                      Divider(),
                      Grain::kAll,
                      0,
                      0};
    shape_item(item, o->P, o->Q, static_cast<Grain>(o->grain));
    for (void* written : {o->param, o->exp_avg, o->exp_avg_sq})
      provide(written, item.size * static_cast<int64_t>(sizeof(T)), true);
    provide(o->grad, item.size * static_cast<int64_t>(sizeof(T)), false);
    provide(o->steps, item.counters * 4, true);
    if (o->active) provide(o->active, item.counters, false);
    items.push_back(item);
  }
  partial_adamw<T>({4, nullptr}, items.data(), count, hyper);
}

}  // namespace

extern "C" const char* emulated_partial_adamw(int dtype, const Operand* operands, int64_t count, double lr,
                                              double beta1, double beta2, double eps, double weight_decay) {
  return emulated([&] {
    const AdamWHyper hyper = adamw_hyper(lr, beta1, beta2, eps, weight_decay);
    with_type(dtype, [&]<class T>(T) { step<T>(operands, count, hyper); });
  });
}
