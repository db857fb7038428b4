// dropkey_attention on CPU: lorasp::dropkey_attention_fwd_cpp and lorasp::dropkey_attention_bwd_cpp (schemas in
// lorasp/ops/dropkey_attention.py). The mathematics is in dropkey_attention_impl.h; here: checks, key lists, threads.
#include "dropkey_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "isa.h"
#include "scratch.h"

namespace lorasp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr uint32_t kPurposeDropKey = 1;
constexpr int64_t kPadding = 32;  // kernels read whole blocks of a key list

// Below autograd and autocast: neither a graph nor a cast, whatever the caller's modes are.
struct PlainDispatch {
  at::AutoDispatchBelowAutograd no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

DType compute_dtype(const Tensor& q) {
  switch (q.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      TORCH_CHECK_TYPE(false, "dropkey_attention: q must be float32, bfloat16 or float16 for backend cpp, got ",
                       q.scalar_type());
  }
}

const AttentionKernels& attention_kernels(DType dtype) {
  const int index = static_cast<int>(dtype);
#if defined(__x86_64__)
  switch (active_isa()) {
#if defined(__linux__)
    case Isa::kAmx:
      return dtype == DType::kBF16 ? amx::kAttention[0] : avx512::kAttention[index];
#endif
    case Isa::kAvx512Bf16:
      return dtype == DType::kBF16 ? avx512_bf16::kAttention[0] : avx512::kAttention[index];
    case Isa::kAvx512:
      return avx512::kAttention[index];
    case Isa::kAvx2:
      return avx2::kAttention[index];
    default:
      break;
  }
#endif
  return portable::kAttention[index];
}

void check(const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(t.device().is_cpu(), "dropkey_attention: ", name, " must be on cpu, got ", t.device());
  TORCH_CHECK_VALUE(t.sizes() == shape, "dropkey_attention: ", name, " must be ", shape, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "dropkey_attention: ", name, " must be ", dtype, ", got ",
                   t.scalar_type());
}

bool unit_columns(const Tensor& t) { return t.size(3) == 1 || t.stride(3) == 1; }
Tensor with_unit_columns(const Tensor& t) { return unit_columns(t) ? t : t.contiguous(); }

HeadRows head_rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

ScoreMask score_mask(const Tensor& t) {
  ScoreMask mask;
  switch (t.scalar_type()) {
    case at::kBool:
      mask.kind = ScoreMask::kBool;
      break;
    case at::kFloat:
      mask.kind = ScoreMask::kF32;
      mask.hidden = -FLT_MAX / 2;
      break;
    case at::kBFloat16:
      mask.kind = ScoreMask::kBF16;
      mask.hidden = -0x1.FEp127f / 2;
      break;
    default:
      mask.kind = ScoreMask::kF16;
      mask.hidden = -65504.0f / 2;
  }
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  mask.data = t.const_data_ptr();
  mask.batch = stride(0), mask.head = stride(1), mask.row = stride(2), mask.key = stride(3);
  return mask;
}

// One element of a mask as what is added to a logit: -inf hides.
float mask_value(const ScoreMask& mask, int64_t offset) {
  float value;
  switch (mask.kind) {
    case ScoreMask::kBool:
      return static_cast<const bool*>(mask.data)[offset] ? 0.0f : -INFINITY;
    case ScoreMask::kF32:
      value = static_cast<const float*>(mask.data)[offset];
      break;
    case ScoreMask::kBF16:
      value = static_cast<const at::BFloat16*>(mask.data)[offset];
      break;
    default:
      value = static_cast<const at::Half*>(mask.data)[offset];
  }
  return value <= mask.hidden ? -INFINITY : value;
}

// A call's tensors as the kernels see them, and the keys of each head.
struct Call {
  Attention p;
  DType dtype;
  const AttentionKernels& kernels;
  Tensor q, k, v;  // kept alive
  OptionalTensor attn_mask;
  ScoreMask key_mask;  // of a mask that is the same for all queries: it goes into the key lists
  std::optional<KeepMask> columns, elements;
  int64_t span = 0;
  uint64_t seed = 0;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptionalTensor& mask, const OptionalTensor& seed_,
       double dropout_p, std::string_view pattern, bool is_causal, double scale)
      : p{}, dtype(compute_dtype(q_)), kernels(attention_kernels(dtype)), attn_mask(mask) {
    TORCH_CHECK_VALUE(q_.dim() == 4 && k_.dim() == 4 && v_.dim() == 4,
                      "dropkey_attention: q, k and v must be 4-d, got ", q_.sizes(), ", ", k_.sizes(), ", ",
                      v_.sizes());
    p.B = q_.size(0), p.H = q_.size(1), p.Sq = q_.size(2), p.D = q_.size(3);
    p.Hkv = k_.size(1), p.Sk = k_.size(2), p.Dv = v_.size(3);
    TORCH_CHECK_VALUE(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256 && p.Sk <= INT32_MAX - 64,
                      "dropkey_attention: D and Dv must be in 1..256, got ", q_.sizes(), " and ", v_.sizes());
    TORCH_CHECK_VALUE(p.Hkv > 0 ? p.H % p.Hkv == 0 : p.H == 0,
                      "dropkey_attention: k must have a divisor of q's heads, got ", p.H, " and ", p.Hkv);
    check("q", q_, q_.sizes(), q_.scalar_type());
    check("k", k_, {p.B, p.Hkv, p.Sk, p.D}, q_.scalar_type());
    check("v", v_, {p.B, p.Hkv, p.Sk, p.Dv}, q_.scalar_type());
    q = with_unit_columns(q_), k = with_unit_columns(k_), v = with_unit_columns(v_);
    p.q = head_rows(q), p.k = head_rows(k), p.v = head_rows(v);
    p.scale = static_cast<float>(scale);
    p.is_causal = is_causal;
    p.keep_bits = lorasp::kernels(dtype).keep_bits;
    set_mask(q_.scalar_type());
    set_drops(dropout_p, pattern, seed_);
  }

  bool empty() const { return p.B == 0 || p.H == 0 || p.Sq == 0; }

  void set_mask(at::ScalarType dtype) {
    if (!attn_mask) return;
    const Tensor& t = *attn_mask;
    TORCH_CHECK_VALUE(t.device().is_cpu() && t.dim() == 4, "dropkey_attention: attn_mask must be 4-d on cpu, got ",
                      t.sizes(), " on ", t.device());
    const int64_t full[] = {p.B, p.H, p.Sq, p.Sk};
    for (int d = 0; d < 4; ++d)
      TORCH_CHECK_VALUE(t.size(d) == 1 || t.size(d) == full[d],
                        "dropkey_attention: attn_mask must be broadcastable to ", at::IntArrayRef(full, 4), ", got ",
                        t.sizes());
    TORCH_CHECK_TYPE(t.scalar_type() == at::kBool || t.scalar_type() == at::kFloat || t.scalar_type() == dtype,
                     "dropkey_attention: attn_mask must be bool, float32 or ", dtype, ", got ", t.scalar_type());
    const ScoreMask mask = score_mask(t);
    (mask.row == 0 ? key_mask : p.mask) = mask;
  }

  void set_drops(double dropout_p, std::string_view pattern, const OptionalTensor& seed_tensor) {
    TORCH_CHECK_VALUE(pattern == "column" || pattern == "element" || pattern == "span",
                      "dropkey_attention: pattern must be column, element or span, got ", pattern);
    const double t = std::nearbyint(dropout_p * 65536);
    TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p < 1.0 && t < 65536,
                      "dropkey_attention: dropout_p must be in [0, 1), got ", dropout_p);
    if (dropout_p == 0.0 || (t == 0 && pattern != "span")) return;
    TORCH_CHECK_VALUE(seed_tensor.has_value(),
                      "dropkey_attention: seed must be a 0-d int64 tensor when dropout_p > 0, got None");
    check("seed", *seed_tensor, {}, at::kLong);
    seed = static_cast<uint64_t>(*seed_tensor->const_data_ptr<int64_t>());
    const KeepMask keep{seed, kPurposeDropKey, 0, static_cast<uint32_t>(t)};
    if (pattern == "span") {
      span = std::max<int64_t>(
          0, std::min(p.Sk - 1, std::max<int64_t>(1, static_cast<int64_t>(dropout_p * static_cast<double>(p.Sk)))));
    } else if (pattern == "column") {
      columns = keep;
    } else {
      elements = keep;
      p.elements = &*elements;
    }
  }

  // The keys of one head, in memory of the frame.
  KeyList keys(int64_t b, int64_t h, ScratchFrame& frame) const {
    const int64_t head = b * p.H + h;
    auto* index = frame.take<int32_t>(p.Sk + kPadding);
    const uint32_t* words = nullptr;
    if (columns) {
      auto* taken = frame.take<uint32_t>(p.Sk / 32 + 1);
      p.keep_bits(*columns, head * p.Sk, p.Sk, taken);
      words = taken;
    }
    int64_t gap = 0;
    if (span) {
      const uint32_t word = philox4x32_7(static_cast<uint64_t>(head), kPurposeDropKey, 0, seed).word[0];
      gap = static_cast<int64_t>(word % static_cast<uint64_t>(p.Sk - span + 1));
    }
    const bool biased = key_mask.kind != ScoreMask::kNone;
    float* bias = biased ? frame.take<float>(p.Sk + kPadding) : nullptr;
    const int64_t offset = b * key_mask.batch + h * key_mask.head;
    if (!words && !span && !biased) {
      for (int64_t j = 0; j < p.Sk; ++j) index[j] = static_cast<int32_t>(j);
      return {index, p.Sk, nullptr};
    }
    int64_t count = 0;
    bool adds = false;
    for (int64_t j = 0; j < p.Sk; ++j) {
      if (j == gap) j += span;
      if (j >= p.Sk) break;
      if (words && !(words[j / 32] >> (j % 32) & 1)) continue;
      if (biased) {
        const float value = mask_value(key_mask, offset + j * key_mask.key);
        if (value == -INFINITY) continue;
        adds = adds || value != 0.0f;
        bias[count] = value;
      }
      index[count++] = static_cast<int32_t>(j);
    }
    if (adds) std::fill(bias + count, bias + count + kPadding, 0.0f);
    return {index, count, adds ? bias : nullptr};
  }
};

int64_t threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// How many parts each of `units` equal pieces of work is cut into, so that every thread has about as much.
int64_t parts_of(int64_t units, int64_t most) {
  const int64_t wanted = threads();
  if (wanted == 1 || units % wanted == 0 || units >= 4 * wanted) return 1;
  return std::max<int64_t>(1, std::min(wanted, most));
}

std::tuple<Tensor, Tensor> dropkey_attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                         const OptionalTensor& attn_mask, const OptionalTensor& seed,
                                                         double dropout_p, std::string_view pattern, bool is_causal,
                                                         double scale) {
  const PlainDispatch plain;
  Call call(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale);
  Attention& p = call.p;
  Tensor o = at::empty({p.B, p.Sq, p.H, p.Dv}, q.options()).transpose(1, 2);
  Tensor lse = at::empty({p.B, p.H, p.Sq}, q.options().dtype(at::kFloat));
  if (call.empty()) return {o, lse};
  p.o = head_rows(o);
  p.lse = lse.mutable_data_ptr<float>();
  const int64_t heads = p.B * p.H, parts = parts_of(heads, ceil_div(p.Sq, call.kernels.forward_queries));
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts;
      ScratchFrame frame;
      const KeyList keys = call.keys(head / p.H, head % p.H, frame);
      call.kernels.forward(p, keys, {head / p.H, head % p.H, task % parts, parts},
                           frame.take<char>(static_cast<int64_t>(call.kernels.forward_bytes(p, keys.count))));
    }
  });
  return {o, lse};
}

// A gradient with the strides of torch.empty_like, which may not be ones the kernels write to.
struct Output {
  Tensor result, rows;

  Output(const Tensor& like, bool needed) {
    if (!needed) {
      result = rows = at::empty({0}, like.options());
      return;
    }
    result = at::empty_like(like);
    rows = unit_columns(result) ? result : at::empty(result.sizes(), result.options());
  }
  Tensor finish() const {
    if (!rows.is_same(result)) result.copy_(rows);
    return result;
  }
  char* head(int64_t b, int64_t h) const {
    return static_cast<char*>(rows.mutable_data_ptr()) +
           (b * rows.stride(0) + h * rows.stride(1)) * static_cast<int64_t>(rows.element_size());
  }
};

// dk or dv of one (batch, key head): fp32 rows of `parts` parts, summed in order and rounded.
void gather_parts(const Call& call, const float* parts_data, int64_t parts, int64_t cols, const Output& out, int64_t b,
                  int64_t key_head) {
  const int64_t count = call.p.Sk * cols;
  ScratchFrame frame;
  const float* total = parts_data;
  if (parts > 1) {
    auto* sum = frame.take<float>(count);
    for (int64_t i = 0; i < count; ++i) {
      float value = parts_data[i];
      for (int64_t part = 1; part < parts; ++part) value += parts_data[part * count + i];
      sum[i] = value;
    }
    total = sum;
  }
  call.kernels.round_rows(total, call.p.Sk, cols, out.head(b, key_head), out.rows.stride(2));
}

// Work of one (batch, key head): the query blocks of all its query heads, cut into parts that own their rows of dq and
// sum into their own dk and dv.
void backward_pass(const Call& call, const Output& dq, const Output& dk, const Output& dv, bool need_dq, bool need_dk,
                   bool need_dv) {
  const Attention& p = call.p;
  const int64_t group = p.H / p.Hkv, units = p.B * p.Hkv, blocks = ceil_div(p.Sq, call.kernels.backward_queries);
  const int64_t parts = parts_of(units, group * blocks);
  const int64_t size_k = need_dk ? p.Sk * p.D : 0, size_v = need_dv ? p.Sk * p.Dv : 0, size = size_k + size_v;
  const auto fp32 = call.q.options().dtype(at::kFloat);
  const Tensor partial = parts > 1 ? at::empty({units, parts * size}, fp32) : Tensor();
  at::parallel_for(0, units * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / parts, part = task % parts, b = unit / p.Hkv, key_head = unit % p.Hkv;
      ScratchFrame frame;
      float *sum_k, *sum_v;
      if (parts > 1) {
        float* base = partial.mutable_data_ptr<float>() + unit * parts * size;
        sum_k = base + part * size_k;
        sum_v = base + parts * size_k + part * size_v;
      } else {
        sum_k = frame.take<float>(size_k);
        sum_v = frame.take<float>(size_v);
      }
      std::fill(sum_k, sum_k + size_k, 0.0f);
      std::fill(sum_v, sum_v + size_v, 0.0f);
      const bool by_heads = parts <= group;
      const int64_t first_head = by_heads ? group * part / parts : 0;
      const int64_t last_head = by_heads ? group * (part + 1) / parts : group;
      for (int64_t g = first_head; g < last_head; ++g) {
        const int64_t h = key_head * group + g;
        ScratchFrame head_frame;
        const KeyList keys = call.keys(b, h, head_frame);
        const int64_t first = by_heads ? 0 : ((part - g * blocks) % parts + parts) % parts;
        call.kernels.backward(p, keys, {b, h, first, by_heads ? 1 : parts},
                              {need_dq ? dq.head(b, h) : nullptr, need_dq ? dq.rows.stride(2) : 0,
                               need_dk ? sum_k : nullptr, need_dv ? sum_v : nullptr},
                              head_frame.take<char>(static_cast<int64_t>(call.kernels.backward_bytes(p, keys.count))));
      }
      if (parts > 1) continue;
      if (need_dk) gather_parts(call, sum_k, 1, p.D, dk, b, key_head);
      if (need_dv) gather_parts(call, sum_v, 1, p.Dv, dv, b, key_head);
    }
  });
  if (parts == 1) return;
  at::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const float* base = partial.const_data_ptr<float>() + unit * parts * size;
      if (need_dk) gather_parts(call, base, parts, p.D, dk, unit / p.Hkv, unit % p.Hkv);
      if (need_dv) gather_parts(call, base + parts * size_k, parts, p.Dv, dv, unit / p.Hkv, unit % p.Hkv);
    }
  });
}

// dz summed over what the mask broadcasts: a task owns the mask rows it writes and walks all heads that read them.
Tensor mask_gradient(const Call& call) {
  const Attention& p = call.p;
  const Tensor& mask = *call.attn_mask;
  Tensor sum = at::zeros(mask.sizes(), mask.options().dtype(at::kFloat));
  const int64_t batches = mask.size(0), heads = mask.size(1);
  const int64_t parts =
      mask.size(2) == 1 ? 1 : parts_of(batches * heads, ceil_div(p.Sq, call.kernels.backward_queries));
  const int64_t row = mask.size(2) == 1 ? 0 : mask.size(3), key = mask.size(3) == 1 ? 0 : 1;
  at::parallel_for(0, batches * heads * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, owner = task / parts;
      float* data = sum.mutable_data_ptr<float>() + owner * mask.size(2) * mask.size(3);
      for (int64_t b = 0; b < p.B; ++b) {
        if (batches > 1 && b != owner / heads) continue;
        for (int64_t h = 0; h < p.H; ++h) {
          if (heads > 1 && h != owner % heads) continue;
          ScratchFrame frame;
          const KeyList keys = call.keys(b, h, frame);
          call.kernels.mask_gradient(
              p, keys, {b, h, part, parts}, {data, row, key},
              frame.take<char>(static_cast<int64_t>(call.kernels.backward_bytes(p, keys.count))));
        }
      }
    }
  });
  return sum.to(mask.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropkey_attention_backward_cpu(
    const Tensor& grad_o_, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o_, const Tensor& lse_,
    const OptionalTensor& attn_mask, const OptionalTensor& seed, double dropout_p, std::string_view pattern,
    bool is_causal, double scale, bool need_dq, bool need_dk, bool need_dv, bool need_dmask) {
  const PlainDispatch plain;
  Call call(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale);
  Attention& p = call.p;
  check("do", grad_o_, {p.B, p.H, p.Sq, p.Dv}, q.scalar_type());
  check("o", o_, {p.B, p.H, p.Sq, p.Dv}, q.scalar_type());
  check("lse", lse_, {p.B, p.H, p.Sq}, at::kFloat);
  TORCH_CHECK_VALUE(!need_dmask || (attn_mask && attn_mask->is_floating_point()),
                    "dropkey_attention: attn_mask must be additive when need_dmask");
  const Output dq(q, need_dq), dk(k, need_dk), dv(v, need_dv);
  if (call.empty()) {
    const auto zeros = [](const Output& t) { return t.result.zero_(); };
    return {zeros(dq), zeros(dk), zeros(dv),
            need_dmask ? at::zeros(attn_mask->sizes(), attn_mask->options()) : at::empty({0}, q.options())};
  }
  const Tensor grad_o = with_unit_columns(grad_o_), o = with_unit_columns(o_), lse = lse_.contiguous();
  p.grad_o = head_rows(grad_o);
  p.o = head_rows(o);
  p.lse = const_cast<float*>(lse.const_data_ptr<float>());
  if (need_dq || need_dk || need_dv) backward_pass(call, dq, dk, dv, need_dq, need_dk, need_dv);
  Tensor dmask = need_dmask ? mask_gradient(call) : at::empty({0}, q.options());
  return {dq.finish(), dk.finish(), dv.finish(), dmask};
}

}  // namespace

TORCH_LIBRARY_IMPL(lorasp, CPU, m) {
  m.impl("dropkey_attention_fwd_cpp", &dropkey_attention_forward_cpu);
  m.impl("dropkey_attention_bwd_cpp", &dropkey_attention_backward_cpu);
}

}  // namespace lorasp
