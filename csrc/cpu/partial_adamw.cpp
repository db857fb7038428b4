// partial_adamw on CPU: lorasp::partial_adamw_cpp (schema in lorasp/ops/partial_adamw.py). Where an entry is active,
// with t the number of its own active steps:
//     m = b1 m + (1 - b1) g         v = b2 v + (1 - b2) g^2
//     p = (1 - lr wd) p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// All parameters are one range of chunks, dealt out to the threads once.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

// The loop is left to the compiler; glibc picks the widest of these when the library is loaded.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__)
#define LORASP_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LORASP_CLONES
#endif

namespace lorasp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 1024, kGrainChunks = 16;

struct Hyper {
  double lr, beta1, beta2;
  float gain1, beta2_f, gain2, decay, eps;
};

// The factors of an entry at its t-th active step, lr / (1 - b1^t) and 1 / sqrt(1 - b2^t); a root of 0 marks an entry
// that is not active. Entries take few distinct t, so these are looked up: powers would cost more than the update.
class FactorTable {
 public:
  explicit FactorTable(const Hyper& h) : h_(h) {
    // From here on neither factor changes any more in float.
    const double slower = std::max(h.beta1, h.beta2);
    last_ = slower == 0.0 ? 1.0 : std::ceil(-21.0 / std::log(slower)) + 1.0;
  }
  void cover(int32_t t) {
    while (static_cast<int32_t>(root_.size()) <= t && static_cast<double>(root_.size()) <= last_) {
      power1_ *= h_.beta1;
      power2_ *= h_.beta2;
      size_.push_back(static_cast<float>(h_.lr / (1.0 - power1_)));
      root_.push_back(static_cast<float>(1.0 / std::sqrt(1.0 - power2_)));
    }
  }
  int32_t end() const { return static_cast<int32_t>(root_.size()) - 1; }
  const float* size() const { return size_.data(); }
  const float* root() const { return root_.data(); }

 private:
  const Hyper& h_;
  double last_, power1_ = 1.0, power2_ = 1.0;
  std::vector<float> size_{0.0f}, root_{0.0f};
};

LORASP_CLONES int32_t highest(const int32_t* steps, int64_t n) {
  int32_t top = 0;
  for (int64_t i = 0; i < n; ++i) top = steps[i] > top ? steps[i] : top;
  return top;
}

LORASP_CLONES void count_entries(const uint8_t* active, int32_t* steps, int64_t n, const float* table_size,
                                 const float* table_root, int32_t end, float* size, float* root) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int32_t t = steps[i] + active[i];
    // The table's first entry is that of whoever rests: no branch, which a random selection would mispredict.
    const int32_t index = (t < end ? t : end) & -static_cast<int32_t>(active[i]);
    steps[i] = t;
    size[i] = table_size[index];
    root[i] = table_root[index];
  }
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

LORASP_CLONES void widen(const uint16_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = from_bits(static_cast<uint32_t>(in[i]) << 16);
}

// Round to nearest even, where root says that the entry is active.
LORASP_CLONES void narrow(const float* in, const float* root, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(in[i]);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t value = in[i] != in[i] ? 0x7FC0u : rounded;
    out[i] = static_cast<uint16_t>(root[i] != 0.0f ? value : out[i]);
  }
}

LORASP_CLONES void update(const float* size, const float* root, const float* g, float* m, float* v, float* p, int64_t n,
                          float gain1, float beta2, float gain2, float decay, float eps) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float mi = m[i] + gain1 * (g[i] - m[i]);
    const float vi = beta2 * v[i] + gain2 * g[i] * g[i];
    const float pi = decay * p[i] - size[i] * mi / (std::sqrt(vi) * root[i] + eps);
    const bool active = root[i] != 0.0f;
    m[i] = active ? mi : m[i];
    v[i] = active ? vi : v[i];
    p[i] = active ? pi : p[i];
  }
}

void widen(const at::BFloat16* in, float* out, int64_t n) { widen(reinterpret_cast<const uint16_t*>(in), out, n); }
void narrow(const float* in, const float* root, at::BFloat16* out, int64_t n) {
  narrow(in, root, reinterpret_cast<uint16_t*>(out), n);
}
void widen(const at::Half* in, float* out, int64_t n) { std::copy_n(in, n, out); }
void narrow(const float* in, const float* root, at::Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = root[i] != 0.0f ? static_cast<at::Half>(in[i]) : out[i];
}

// How `active` and `steps` of a parameter (P, Q) are shaped: one for all, (P, 1), (1, Q), (P, Q).
enum class Grain { kAll, kRow, kColumn, kEntry };

struct Item {
  Tensor param, grad, exp_avg, exp_avg_sq;  // contiguous
  Tensor active, steps;
  Grain grain;
  int64_t numel, columns, first_chunk;
  std::vector<float> size, root;  // per row or column, or one; not for entries
};

void check(const char* name, size_t i, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), "partial_adamw: ", name, "[", i, "] must be on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, "partial_adamw: ", name, "[", i, "] must be ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "partial_adamw: ", name, "[", i, "] must be ", dtype, ", got ",
                   t.scalar_type());
}

Grain grain_of(size_t i, const Tensor& param, const OptionalTensor& active) {
  if (!active) return Grain::kAll;
  TORCH_CHECK_VALUE(param.dim() == 2 && active->dim() == 2, "partial_adamw: actives[", i,
                    "] must be 2-d beside a 2-d parameter, got ", active->sizes(), " beside ", param.sizes());
  const int64_t P = param.size(0), Q = param.size(1), p = active->size(0), q = active->size(1);
  TORCH_CHECK_VALUE((p == 1 || p == P) && (q == 1 || q == Q), "partial_adamw: actives[", i, "] must be ", "(1 or ", P,
                    ", 1 or ", Q, "), got ", active->sizes());
  if (p == 1) return q == 1 ? Grain::kAll : Grain::kColumn;
  return q == 1 ? Grain::kRow : Grain::kEntry;
}

// Counts the step of whole rows, columns or the whole, and looks their factors up. False if nothing is active.
bool count(Item& item, FactorTable& table) {
  if (item.grain == Grain::kEntry) return true;
  const bool* active = item.active.defined() ? item.active.const_data_ptr<bool>() : nullptr;
  int32_t* steps = item.steps.mutable_data_ptr<int32_t>();
  const int64_t groups = item.steps.numel();
  table.cover(highest(steps, groups) + 1);
  item.size.resize(groups);
  item.root.resize(groups);
  bool any = false;
  for (int64_t i = 0; i < groups; ++i) {
    if (active && !active[i]) continue;
    const int32_t index = std::min(++steps[i], table.end());
    item.size[i] = table.size()[index];
    item.root[i] = table.root()[index];
    any = true;
  }
  return any;
}

// The factors of entries [begin, begin + n); false if none of them is active.
bool spread(const Item& item, int64_t begin, int64_t n, FactorTable& table, float* size, float* root) {
  switch (item.grain) {
    case Grain::kAll:
      std::fill_n(size, n, item.size[0]);
      std::fill_n(root, n, item.root[0]);
      return true;
    case Grain::kRow:
    case Grain::kColumn: {
      bool any = false;
      for (int64_t i = 0; i < n;) {
        const int64_t row = (begin + i) / item.columns, column = (begin + i) % item.columns;
        const int64_t run = std::min(n - i, item.columns - column);
        if (item.grain == Grain::kRow) {
          std::fill_n(size + i, run, item.size[row]);
          std::fill_n(root + i, run, item.root[row]);
          any |= item.root[row] != 0.0f;
        } else {
          std::copy_n(item.size.data() + column, run, size + i);
          std::copy_n(item.root.data() + column, run, root + i);
          any = true;
        }
        i += run;
      }
      return any;
    }
    case Grain::kEntry: {
      int32_t* steps = item.steps.mutable_data_ptr<int32_t>() + begin;
      table.cover(highest(steps, n) + 1);
      count_entries(reinterpret_cast<const uint8_t*>(item.active.const_data_ptr<bool>()) + begin, steps, n,
                    table.size(), table.root(), table.end(), size, root);
      return true;
    }
  }
  return false;
}

template <class T>
void step_chunk(const Item& item, const Hyper& h, int64_t begin, int64_t n, const float* size, const float* root) {
  const T* g = item.grad.const_data_ptr<T>() + begin;
  T* const own[3] = {item.exp_avg.mutable_data_ptr<T>() + begin, item.exp_avg_sq.mutable_data_ptr<T>() + begin,
                     item.param.mutable_data_ptr<T>() + begin};
  if constexpr (std::is_same_v<T, float>) {
    update(size, root, g, own[0], own[1], own[2], n, h.gain1, h.beta2_f, h.gain2, h.decay, h.eps);
  } else {
    float wide[4][kChunk];
    widen(g, wide[3], n);
    for (int j = 0; j < 3; ++j) widen(own[j], wide[j], n);
    update(size, root, wide[3], wide[0], wide[1], wide[2], n, h.gain1, h.beta2_f, h.gain2, h.decay, h.eps);
    for (int j = 0; j < 3; ++j) narrow(wide[j], root, own[j], n);
  }
}

void step_chunks(const std::vector<const Item*>& items, const Hyper& h, int64_t first, int64_t last) {
  FactorTable table(h);
  float size[kChunk], root[kChunk];
  auto at = std::upper_bound(items.begin(), items.end(), first,
                             [](int64_t chunk, const Item* it) { return chunk < it->first_chunk; }) -
            1;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    while (at + 1 != items.end() && chunk >= at[1]->first_chunk) ++at;
    const Item* item = *at;
    const int64_t begin = (chunk - item->first_chunk) * kChunk, n = std::min(kChunk, item->numel - begin);
    if (!spread(*item, begin, n, table, size, root)) continue;
    switch (item->param.scalar_type()) {
      case at::kFloat:
        step_chunk<float>(*item, h, begin, n, size, root);
        break;
      case at::kBFloat16:
        step_chunk<at::BFloat16>(*item, h, begin, n, size, root);
        break;
      default:
        step_chunk<at::Half>(*item, h, begin, n, size, root);
    }
  }
}

void partial_adamw_cpu(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                       at::TensorList steps, const c10::List<OptionalTensor>& actives, double lr, double beta1,
                       double beta2, double eps, double weight_decay) {
  const at::AutoDispatchBelowAutograd no_autograd;
  const size_t count_ = params.size();
  TORCH_CHECK_VALUE(grads.size() == count_ && exp_avgs.size() == count_ && exp_avg_sqs.size() == count_ &&
                        steps.size() == count_ && actives.size() == count_,
                    "partial_adamw: params, grads, exp_avgs, exp_avg_sqs, steps and actives must be as many, got ",
                    count_, ", ", grads.size(), ", ", exp_avgs.size(), ", ", exp_avg_sqs.size(), ", ", steps.size(),
                    " and ", actives.size());
  const Hyper h{lr,
                beta1,
                beta2,
                static_cast<float>(1.0 - beta1),
                static_cast<float>(beta2),
                static_cast<float>(1.0 - beta2),
                static_cast<float>(1.0 - lr * weight_decay),
                static_cast<float>(eps)};
  std::vector<Item> items;
  items.reserve(count_);
  for (size_t i = 0; i < count_; ++i) {
    const Tensor& param = params[i];
    const OptionalTensor active = actives[i];
    const auto dtype = param.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, "partial_adamw: params[", i,
                     "] must be float32, bfloat16 or float16 for backend cpp, got ", dtype);
    check("params", i, param, param.sizes(), dtype);
    check("grads", i, grads[i], param.sizes(), dtype);
    check("exp_avgs", i, exp_avgs[i], param.sizes(), dtype);
    check("exp_avg_sqs", i, exp_avg_sqs[i], param.sizes(), dtype);
    const Grain grain = grain_of(i, param, active);
    if (active) {
      check("actives", i, *active, active->sizes(), at::kBool);
      check("steps", i, steps[i], active->sizes(), at::kInt);
    }
    TORCH_CHECK_VALUE(
        steps[i].scalar_type() == at::kInt && steps[i].is_contiguous() && (active || steps[i].numel() == 1),
        "partial_adamw: steps[", i, "] must be contiguous int32 like its active, got ", steps[i].scalar_type(), " ",
        steps[i].sizes());
    items.push_back({param.contiguous(),
                     grads[i].contiguous(),
                     exp_avgs[i].contiguous(),
                     exp_avg_sqs[i].contiguous(),
                     active ? active->contiguous() : Tensor(),
                     steps[i],
                     grain,
                     param.numel(),
                     param.dim() == 2 ? param.size(1) : 1,
                     0,
                     {},
                     {}});
  }
  FactorTable table(h);
  int64_t chunks = 0;
  std::vector<const Item*> working;
  working.reserve(count_);
  for (Item& item : items) {
    if (!count(item, table) || item.numel == 0) continue;
    item.first_chunk = chunks;
    chunks += (item.numel + kChunk - 1) / kChunk;
    working.push_back(&item);
  }
  if (chunks > 0)
    at::parallel_for(0, chunks, kGrainChunks,
                     [&](int64_t first, int64_t last) { step_chunks(working, h, first, last); });
  for (size_t i = 0; i < count_; ++i) {
    const auto give_back = [](const Tensor& own, const Tensor& done) {
      if (!own.is_same(done)) own.copy_(done);
    };
    give_back(params[i], items[i].param);
    give_back(exp_avgs[i], items[i].exp_avg);
    give_back(exp_avg_sqs[i], items[i].exp_avg_sq);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) { m.impl("partial_adamw_cpp", &partial_adamw_cpu); }

}  // namespace lorasp
