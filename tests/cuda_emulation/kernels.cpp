// The CUDA operators on the emulator: all of csrc/cuda/*.cu for CPU tensors, as torch.ops.lorasp.<op>_cuda, and for
// ctypes every launcher of csrc/cuda/lora_linear_launch.cuh in every dtype.
#include "consistency.cu"
#include "dropkey_attention.cu"
#include "hidden_cut.cu"
#include "lora_linear.cu"
#include "partial_adamw.cu"
#include "harness.h"

using namespace lorasp::cuda;

namespace {

// data at `data`, readable up to the end of the last row.
template <class T>
Matrix<T> matrix(T* data, int64_t rows, int64_t cols, int64_t stride) {
  const bool writable = !std::is_const_v<T>;
  if (rows > 0) provide(data, ((rows - 1) * stride + cols) * static_cast<int64_t>(sizeof(T)), writable);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  return {data, rows, cols, stride, aligned};
}

Dropout dropout_of(const int64_t* seed, uint32_t threshold, uint32_t member) {
  if (seed) provide(seed, 8, false);
  return {{0, 0, member, threshold}, seed};
}

std::vector<float>& workspace(int64_t floats) {
  static std::vector<float> memory;
  memory.assign(static_cast<size_t>(floats), NAN);
  provide(memory.data(), floats * 4, true);
  return memory;
}

template <class F>
void with_type(int dtype, F&& f) {
  if (dtype == 0) f(float());
  if (dtype == 1) f(bf16());
  if (dtype == 2) f(f16());
}

struct Operand {
  const void* data;
  int64_t rows, cols, stride;

  template <class T>
  Matrix<const T> as() const {
    return matrix(static_cast<const T*>(data), rows, cols, stride);
  }
};

}  // namespace

extern "C" {

const char* emulated_project(int dtype, int sm_count, Operand p, Operand q, bool rank_first, int64_t R, float scale,
                             const int64_t* seed, uint32_t threshold, uint32_t member, void* h) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Device device{sm_count, nullptr};
      provide(h, p.rows * R * static_cast<int64_t>(sizeof(T)), true);
      project<T>(device, p.as<T>(), q.as<T>(), rank_first, R, scale, dropout_of(seed, threshold, member),
                 static_cast<T*>(h), workspace(project_workspace<T>(device, p.rows, p.cols, R)).data());
    });
  });
}

const char* emulated_outer(int dtype, int sm_count, Operand p, Operand h, bool rank_first, const int64_t* seed,
                           uint32_t threshold, uint32_t member, const uint8_t* mask, int out_dtype, void* out) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      with_type(out_dtype, [&]<class Out>(Out) {
        const Device device{sm_count, nullptr};
        if (mask) provide(mask, p.cols * h.cols, false);
        provide(out, p.cols * h.cols * static_cast<int64_t>(sizeof(Out)), true);
        outer<T, Out>(device, p.as<T>(), h.as<T>(), rank_first, dropout_of(seed, threshold, member), mask,
                      static_cast<Out*>(out), workspace(outer_workspace<T>(device, p.rows, p.cols, h.cols)).data());
      });
    });
  });
}

const char* emulated_project_outer(int dtype, int sm_count, Operand dy, Operand lora_B, Operand xa, float scale,
                                   const uint8_t* mask, void* g, int out_dtype, void* dlora_B) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      with_type(out_dtype, [&]<class Out>(Out) {
        const Device device{sm_count, nullptr};
        if (mask) provide(mask, dy.cols * xa.cols, false);
        provide(g, dy.rows * xa.cols * static_cast<int64_t>(sizeof(T)), true);
        provide(dlora_B, dy.cols * xa.cols * static_cast<int64_t>(sizeof(Out)), true);
        project_outer<T, Out>(device, dy.as<T>(), lora_B.as<T>(), xa.as<T>(), scale, mask, static_cast<T*>(g),
                              static_cast<Out*>(dlora_B),
                              workspace(project_outer_workspace<T>(device, dy.rows, dy.cols, xa.cols)).data());
      });
    });
  });
}

const char* emulated_accumulate(int dtype, int sm_count, Operand h, Operand q, bool rank_first, const int64_t* seed,
                                uint32_t threshold, uint32_t member, const void* bias, Operand out) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Matrix<T> into = matrix(static_cast<T*>(const_cast<void*>(out.data)), out.rows, out.cols, out.stride);
      if (bias) provide(bias, out.cols * static_cast<int64_t>(sizeof(T)), false);
      accumulate<T>({sm_count, nullptr}, h.as<T>(), q.as<T>(), rank_first, dropout_of(seed, threshold, member),
                    static_cast<const T*>(bias), into);
    });
  });
}

bool emulated_one_pass_over_dy(int dtype, int64_t M, int64_t N, int64_t R) {
  bool answer = false;
  with_type(dtype, [&]<class T>(T) { answer = one_pass_over_dy<T>(M, N, R); });
  return answer;
}
}
