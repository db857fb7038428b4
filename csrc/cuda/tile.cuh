// Tiles of a matrix in shared memory, their dropout, and the products of one warp over them: what the kernels of
// lora_linear share.
//
// A block has kThreads threads and walks p (M, C), which is x or dy, kBlockC columns at a time. The unit of every copy
// is kUnit elements in one row: the elements whose keep bits one Philox counter makes. Each thread copies, and masks,
// the same units of every tile, so that it needs no barrier between the two.
#pragma once
#include "primitives.cuh"

namespace lorasp::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlockC = 64;
constexpr int kUnit = 8;
// Bytes of shared memory per block that every GPU from sm_80 on has; sm_86, sm_89 and sm_120 have no more.
constexpr int kSharedLimit = 101376;

// One 16-byte word between rows: eight rows then lie in different banks (the widths in use are multiples of 16).
template <class T>
LORASP_HOST_DEVICE constexpr int tile_stride(int columns) {
  return columns + static_cast<int>(16 / sizeof(T));
}
template <class T>
LORASP_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) {
  return rows * tile_stride<T>(columns) * static_cast<int>(sizeof(T));
}

// Members of a group that one launch serves.
constexpr int kMembers = 4;

// Where kernels are launched.
struct Device {
  int sm_count;
  Stream stream;
};

// Row-major, unit column stride. aligned: data and stride lie at multiples of 16 bytes.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, cols, stride;
  bool aligned;
};

__device__ inline int valid_columns(int64_t col, int64_t cols) {
  const int64_t left = cols - col;
  return left >= kUnit ? kUnit : left > 0 ? static_cast<int>(left) : 0;
}

// tile (kRows, kCols) = m[row ..., col ...], zeros outside of m. Complete after commit_copies, wait_for_copies, a
// barrier.
template <int kRows, int kCols, class T>
__device__ void load_tile(Shared<T> tile, const Matrix<const T>& m, int64_t row, int64_t col) {
  constexpr int kUnits = kCols / kUnit, kStride = tile_stride<T>(kCols), kCopy = 16 / static_cast<int>(sizeof(T));
  for (int u = threadIdx.x; u < kRows * kUnits; u += kThreads) {
    const int64_t r = row + u / kUnits, c = col + u % kUnits * kUnit;
    const int valid = r < m.rows ? valid_columns(c, m.cols) : 0;
    const T* from = valid ? m.data + r * m.stride + c : m.data;
    const Shared<T> to = tile + (u / kUnits * kStride + u % kUnits * kUnit);
    if (m.aligned) {
#pragma unroll
      for (int i = 0; i < kUnit; i += kCopy) {
        const int count = valid - i > kCopy ? kCopy : valid - i > 0 ? valid - i : 0;
        copy_async16<T>(to + i, count ? from + i : m.data, count * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = i < valid ? load_global(from + i) : T{};
    }
  }
}

// The keep bits of elements start ... start + 7.
__device__ inline uint32_t keep_bits(const KeepMask& keep, uint64_t start) {
  const uint32_t shift = static_cast<uint32_t>(start % 8);
  uint32_t bits = keep_byte(keep, start / 8);
  if (shift != 0) bits |= static_cast<uint32_t>(keep_byte(keep, start / 8 + 1)) << 8;
  return bits >> shift;
}

// Zeroes the elements of one unit, NaN too, whose bit is 0.
template <class T>
__device__ void mask_unit(Shared<T> unit, uint32_t bits) {
  constexpr int kCopy = 16 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int i = 0; i < kUnit; i += kCopy) {
    Words words = load_shared16<T>(unit + i);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (sizeof(T) == 2) {
        words.word[w] &= (bits & 1 ? 0xFFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u);
        bits >>= 2;
      } else {
        if (!(bits & 1)) words.word[w] = 0;
        bits >>= 1;
      }
    }
    store_shared16<T>(unit + i, words);
  }
}

// Zeroes this thread's dropped elements (NaN too) of a tile that load_tile filled and whose copies it waited for.
// columns: of the mask's logical shape. One Philox call per unit where `columns` is a multiple of kUnit, else two.
template <int kRows, int kCols, class T>
__device__ void drop_tile(Shared<T> tile, const KeepMask& keep, int64_t row, int64_t col, int64_t columns) {
  constexpr int kUnits = kCols / kUnit, kStride = tile_stride<T>(kCols);
  for (int u = threadIdx.x; u < kRows * kUnits; u += kThreads) {
    const int64_t start = (row + u / kUnits) * columns + col + u % kUnits * kUnit;
    mask_unit<T>(tile + (u / kUnits * kStride + u % kUnits * kUnit), keep_bits(keep, static_cast<uint64_t>(start)));
  }
}

// drop_tile for a matrix of selected columns: its column c is column index[c] of the mask. A unit whose columns follow
// one another takes drop_tile's Philox calls, any other one per group of eight that it touches.
template <int kRows, int kCols, class T>
__device__ void drop_selected_tile(Shared<T> tile, const KeepMask& keep, int64_t row, int64_t col, int64_t cols,
                                   const int64_t* index, int64_t columns) {
  constexpr int kUnits = kCols / kUnit, kStride = tile_stride<T>(kCols);
  static_assert(kThreads % kUnits == 0);  // the units of a thread lie one under another
  const int64_t c = col + static_cast<int>(threadIdx.x) % kUnits * kUnit;
  const int valid = valid_columns(c, cols);
  if (valid == 0) return;
  const int64_t first = load_global(index + c);
  const bool run = load_global(index + (c + valid - 1)) - first == valid - 1;
  for (int u = threadIdx.x; u < kRows * kUnits; u += kThreads) {
    const uint64_t start = static_cast<uint64_t>((row + u / kUnits) * columns);
    uint32_t bits = 0;
    if (run) {
      bits = keep_bits(keep, start + static_cast<uint64_t>(first));
    } else {
      uint64_t group = ~uint64_t{0};
      uint32_t byte = 0;
#pragma unroll 1
      for (int i = 0; i < valid; ++i) {
        const uint64_t element = start + static_cast<uint64_t>(load_global(index + (c + i)));
        if (element / 8 != group) {
          group = element / 8;
          byte = keep_byte(keep, group);
        }
        bits |= (byte >> element % 8 & 1) << i;
      }
    }
    mask_unit<T>(tile + (u / kUnits * kStride + u % kUnits * kUnit), bits);
  }
}

// Where element i (0 to 3) of a warp's 16 x 8 accumulator lies, for lane threadIdx.x % 32.
__device__ inline int fragment_row(int i) { return static_cast<int>(threadIdx.x) % 32 / 4 + i / 2 * 8; }
__device__ inline int fragment_col(int i) { return static_cast<int>(threadIdx.x) % 4 * 2 + i % 2; }

// acc (16 x 8) += a (16 x kK) b (kK x 8) by one warp, accumulated in fp32. a[i][k] lies at tile[i * stride + k], where
// transposed at tile[k * stride + i]; b[k][j] at tile[k * stride + j], where transposed at tile[j * stride + k].
template <class T>
struct Product {
  static constexpr int kK = 16;
  struct A {
    uint32_t word[4];
  };
  struct B {
    uint32_t word[2];
  };

  static __device__ A load_a(Shared<T> tile, int stride, bool transposed) {
    const int lane = threadIdx.x % 32;
    A a;
    if (transposed)
      load_matrices<true, T>(a.word, tile + ((lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8));
    else
      load_matrices<false, T>(a.word, tile + (lane % 16 * stride + lane / 16 * 8));
    return a;
  }
  static __device__ B load_b(Shared<T> tile, int stride, bool transposed) {
    const int lane = threadIdx.x % 32;
    B b;
    if (transposed)
      load_matrices<false, T>(b.word, tile + (lane % 8 * stride + lane / 8 % 2 * 8));
    else
      load_matrices<true, T>(b.word, tile + lane % 16 * stride);
    return b;
  }
  static __device__ void accumulate(float (&acc)[4], const A& a, const B& b) {
    multiply_matrices<T>(acc, a.word, b.word);
  }
};

// ieee fp32: no tensor core multiplies it without rounding its inputs.
template <>
struct Product<float> {
  static constexpr int kK = 4;
  struct A {
    float value[2][kK];
  };
  struct B {
    float value[2][kK];
  };

  static __device__ A load_a(Shared<float> tile, int stride, bool transposed) {
    A a;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int k = 0; k < kK; ++k)
        a.value[i][k] = transposed ? tile[k * stride + fragment_row(2 * i)] : tile[fragment_row(2 * i) * stride + k];
    return a;
  }
  static __device__ B load_b(Shared<float> tile, int stride, bool transposed) {
    B b;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int k = 0; k < kK; ++k)
        b.value[j][k] = transposed ? tile[fragment_col(j) * stride + k] : tile[k * stride + fragment_col(j)];
    return b;
  }
  static __device__ void accumulate(float (&acc)[4], const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < kK; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] = multiply_add(a.value[i / 2][k], b.value[i % 2][k], acc[i]);
  }
};

}  // namespace lorasp::cuda
