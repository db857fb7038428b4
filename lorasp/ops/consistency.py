"""consistency: the divergence between two passes' predictions, row by row, streaming over the vocabulary.

    kl = (KL(P|Q) + KL(Q|P)) / 2          js = KL(P|Q)          P = softmax(logits), Q = softmax(other)

No softmax is stored: backward keeps both logits, which are alive anyway, and six numbers a row, and forms P and Q
again.
Source: HiddenKey arXiv 2403.00812.
"""

import torch
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.reference import consistency as reference

KINDS = ("kl", "js")
STATS = 6
FORWARD_SCHEMA = "(Tensor logits, Tensor other, Tensor? mask, str kind) -> (Tensor rows, Tensor stats)"
BACKWARD_SCHEMA = (
    "(Tensor drows, Tensor logits, Tensor other, Tensor stats, Tensor? mask, str kind, bool need_dlogits, "
    "bool need_dother) -> (Tensor dlogits, Tensor dother)"
)
# The gradients where the logits were: nothing else of their size exists.
REPLACE_SCHEMA = (
    "(Tensor drows, Tensor(a!) logits, Tensor(b!) other, Tensor stats, Tensor? mask, str kind, bool need_dlogits, "
    "bool need_dother) -> ()"
)


def _forward_fake(logits, other, mask, kind):
    rows = logits.shape[:-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((*rows, STATS), dtype=dtype)


def _backward_fake(drows, logits, other, stats, mask, kind, need_dlogits, need_dother):
    return (
        logits.new_empty(logits.shape if need_dlogits else (0,)),
        other.new_empty(other.shape if need_dother else (0,)),
    )


def _replace_fake(drows, logits, other, stats, mask, kind, need_dlogits, need_dother):
    return None


def _replace_reference(drows, logits, other, stats, mask, kind, need_dlogits, need_dother):
    gradients = reference.backward(drows, logits, other, stats, mask, kind, need_dlogits, need_dother)
    for target, gradient, needed in zip((logits, other), gradients, (need_dlogits, need_dother), strict=True):
        if needed:
            target.copy_(gradient)


def _forward_triton(logits, other, mask, kind):
    kernels = registry.triton_kernels("consistency")
    return kernels.forward(logits, other, mask, kind)


def _backward_triton(drows, logits, other, stats, mask, kind, need_dlogits, need_dother):
    kernels = registry.triton_kernels("consistency")
    return kernels.backward(drows, logits, other, stats, mask, kind, need_dlogits, need_dother)


def _replace_triton(drows, logits, other, stats, mask, kind, need_dlogits, need_dother):
    kernels = registry.triton_kernels("consistency")
    kernels.replace(drows, logits, other, stats, mask, kind, need_dlogits, need_dother)


forward_ops = registry.declare(
    "consistency_fwd", FORWARD_SCHEMA, _forward_fake, {"reference": reference.forward, "triton": _forward_triton}
)
backward_ops = registry.declare(
    "consistency_bwd", BACKWARD_SCHEMA, _backward_fake, {"reference": reference.backward, "triton": _backward_triton}
)
replace_ops = registry.declare(
    "consistency_replace", REPLACE_SCHEMA, _replace_fake, {"reference": _replace_reference, "triton": _replace_triton}
)


class ConsistencyFunction(torch.autograd.Function):
    """Rows (B, T) and their gradients over the raw ops of one backend; second derivatives raise."""

    @staticmethod
    def forward(ctx, logits, other, mask, kind, backend):
        rows, stats = forward_ops[backend](logits, other, mask, kind)
        ctx.save_for_backward(logits, other, stats, mask)
        ctx.constants = kind, backend
        return rows

    @staticmethod
    def backward(ctx, drows):
        return _backward_once(ctx, drows) if torch.is_grad_enabled() else _backward(ctx, drows)


def _backward(ctx, drows):
    logits, other, stats, mask = ctx.saved_tensors
    kind, backend = ctx.constants
    needs = ctx.needs_input_grad[:2]
    gradients = backward_ops[backend](drows, logits, other, stats, mask, kind, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
