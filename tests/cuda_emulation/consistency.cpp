// consistency's kernels alone, for ctypes.
#include "consistency_launch.cuh"
#include "harness.h"

using namespace lorasp::cuda;

namespace {

struct Operand {
  void* data;
  int64_t stride_b, stride_t;
};

template <class T>
LogitRows<T> rows_of(const Operand& o, int64_t B, int64_t T_, int64_t V) {
  if (!o.data) return {};
  const int64_t last = (B - 1) * o.stride_b + (T_ - 1) * o.stride_t + V;
  provide(o.data, last * static_cast<int64_t>(sizeof(T)), !std::is_const_v<T>);
  return {static_cast<T*>(o.data), o.stride_b, o.stride_t};
}

}  // namespace

extern "C" {

const char* emulated_consistency_forward(int dtype, int sm_count, int64_t B, int64_t T_, int64_t V, Operand a,
                                         Operand b, const uint8_t* mask, bool symmetric, float* rows, float* stats) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Device device{sm_count, nullptr};
      if (mask) provide(mask, B * T_, false);
      provide(rows, B * T_ * 4, true), provide(stats, B * T_ * kStats * 4, true);
      std::vector<float> workspace(static_cast<size_t>(consistency_workspace<T>(device, B * T_, V)), NAN);
      provide(workspace.data(), static_cast<int64_t>(workspace.size()) * 4, true);
      consistency_forward<T>(device, B, T_, V, rows_of<const T>(a, B, T_, V), rows_of<const T>(b, B, T_, V),
                             {mask, symmetric, rows, stats}, workspace.data());
    });
  });
}

// in_place: the gradients that are needed are written where a and b are.
const char* emulated_consistency_backward(int dtype, int64_t B, int64_t T_, int64_t V, Operand a, Operand b, Operand da,
                                          Operand db, bool in_place, const float* drows, const float* stats,
                                          const uint8_t* mask, bool symmetric) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      if (mask) provide(mask, B * T_, false);
      provide(drows, B * T_ * 4, false), provide(stats, B * T_ * kStats * 4, false);
      const LogitRows<T> to_a = rows_of<T>(da, B, T_, V), to_b = rows_of<T>(db, B, T_, V);
      const auto from = [&](const Operand& o, const LogitRows<T>& to) {
        return in_place && to.data ? LogitRows<const T>{to.data, to.stride_b, to.stride_t}
                                   : rows_of<const T>(o, B, T_, V);
      };
      consistency_backward<T>({4, nullptr}, B, T_, V,
                              {from(a, to_a), from(b, to_b), to_a, to_b, {}, {}, 0, 0, drows, stats, mask, symmetric});
    });
  });
}

// The last block of the backward over T rows of which all a and all b are the same memory (stride 0); drows, stats and
// da are those of the last `count` rows.
const char* emulated_consistency_end(int64_t T_, int64_t V, const bf16* a, const bf16* b, const float* drows,
                                     const float* stats, bf16* da, int64_t count) {
  return emulated([&] {
    emulation::GlobalMemory::instance().open();
    emulation::last_block_only() = true;
    const int64_t before = T_ - count;
    consistency_backward<bf16>({4, nullptr}, 1, T_, V,
                               {{a, 0, 0},
                                {b, 0, 0},
                                {da - before * V, 0, V},
                                {},
                                {},
                                {},
                                0,
                                0,
                                drows - before,
                                stats - before * kStats,
                                nullptr,
                                true});
  });
}

int64_t emulated_consistency_parts(int dtype, int sm_count, int64_t rows, int64_t V) {
  int64_t parts = 0;
  with_type(dtype, [&]<class T>(T) { parts = consistency_split<T>({sm_count, nullptr}, rows, V).parts; });
  return parts;
}
}
