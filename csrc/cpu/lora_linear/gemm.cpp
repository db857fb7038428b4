// Blocking of gemm.h: a thread packs a block of rows once, small enough for its L2, forms their low-rank rows s from
// the packed copy, and streams panels of packed w past both. Panels are packed by the first thread that comes to them,
// from memory that was prefetched while the panels before were multiplied: read cold, packing w costs as much as a
// quarter of the product (measured, 512 x 1024 x 1024). Few rows: each thread packs its own panels just before use and
// w never makes a round trip through memory.
#include "gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "../common/scratch.h"

namespace lorasp {
namespace {

constexpr int64_t kRowBlockBytes = 1 << 20;  // packed rows of one thread: half of a 2 MiB L2
constexpr int64_t kRowBlockRows = 256;       // measured: 512 rows are slower at any depth
constexpr int64_t kFewRowBlocks = 4;         // per thread; below that rows are not split
constexpr int64_t kChunkBytes = 8 << 20;     // packed w that is alive at a time
constexpr int64_t kSegmentBytes = 8 << 10;   // depth of one packed row before accumulators spill to memory
constexpr int64_t kParallelSteps = 128;      // tile steps that are worth waking a thread
constexpr int64_t kPanelsAtOnce = 4;         // packed together: longer runs of w's rows per visit

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

Operand columns_of(const GemmKernel& kernel, const Operand& w, int64_t first, int64_t count) {
  Operand part = w;
  part.data = static_cast<const unsigned char*>(w.data) + first * (w.depth_contiguous ? w.ld : 1) * kernel.element_size;
  part.columns = std::min(count, w.columns - first);
  return part;
}

// Brings an operand into this core's L2, a few lines at a time.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const GemmKernel& kernel, const Operand& w)
      : row_(static_cast<const char*>(w.data)),
        stride_(w.ld * kernel.element_size),
        row_bytes_((w.depth_contiguous ? w.depth : w.columns) * kernel.element_size),
        rows_(w.depth_contiguous ? w.columns : w.depth) {}

  int64_t lines() const { return rows_ * ceil_div(row_bytes_, 64); }
  void next(int64_t lines) {
    for (; lines > 0 && rows_ > 0; --lines) {
      __builtin_prefetch(row_ + offset_, 0, 2);
      offset_ += 64;
      if (offset_ >= row_bytes_) row_ += stride_, offset_ = 0, --rows_;
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, row_bytes_ = 0, rows_ = 0, offset_ = 0;
};

// Sizes that every phase needs; the suffix _bytes tells what they count.
struct Layout {
  const GemmKernel& kernel;
  const GemmParams& p;
  int64_t D = p.w.depth, N = p.w.columns, R = p.q.columns;
  int64_t steps = ceil_div(D, kernel.kr), low_rank_steps = ceil_div(R, kernel.kr);
  int64_t panels = ceil_div(N, kernel.nr), low_rank_panels = ceil_div(R, kernel.nr);
  int64_t row_blocks = ceil_div(p.M, kernel.mr);
  int64_t tile = kernel.mr * kernel.nr;
  int64_t a_step_bytes = kernel.mr * kernel.kr * kernel.element_size;
  int64_t b_step_bytes = kernel.nr * kernel.kr * kernel.element_size;
  int64_t panel_bytes = steps * b_step_bytes, low_rank_panel_bytes = low_rank_steps * b_step_bytes;
  int64_t low_rank_row_bytes = low_rank_steps * a_step_bytes;
  int64_t segment = std::min(steps, std::max<int64_t>(1, kSegmentBytes / (kernel.kr * kernel.element_size)));
  int64_t keep_a_stride = p.keep_a ? round_up(D, 64) / 8 + 8 : 0;
  int64_t keep_y_stride = p.keep_y ? round_up(panels * kernel.nr, 64) / 8 + 8 : 0;

  int64_t rows(int64_t block) const { return std::min(kernel.mr, p.M - block * kernel.mr); }
  unsigned char* s_row(int64_t block) const {
    return static_cast<unsigned char*>(p.s) + block * kernel.mr * p.lds * kernel.element_size;
  }
  void pack_panels(int64_t first, int64_t count, unsigned char* out) const {
    kernel.pack_panels(columns_of(kernel, p.w, first * kernel.nr, count * kernel.nr), panel_bytes, out);
  }
  void pack_low_rank_panels(int64_t first, int64_t count, unsigned char* out) const {
    kernel.pack_panels(columns_of(kernel, p.p, first * kernel.nr, count * kernel.nr), low_rank_panel_bytes, out);
  }
};

// A thread's own tiles, and what it prefetches while it multiplies: lines_per_block lines for each tile block.
struct Workspace {
  Prefetch ahead;
  int64_t lines_per_block = 0;

  float* projected;  // low_rank_panels tiles for each row block: s before it is scaled and rounded
  float* term;       // the masked low-rank term of one tile
  float* accumulators;
  unsigned char* kept_rows;  // one row block of keep_a o a
  unsigned char* bits;       // of those rows

  Workspace(const Layout& l, ScratchFrame& frame, int64_t blocks, int64_t tiles)
      : projected(frame.take<float>(blocks * l.low_rank_panels * l.tile)),
        term(frame.take<float>(l.p.keep_y ? l.tile : 0)),
        accumulators(frame.take<float>(tiles * l.tile)),
        kept_rows(frame.take<unsigned char>(l.p.keep_a ? l.segment * l.a_step_bytes : 0)),
        bits(frame.take<unsigned char>(l.kernel.mr * l.keep_a_stride)) {}

  // Panels [first, first + count) of w, spread over the next `tiles` whole tiles.
  void prefetch(const Layout& l, int64_t first, int64_t count, int64_t tiles) {
    ahead = count > 0 ? Prefetch(l.kernel, columns_of(l.kernel, l.p.w, first * l.kernel.nr, count * l.kernel.nr))
                      : Prefetch();
    lines_per_block = ceil_div(ahead.lines(), tiles * ceil_div(l.segment, l.kernel.group_steps));
  }
};

// Packed rows of consecutive row blocks: one segment of the depth, the low-rank depth, keep_y's bits.
struct Rows {
  unsigned char* main;
  unsigned char* low_rank;
  unsigned char* keep_y;

  Rows(const Layout& l, ScratchFrame& frame, int64_t blocks, int64_t segment_steps)
      : main(frame.take<unsigned char>(blocks * segment_steps * l.a_step_bytes)),
        low_rank(frame.take<unsigned char>(blocks * l.low_rank_row_bytes)),
        keep_y(frame.take<unsigned char>(blocks * l.kernel.mr * l.keep_y_stride + 8)) {}
};

void pack_low_rank_rows(const Layout& l, int64_t block, unsigned char* low_rank, unsigned char* keep_y) {
  l.kernel.pack_rows(l.s_row(block), l.p.lds, l.rows(block), l.R, nullptr, 0, low_rank);
  if (l.p.keep_y)
    for (int64_t r = 0; r < l.rows(block); ++r) l.p.keep_y->fill(block * l.kernel.mr + r, keep_y + r * l.keep_y_stride);
}

void pack_main_rows(const Layout& l, int64_t block, int64_t first_step, int64_t steps, unsigned char* main) {
  const GemmKernel& k = l.kernel;
  const auto* a =
      static_cast<const unsigned char*>(l.p.a) + (block * k.mr * l.p.lda + first_step * k.kr) * k.element_size;
  k.pack_rows(a, l.p.lda, l.rows(block), std::min(steps * k.kr, l.D - first_step * k.kr), nullptr, 0, main);
}

// A row block is packed segment by segment; shown with its first.
void visit_rows(const Layout& l, int64_t block) {
  if (l.p.visitor) l.p.visitor->visit(block * l.kernel.mr, l.rows(block));
}

// projected += (keep_a o a) q over one segment of one row block; at the depth's end s is rounded and written.
void project(const Layout& l, int64_t block, int64_t first_step, int64_t steps, const unsigned char* main,
             const unsigned char* q, float* projected, Workspace& own) {
  const GemmKernel& k = l.kernel;
  const unsigned char* rows = main;
  if (l.p.keep_a) {
    if (first_step == 0 || l.segment < l.steps)
      for (int64_t r = 0; r < l.rows(block); ++r) l.p.keep_a->fill(block * k.mr + r, own.bits + r * l.keep_a_stride);
    const auto* a =
        static_cast<const unsigned char*>(l.p.a) + (block * k.mr * l.p.lda + first_step * k.kr) * k.element_size;
    k.pack_rows(a, l.p.lda, l.rows(block), std::min(steps * k.kr, l.D - first_step * k.kr),
                own.bits + first_step * k.kr / 8, l.keep_a_stride, own.kept_rows);
    rows = own.kept_rows;
  }
  for (int64_t j = 0; j < l.low_rank_panels; ++j) {
    float* c = projected + j * l.tile;
    for (int64_t step = 0; step < steps; step += k.group_steps)
      k.block(rows + step * l.a_step_bytes, q + j * l.panel_bytes + (first_step + step) * l.b_step_bytes,
              std::min(k.group_steps, steps - step), nullptr, nullptr, 0, first_step + step > 0, c);
    if (first_step + steps == l.steps)
      k.store(c, l.rows(block), std::min(k.nr, l.R - j * k.nr), l.p.scale, nullptr, false,
              l.s_row(block) + j * k.nr * k.element_size, l.p.lds);
  }
}

// Row blocks [first, first + blocks) against one panel, over one segment of the depth. own.accumulators: one tile per
// row block from tile_of_block on where the depth has several segments, otherwise one per member of a group.
void multiply_panel(const Layout& l, const Rows& rows, int64_t first, int64_t blocks, int64_t panel,
                    const unsigned char* b, const unsigned char* low_rank_b, int64_t first_step, int64_t steps,
                    const float* bias, float* accumulators, Workspace& own) {
  const GemmKernel& k = l.kernel;
  const bool spilled = l.segment < l.steps;
  const int64_t n = panel * k.nr, columns = std::min(k.nr, l.N - n);
  for (int64_t group = 0; group < blocks; group += k.group) {
    const int64_t end = std::min(group + k.group, blocks);
    for (int64_t step = 0; step < steps; step += k.group_steps) {
      const int64_t count = std::min(k.group_steps, steps - step);
      const bool last = first_step + step + count == l.steps;
      for (int64_t i = group; i < end; ++i) {
        float* c = accumulators + (spilled ? i : i - group) * l.tile;
        own.ahead.next(own.lines_per_block);
        const unsigned char* low_rank_a = rows.low_rank + i * l.low_rank_row_bytes;
        k.block(rows.main + (i * steps + step) * l.a_step_bytes, b + step * l.b_step_bytes, count, low_rank_a,
                low_rank_b, last && !l.p.keep_y ? l.low_rank_steps : 0, first_step + step > 0, c);
        if (!last) continue;
        if (l.p.keep_y) {
          k.block(low_rank_a, low_rank_b, l.low_rank_steps, nullptr, nullptr, 0, false, own.term);
          k.add_selected(own.term, rows.keep_y + i * k.mr * l.keep_y_stride + n / 8, l.keep_y_stride, c);
        }
        const int64_t m = (first + i) * k.mr;
        k.store(c, l.rows(first + i), columns, 1.0f, bias ? bias + n : nullptr, l.p.accumulate,
                static_cast<unsigned char*>(l.p.y) + (m * l.p.ldy + n) * k.element_size, l.p.ldy);
      }
    }
  }
}

// Few rows: packed once for all threads, panels are split over threads. The depth is one segment.
void multiply_few_rows(const Layout& whole, const unsigned char* q, const float* bias, ScratchFrame& shared) {
  Layout l = whole;
  l.segment = l.steps;
  const GemmKernel& k = l.kernel;
  const Rows rows(l, shared, l.row_blocks, l.steps);
  at::parallel_for(0, l.row_blocks, ceil_div(1 << 15, l.steps * l.a_step_bytes), [&](int64_t begin, int64_t end) {
    ScratchFrame frame;
    Workspace own(l, frame, 1, 0);
    k.enter();
    for (int64_t i = begin; i < end; ++i) {
      unsigned char* main = rows.main + i * l.steps * l.a_step_bytes;
      pack_main_rows(l, i, 0, l.steps, main);
      visit_rows(l, i);
      project(l, i, 0, l.steps, main, q, own.projected, own);
      pack_low_rank_rows(l, i, rows.low_rank + i * l.low_rank_row_bytes, rows.keep_y + i * k.mr * l.keep_y_stride);
    }
    k.leave();
  });
  const auto* packed = static_cast<const unsigned char*>(l.p.packed);
  const int64_t grain = ceil_div(kParallelSteps, l.steps * l.row_blocks);
  at::parallel_for(0, l.panels, grain, [&](int64_t begin, int64_t end) {
    ScratchFrame frame;
    Workspace own(l, frame, 0, k.group);
    auto* low_rank_b = frame.take<unsigned char>(kPanelsAtOnce * l.low_rank_panel_bytes);
    auto* b = frame.take<unsigned char>(packed ? 0 : kPanelsAtOnce * l.panel_bytes);
    k.enter();
    for (int64_t first = begin; first < end; first += kPanelsAtOnce) {
      const int64_t count = std::min(kPanelsAtOnce, end - first);
      l.pack_low_rank_panels(first, count, low_rank_b);
      if (!packed) {
        l.pack_panels(first, count, b);
        own.prefetch(l, first + count, std::min(kPanelsAtOnce, end - first - count), count * l.row_blocks);
      }
      for (int64_t j = 0; j < count; ++j)
        multiply_panel(l, rows, 0, l.row_blocks, first + j,
                       packed ? packed + (first + j) * l.panel_bytes : b + j * l.panel_bytes,
                       low_rank_b + j * l.low_rank_panel_bytes, 0, l.steps, bias, own.accumulators, own);
    }
    k.leave();
  });
}

// The panels that are alive at a time, in bunches of kPanelsAtOnce. Whoever needs a bunch first packs it for all.
class PanelChunk {
 public:
  PanelChunk(const Layout& layout, int64_t most, ScratchFrame& frame)
      : l_(layout),
        packed_(static_cast<const unsigned char*>(layout.p.packed)),
        low_rank_(frame.take<unsigned char>(most * layout.low_rank_panel_bytes)),
        main_(frame.take<unsigned char>(packed_ ? 0 : most * layout.panel_bytes)),
        states_(ceil_div(most, kPanelsAtOnce)) {}

  void restart(int64_t first, int64_t count) {
    first_ = first, count_ = count;
    for (auto& state : states_) state.store(kCold, std::memory_order_relaxed);
  }
  bool ready(int64_t bunch) const { return states_[bunch].load(std::memory_order_acquire) == kReady; }
  void ensure(int64_t bunch) {
    if (ready(bunch)) return;
    int expected = kCold;
    if (!states_[bunch].compare_exchange_strong(expected, kPacking, std::memory_order_acquire)) {
      while (!ready(bunch)) std::this_thread::yield();
      return;
    }
    const int64_t j = bunch * kPanelsAtOnce, count = std::min(kPanelsAtOnce, count_ - j);
    l_.pack_low_rank_panels(first_ + j, count, low_rank_ + j * l_.low_rank_panel_bytes);
    if (!packed_) l_.pack_panels(first_ + j, count, main_ + j * l_.panel_bytes);
    states_[bunch].store(kReady, std::memory_order_release);
  }
  const unsigned char* main(int64_t j) const {
    return packed_ ? packed_ + (first_ + j) * l_.panel_bytes : main_ + j * l_.panel_bytes;
  }
  const unsigned char* low_rank(int64_t j) const { return low_rank_ + j * l_.low_rank_panel_bytes; }

 private:
  enum : int { kCold, kPacking, kReady };
  const Layout& l_;
  const unsigned char* packed_;
  unsigned char* low_rank_;
  unsigned char* main_;
  std::vector<std::atomic<int>> states_;
  int64_t first_ = 0, count_ = 0;
};

// Many rows: row blocks are split over threads, w is packed chunk by chunk.
void multiply_many_rows(const Layout& l, const unsigned char* q, const float* bias, ScratchFrame& shared) {
  const GemmKernel& k = l.kernel;
  const int64_t threads = at::get_num_threads();
  const int64_t most = std::clamp<int64_t>(kRowBlockBytes / (l.segment * l.a_step_bytes), 1, kRowBlockRows / k.mr);
  const int64_t rounds = ceil_div(l.row_blocks, threads * most);
  const int64_t blocks_per_task = ceil_div(l.row_blocks, threads * rounds);
  const int64_t tasks = ceil_div(l.row_blocks, blocks_per_task);
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / l.panel_bytes, std::min(threads, l.panels), l.panels);
  const auto* packed = static_cast<const unsigned char*>(l.p.packed);
  PanelChunk panels(l, chunk, shared);

  for (int64_t first_panel = 0; first_panel < l.panels; first_panel += chunk) {
    const int64_t count = std::min(chunk, l.panels - first_panel);
    panels.restart(first_panel, count);
    const int64_t bunches = ceil_div(count, kPanelsAtOnce);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      ScratchFrame frame;
      const bool spilled = l.segment < l.steps;
      Workspace own(l, frame, blocks_per_task, spilled ? blocks_per_task * count : k.group);
      const Rows rows(l, frame, blocks_per_task, l.segment);
      // Threads start at different panels, so that each packs its share.
      const int64_t start = begin * bunches / tasks;
      k.enter();
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * blocks_per_task, blocks = std::min(blocks_per_task, l.row_blocks - first);
        for (int64_t step = 0; step < l.steps; step += l.segment) {
          const int64_t steps = std::min(l.segment, l.steps - step);
          for (int64_t i = 0; i < blocks; ++i) {
            unsigned char* row = rows.main + i * steps * l.a_step_bytes;
            pack_main_rows(l, first + i, step, steps, row);
            if (first_panel == 0 && step == 0) visit_rows(l, first + i);
            if (first_panel == 0)
              project(l, first + i, step, steps, row, q, own.projected + i * l.low_rank_panels * l.tile, own);
            if (step + steps == l.steps)
              pack_low_rank_rows(l, first + i, rows.low_rank + i * l.low_rank_row_bytes,
                                 rows.keep_y + i * k.mr * l.keep_y_stride);
          }
          for (int64_t visit = 0; visit < bunches; ++visit) {
            const int64_t bunch = (start + visit) % bunches, next = (bunch + 1) % bunches;
            panels.ensure(bunch);
            const int64_t j0 = bunch * kPanelsAtOnce, j1 = std::min(j0 + kPanelsAtOnce, count);
            const bool cold = !packed && visit + 1 < bunches && !panels.ready(next);
            own.prefetch(l, first_panel + next * kPanelsAtOnce,
                         cold ? std::min(kPanelsAtOnce, count - next * kPanelsAtOnce) : 0, (j1 - j0) * blocks);
            for (int64_t j = j0; j < j1; ++j)
              multiply_panel(l, rows, first, blocks, first_panel + j, panels.main(j) + step * l.b_step_bytes,
                             panels.low_rank(j), step, steps, bias,
                             own.accumulators + (spilled ? j * blocks_per_task * l.tile : 0), own);
          }
        }
      }
      k.leave();
    });
  }
}

}  // namespace

int64_t packed_weight_bytes(const GemmKernel& kernel, int64_t columns, int64_t depth) {
  return ceil_div(columns, kernel.nr) * ceil_div(depth, kernel.kr) * kernel.nr * kernel.kr * kernel.element_size;
}

void pack_gemm_weight(const GemmKernel& kernel, const Operand& w, void* packed) {
  const int64_t panels = ceil_div(w.columns, kernel.nr), panel_bytes = packed_weight_bytes(kernel, 1, w.depth);
  at::parallel_for(0, ceil_div(panels, kPanelsAtOnce), 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kPanelsAtOnce; j < std::min(end * kPanelsAtOnce, panels); j += kPanelsAtOnce)
      kernel.pack_panels(columns_of(kernel, w, j * kernel.nr, kPanelsAtOnce * kernel.nr), panel_bytes,
                         static_cast<unsigned char*>(packed) + j * panel_bytes);
  });
}

void gemm(const GemmKernel& kernel, const GemmParams& params) {
  if (params.M == 0) return;
  const Layout l{kernel, params};
  ScratchFrame frame;
  float* bias = nullptr;  // padded to whole panels
  if (params.bias) {
    bias = frame.take<float>(l.panels * kernel.nr);
    std::memcpy(bias, params.bias, l.N * sizeof(float));
    std::fill(bias + l.N, bias + l.panels * kernel.nr, 0.0f);
  }
  auto* q = frame.take<unsigned char>(l.low_rank_panels * l.panel_bytes);
  kernel.pack_panels(params.q, l.panel_bytes, q);
  const int64_t threads = at::get_num_threads();
  const bool few_rows = l.row_blocks < kFewRowBlocks * threads;
  (few_rows && l.panels >= threads ? multiply_few_rows : multiply_many_rows)(l, q, bias, frame);
}

}  // namespace lorasp
