// dropkey_attention on CPU: lorasp::dropkey_attention_fwd_cpp and lorasp::dropkey_attention_bwd_cpp (schemas in
// lorasp/ops/dropkey_attention.py). The mathematics is in dropkey_attention/kernels.h; here: how the heads are dealt
// out to threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "dropkey_attention/call.h"

namespace lorasp {
namespace {

constexpr const char* kOp = "dropkey_attention";

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
  AttentionCall call(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale);
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
    rows = has_unit_columns(result) ? result : at::empty(result.sizes(), result.options());
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
void gather_parts(const AttentionCall& call, const float* parts_data, int64_t parts, int64_t cols, const Output& out,
                  int64_t b, int64_t key_head) {
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
void backward_pass(const AttentionCall& call, const Output& dq, const Output& dk, const Output& dv, bool need_dq,
                   bool need_dk, bool need_dv) {
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
Tensor mask_gradient(const AttentionCall& call) {
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
  AttentionCall call(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale);
  Attention& p = call.p;
  check_tensor(kOp, "do", grad_o_, {p.B, p.H, p.Sq, p.Dv}, q.scalar_type());
  check_tensor(kOp, "o", o_, {p.B, p.H, p.Sq, p.Dv}, q.scalar_type());
  check_tensor(kOp, "lse", lse_, {p.B, p.H, p.Sq}, at::kFloat);
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
