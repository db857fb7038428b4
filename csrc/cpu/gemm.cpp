// Blocking of gemm.h: a thread packs a block of rows once, small enough for its L2, and streams panels of packed w past
// it. Few rows: each thread packs its own panels just before use and w never makes a round trip through memory.
#include "gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace lorasp {
namespace {

constexpr int64_t kRowBlockBytes = 1 << 20;   // packed rows of one thread: half of a 2 MiB L2
constexpr int64_t kChunkBytes = 8 << 20;      // packed w that is alive at a time
constexpr int64_t kSegmentBytes = 8 << 10;    // depth of one packed row before accumulators spill to memory

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Scratch that lives as long as its thread and grows on demand: no page faults of a fresh allocation per call.
class Scratch {
 public:
  unsigned char* get(int64_t bytes) {
    if (bytes > capacity_) {
      capacity_ = round_up(bytes, 4096);
      memory_.reset(static_cast<unsigned char*>(std::aligned_alloc(4096, capacity_)));
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  int64_t capacity_ = 0;
};

thread_local Scratch shared_scratch;  // of the calling thread, read by all
thread_local Scratch rows_scratch, panel_scratch, accumulator_scratch, bits_scratch;

// Sizes in bytes and steps that every phase needs.
struct Layout {
  const GemmKernel& kernel;
  const GemmParams& p;
  int64_t steps = ceil_div(p.D, kernel.kr);
  int64_t extra_steps = ceil_div(p.R, kernel.kr);
  int64_t panels = ceil_div(p.N, kernel.nr);
  int64_t row_blocks = ceil_div(p.M, kernel.mr);
  int64_t a_step = kernel.mr * kernel.kr * kernel.element_size;
  int64_t b_step = kernel.nr * kernel.kr * kernel.element_size;
  int64_t segment = std::max<int64_t>(1, kSegmentBytes / (kernel.kr * kernel.element_size));
  int64_t keep_stride = round_up(panels * kernel.nr, 64) / 8;

  const unsigned char* row(int64_t block, int64_t step) const {
    return static_cast<const unsigned char*>(p.a) + (block * kernel.mr * p.lda + step * kernel.kr) * kernel.element_size;
  }
  void pack_panel(int64_t panel, void* out) const {
    const int64_t n = panel * kernel.nr;
    const int64_t offset = p.depth_contiguous ? n * p.ldw : n;
    kernel.pack_panel(static_cast<const unsigned char*>(p.w) + offset * kernel.element_size, p.ldw, p.depth_contiguous,
                      std::min(kernel.nr, p.N - n), p.D, out);
  }
  void pack_extra(int64_t panel, void* out) const {
    const int64_t n = panel * kernel.nr;
    const int64_t offset = p.p_depth_contiguous ? n * p.ldp : n;
    kernel.pack_panel(static_cast<const unsigned char*>(p.p) + offset * kernel.element_size, p.ldp, p.p_depth_contiguous,
                      std::min(kernel.nr, p.N - n), p.R, out);
  }
};

// Rows [first, first + blocks) of row blocks, packed: main depth of one segment, then the low-rank depth, then bits.
struct Rows {
  unsigned char* main;
  unsigned char* extra;
  unsigned char* bits;
};

void pack_row_block(const Layout& l, int64_t block, int64_t segment_first, int64_t segment_steps, void* out) {
  const int64_t rows = std::min(l.kernel.mr, l.p.M - block * l.kernel.mr);
  const int64_t depth = std::min(segment_steps * l.kernel.kr, l.p.D - segment_first * l.kernel.kr);
  l.kernel.pack_rows(l.row(block, segment_first), l.p.lda, rows, depth, out);
}

void pack_row_extra(const Layout& l, int64_t block, void* out, unsigned char* bits) {
  const int64_t m = block * l.kernel.mr, rows = std::min(l.kernel.mr, l.p.M - m);
  l.kernel.pack_rows(static_cast<const unsigned char*>(l.p.s) + m * l.p.R * l.kernel.element_size, l.p.R, rows, l.p.R,
                     out);
  if (bits)
    for (int64_t r = 0; r < rows; ++r) l.p.keep->fill(m + r, bits + r * l.keep_stride);
}

// All row blocks of `rows` against one panel, over one segment of the depth. c: one accumulator tile per row block
// where the depth has several segments, otherwise one per member of a group.
void multiply_panel(const Layout& l, const Rows& rows, int64_t first_block, int64_t blocks, int64_t panel,
                    const unsigned char* b, const unsigned char* extra_b, int64_t segment_steps, bool first_segment,
                    bool last_segment, const float* bias, float* c, bool c_per_block) {
  const GemmKernel& k = l.kernel;
  const int64_t tile = k.mr * k.nr, n = panel * k.nr, columns = std::min(k.nr, l.p.N - n);
  for (int64_t group = 0; group < blocks; group += k.group) {
    const int64_t end = std::min(group + k.group, blocks);
    for (int64_t step = 0; step < segment_steps; step += k.group_steps) {
      const int64_t count = std::min(k.group_steps, segment_steps - step);
      const bool first = first_segment && step == 0, last = last_segment && step + count == segment_steps;
      for (int64_t i = group; i < end; ++i) {
        float* acc = c + (c_per_block ? i : i - group) * tile;
        const unsigned char* extra_a = rows.extra + i * l.extra_steps * l.a_step;
        if (first && rows.bits) {  // the masked low-rank term is where the accumulator starts
          k.block(nullptr, nullptr, 0, extra_a, extra_b, l.extra_steps, false, acc);
          k.select(rows.bits + i * k.mr * l.keep_stride + n / 8, l.keep_stride, acc);
        }
        k.block(rows.main + (i * segment_steps + step) * l.a_step, b + step * l.b_step, count, extra_a, extra_b,
                last && !rows.bits ? l.extra_steps : 0, !first || rows.bits, acc);
        if (last) {
          const int64_t m = (first_block + i) * k.mr;
          k.store(acc, std::min(k.mr, l.p.M - m), columns, bias ? bias + n : nullptr,
                  static_cast<unsigned char*>(l.p.y) + (m * l.p.ldy + n) * k.element_size, l.p.ldy);
        }
      }
    }
  }
}

// Few rows: they are packed once for all threads, panels are split over threads.
void multiply_few_rows(const Layout& l, const float* bias) {
  const GemmKernel& k = l.kernel;
  const int64_t main_bytes = l.row_blocks * l.steps * l.a_step, extra_bytes = l.row_blocks * l.extra_steps * l.a_step;
  const int64_t bits_bytes = l.p.keep ? l.row_blocks * k.mr * l.keep_stride : 0;
  unsigned char* memory = shared_scratch.get(main_bytes + extra_bytes + bits_bytes + 64);
  const Rows rows{memory, memory + main_bytes, l.p.keep ? memory + main_bytes + extra_bytes : nullptr};
  at::parallel_for(0, l.row_blocks, ceil_div(1 << 15, l.steps * l.a_step), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_row_block(l, i, 0, l.steps, rows.main + i * l.steps * l.a_step);
      pack_row_extra(l, i, rows.extra + i * l.extra_steps * l.a_step,
                     rows.bits ? rows.bits + i * k.mr * l.keep_stride : nullptr);
    }
  });
  const auto* packed = static_cast<const unsigned char*>(l.p.packed);
  at::parallel_for(0, l.panels, 1, [&](int64_t begin, int64_t end) {
    k.enter();
    unsigned char* own = panel_scratch.get((l.steps + l.extra_steps) * l.b_step);
    float* c = reinterpret_cast<float*>(accumulator_scratch.get(k.group * k.mr * k.nr * sizeof(float)));
    for (int64_t panel = begin; panel < end; ++panel) {
      unsigned char* extra_b = own + l.steps * l.b_step;
      l.pack_extra(panel, extra_b);
      if (!packed) l.pack_panel(panel, own);
      multiply_panel(l, rows, 0, l.row_blocks, panel, packed ? packed + panel * l.steps * l.b_step : own, extra_b,
                     l.steps, true, true, bias, c, false);
    }
    k.leave();
  });
}

// Many rows: w is packed chunk by chunk for all threads, row blocks are split over threads.
void multiply_many_rows(const Layout& l, const float* bias) {
  const GemmKernel& k = l.kernel;
  const int64_t threads = at::get_num_threads();
  const int64_t segment = std::min(l.segment, l.steps), segments = ceil_div(l.steps, segment);
  const int64_t most = std::max<int64_t>(1, kRowBlockBytes / (segment * l.a_step));
  const int64_t rounds = ceil_div(l.row_blocks, threads * most);
  const int64_t blocks_per_task = ceil_div(l.row_blocks, threads * rounds);
  const int64_t tasks = ceil_div(l.row_blocks, blocks_per_task);
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / (l.steps * l.b_step), threads, l.panels);
  const auto* packed = static_cast<const unsigned char*>(l.p.packed);
  const int64_t extra_bytes = std::min(chunk, l.panels) * l.extra_steps * l.b_step;
  unsigned char* chunk_extra = shared_scratch.get(extra_bytes + (packed ? 0 : chunk * l.steps * l.b_step));
  unsigned char* chunk_main = chunk_extra + extra_bytes;

  for (int64_t first_panel = 0; first_panel < l.panels; first_panel += chunk) {
    const int64_t count = std::min(chunk, l.panels - first_panel);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        l.pack_extra(first_panel + j, chunk_extra + j * l.extra_steps * l.b_step);
        if (!packed) l.pack_panel(first_panel + j, chunk_main + j * l.steps * l.b_step);
      }
    });
    const unsigned char* main = packed ? packed + first_panel * l.steps * l.b_step : chunk_main;
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      k.enter();
      const int64_t main_bytes = blocks_per_task * segment * l.a_step;
      unsigned char* memory = rows_scratch.get(main_bytes + blocks_per_task * l.extra_steps * l.a_step);
      const Rows rows{memory, memory + main_bytes,
                      l.p.keep ? bits_scratch.get(blocks_per_task * k.mr * l.keep_stride + 64) : nullptr};
      const int64_t tiles = segments > 1 ? blocks_per_task * count : k.group;
      float* c = reinterpret_cast<float*>(accumulator_scratch.get(tiles * k.mr * k.nr * sizeof(float)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * blocks_per_task, blocks = std::min(blocks_per_task, l.row_blocks - first);
        for (int64_t i = 0; i < blocks; ++i)
          pack_row_extra(l, first + i, rows.extra + i * l.extra_steps * l.a_step,
                         rows.bits ? rows.bits + i * k.mr * l.keep_stride : nullptr);
        for (int64_t step = 0; step < l.steps; step += segment) {
          const int64_t length = std::min(segment, l.steps - step);
          for (int64_t i = 0; i < blocks; ++i)
            pack_row_block(l, first + i, step, length, rows.main + i * length * l.a_step);
          for (int64_t j = 0; j < count; ++j)
            multiply_panel(l, rows, first, blocks, first_panel + j, main + (j * l.steps + step) * l.b_step,
                           chunk_extra + j * l.extra_steps * l.b_step, length, step == 0, step + length == l.steps,
                           bias, segments > 1 ? c + j * blocks_per_task * k.mr * k.nr : c, segments > 1);
        }
      }
      k.leave();
    });
  }
}

}  // namespace

int64_t packed_weight_bytes(const GemmKernel& kernel, int64_t N, int64_t D) {
  return ceil_div(N, kernel.nr) * ceil_div(D, kernel.kr) * kernel.nr * kernel.kr * kernel.element_size;
}

void pack_gemm_weight(const GemmKernel& kernel, const void* w, int64_t ldw, bool depth_contiguous, int64_t N, int64_t D,
                      void* packed) {
  GemmParams params{};
  params.N = N, params.D = D, params.w = w, params.ldw = ldw, params.depth_contiguous = depth_contiguous;
  const Layout l{kernel, params};
  at::parallel_for(0, l.panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      l.pack_panel(j, static_cast<unsigned char*>(packed) + j * l.steps * l.b_step);
  });
}

void gemm(const GemmKernel& kernel, const GemmParams& params) {
  if (params.M == 0) return;
  const Layout l{kernel, params};
  std::vector<float> bias;  // padded to whole panels
  if (params.bias) {
    bias.assign(l.panels * kernel.nr, 0.0f);
    std::memcpy(bias.data(), params.bias, params.N * sizeof(float));
  }
  const bool few_rows = l.row_blocks * l.steps * l.a_step <= kRowBlockBytes && l.panels >= at::get_num_threads();
  (few_rows ? multiply_few_rows : multiply_many_rows)(l, params.bias ? bias.data() : nullptr);
}

}  // namespace lorasp
