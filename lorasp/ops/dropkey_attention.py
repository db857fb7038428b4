"""dropkey_attention: attention whose logits are dropped before the softmax, as one operator with one autograd node.

    z = scale q k^T + attn_mask;  z[masked or dropped] = -inf;  p = softmax(z);  o = p v;  lse = log sum exp z
    dv = p^T do;  dp = do v^T;  dz = p o (dp - rowsum(do o o));  dq = scale dz k;  dk = scale dz^T q;  dmask = dz

Backward keeps q, k, v, o, lse, attn_mask and 8 bytes of seed; p and the drop decisions are recomputed.
Sources: DropKey arXiv 2208.02646, algorithm 1; HiddenKey arXiv 2403.00812, section 3.1.
"""

import torch
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.reference import dropkey_attention as reference

PATTERNS = ("column", "element", "span")

FORWARD_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? seed, float dropout_p, str pattern, bool is_causal, "
    "float scale) -> (Tensor o, Tensor lse)"
)
BACKWARD_SCHEMA = (
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? attn_mask, Tensor? seed, float dropout_p, "
    "str pattern, bool is_causal, float scale, bool need_dq, bool need_dk, bool need_dv, bool need_dmask) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask)"
)


def _forward_fake(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return reference.empty_output(q, v), q.new_empty(q.shape[:3], dtype=wide)


def _backward_fake(
    do, q, k, v, o, lse, attn_mask, seed, dropout_p, pattern, is_causal, scale, need_dq, need_dk, need_dv, need_dmask
):
    return (
        torch.empty_like(q) if need_dq else do.new_empty(0),
        torch.empty_like(k) if need_dk else do.new_empty(0),
        torch.empty_like(v) if need_dv else do.new_empty(0),
        attn_mask.new_empty(attn_mask.shape) if need_dmask else do.new_empty(0),
    )


def _forward_reference(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale):
    with registry.autocast_off(q.device.type):
        return reference.forward(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)


def _backward_reference(do, q, *rest):
    with registry.autocast_off(q.device.type):
        return reference.backward(do, q, *rest)


def _forward_triton(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale):
    kernels = registry.triton_kernels("dropkey_attention")
    with registry.autocast_off(q.device.type):
        return kernels.forward(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)


def _backward_triton(do, q, *rest):
    kernels = registry.triton_kernels("dropkey_attention")
    with registry.autocast_off(q.device.type):
        return kernels.backward(do, q, *rest)


# index (rows, keys) and rank (rows, keys + 1), int32, of pattern "column": rank counts the kept keys before each key,
# index holds the kept keys in order and behind them the dropped ones, from the back.
registry.define(
    "dropkey_attention_keys_cuda(Tensor seed, int rows, int keys, float dropout_p) -> (Tensor index, Tensor rank)"
)
forward_ops = registry.declare(
    "dropkey_attention_fwd", FORWARD_SCHEMA, _forward_fake,
    {"reference": _forward_reference, "triton": _forward_triton},
)  # fmt: skip
backward_ops = registry.declare(
    "dropkey_attention_bwd", BACKWARD_SCHEMA, _backward_fake,
    {"reference": _backward_reference, "triton": _backward_triton},
)  # fmt: skip


class DropKeyAttentionFunction(torch.autograd.Function):
    """Forward and backward of dropkey_attention over the raw ops of one backend; second derivatives raise."""

    @staticmethod
    def forward(ctx, q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale, backend):
        o, lse = forward_ops[backend](q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)
        if any(ctx.needs_input_grad[:4]):
            ctx.save_for_backward(q, k, v, o, lse, attn_mask, seed)
        ctx.constants = (dropout_p, pattern, is_causal, scale), backend
        return o

    @staticmethod
    def backward(ctx, do):
        return _backward_once(ctx, do) if torch.is_grad_enabled() else _backward(ctx, do)


def _backward(ctx, do):
    scalars, backend = ctx.constants
    needed = ctx.needs_input_grad[:4]
    gradients = backward_ops[backend](do, *ctx.saved_tensors, *scalars, *needed)
    return *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)), *(None,) * 6


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
