// The CUDA operators on the emulator: all of csrc/cuda/*.cu for CPU tensors, as torch.ops.lorasp.<op>_cuda, and for
// ctypes every launcher of csrc/cuda/lora_linear_launch.h in every dtype.
#include "consistency.cu"
#include "dropkey_attention.cu"
#include "hidden_cut.cu"
#include "lora_linear.cu"
#include "lora_linear_group.cu"
#include "lora_linear_launch.cu"
#include "lora_update.cu"
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

// One member's operands and results; unused fields are zero.
struct Member {
  Operand q, h;
  int64_t R;
  float scale;
  uint32_t word;
  void* out;
  int64_t out_stride;
};

// Where a gradient stands: see Gradient.
struct Place {
  void* out;
  int64_t size;
  bool fp32;
  const uint8_t* mask;
  const int64_t* entries;
  int64_t entry_count;
  const int* position;
  int64_t extent;

  Gradient as(int64_t element_size, int64_t positions) const {
    if (out) provide(out, size * (fp32 ? 4 : element_size), true);
    if (mask) provide(mask, size, false);
    if (entries) provide(entries, entry_count * 8, false);
    if (position) provide(position, positions * 4, false);
    return {out, fp32, mask, entries, entry_count, position, extent};
  }
};

struct Chosen {
  const int* position;
  int64_t count;

  Selection as(int64_t columns) const {
    if (position) provide(position, columns * 4, false);
    return {position, count};
  }
};

const char* emulated_project(int dtype, int sm_count, Operand p, int count, const Member* members, bool rank_first,
                             const int64_t* seed, uint32_t threshold, Chosen chosen, void* columns) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Device device{sm_count, nullptr};
      std::vector<Projection<T>> projections;
      std::vector<int64_t> R;
      for (int i = 0; i < count; ++i) {
        const Member& m = members[i];
        provide(m.out, ((p.rows - 1) * m.out_stride + m.R) * static_cast<int64_t>(sizeof(T)), true);
        projections.push_back({m.q.as<T>(), m.R, m.scale, m.word, static_cast<T*>(m.out), m.out_stride});
        R.push_back(m.R);
      }
      if (columns) provide(columns, p.rows * chosen.count * static_cast<int64_t>(sizeof(T)), true);
      const int64_t floats = project_workspace<T>(device, p.rows, p.cols, R, threshold > 0);
      project<T>(device, p.as<T>(), projections, rank_first, dropout_of(seed, threshold, 0), chosen.as(p.cols),
                 static_cast<T*>(columns), workspace(floats).data());
    });
  });
}

const char* emulated_outer(int dtype, int sm_count, Operand p, int count, const Member* members, const Place* places,
                           bool rank_first, const int64_t* seed, uint32_t threshold, const int64_t* columns,
                           int64_t mask_columns, Chosen chosen) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Device device{sm_count, nullptr};
      std::vector<Contraction<T>> contractions;
      std::vector<int64_t> R;
      if (columns) provide(columns, p.cols * 8, false);
      for (int i = 0; i < count; ++i) {
        const int64_t positions = rank_first ? mask_columns : p.cols;
        contractions.push_back({members[i].h.as<T>(), members[i].word, places[i].as(sizeof(T), positions)});
        R.push_back(members[i].h.cols);
      }
      const int64_t floats = outer_workspace<T>(device, p.rows, p.cols, R, threshold > 0);
      outer<T>(device, p.as<T>(), contractions, rank_first, dropout_of(seed, threshold, 0), columns, mask_columns,
               chosen.as(p.cols), workspace(floats).data());
    });
  });
}

const char* emulated_project_outer(int dtype, int sm_count, Operand dy, Member g, Operand xa, Place place,
                                   Chosen chosen) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Device device{sm_count, nullptr};
      provide(g.out, ((dy.rows - 1) * g.out_stride + g.R) * static_cast<int64_t>(sizeof(T)), true);
      project_outer<T>(device, dy.as<T>(), {g.q.as<T>(), g.R, g.scale, 0, static_cast<T*>(g.out), g.out_stride},
                       xa.as<T>(), chosen.as(dy.cols), place.as(sizeof(T), dy.cols),
                       workspace(project_outer_workspace<T>(device, dy.rows, dy.cols, g.R)).data());
    });
  });
}

const char* emulated_accumulate(int dtype, int sm_count, int count, const Member* members, bool rank_first,
                                const int64_t* seed, uint32_t threshold, const void* bias, bool add, Operand out) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      const Matrix<T> into = matrix(static_cast<T*>(const_cast<void*>(out.data)), out.rows, out.cols, out.stride);
      if (bias) provide(bias, out.cols * static_cast<int64_t>(sizeof(T)), false);
      std::vector<Expansion<T>> expansions;
      for (int i = 0; i < count; ++i)
        expansions.push_back({members[i].h.as<T>(), members[i].q.as<T>(), members[i].word});
      accumulate<T>({sm_count, nullptr}, expansions, rank_first, dropout_of(seed, threshold, 0),
                    static_cast<const T*>(bias), add, into);
    });
  });
}

// trains: 0 whole, 1 columns, 2 rows, 3 entries.
const char* emulated_factor(int dtype, int trains, const void* lora, int64_t lora_size, bool lora_fp32,
                            const void* frozen, bool frozen_fp32, const int64_t* index, int64_t count, int64_t rows,
                            int64_t cols, void* out) {
  return emulated([&] {
    with_type(dtype, [&]<class T>(T) {
      constexpr int64_t size = sizeof(T);
      provide(lora, lora_size * (lora_fp32 ? 4 : size), false);
      if (frozen) provide(frozen, rows * cols * (frozen_fp32 ? 4 : size), false);
      if (index) provide(index, count * 8, false);
      provide(out, rows * cols * size, true);
      make_factors<T>({4, nullptr}, {{static_cast<Trains>(trains),
                                      {lora, lora_fp32},
                                      {frozen, frozen_fp32},
                                      index,
                                      count,
                                      rows,
                                      cols,
                                      static_cast<T*>(out)}});
    });
  });
}

const char* emulated_positions(const int64_t* index, int64_t count, int64_t size, int* position) {
  return emulated([&] {
    provide(index, count * 8, false);
    provide(position, size * 4, true);
    find_positions({4, nullptr}, {index, count, size, position});
  });
}

bool emulated_one_pass_over_dy(int dtype, int64_t M, int64_t N, int64_t R, int64_t selected) {
  bool answer = false;
  with_type(dtype, [&]<class T>(T) { answer = one_pass_over_dy<T>(M, N, R, selected); });
  return answer;
}
}
