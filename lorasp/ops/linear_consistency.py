"""linear_consistency: consistency of two hidden states through one output head, without their logits.

    logits = hidden W^T + bias          rows = consistency(logits, other W^T + bias)

The rows go through the head in chunks: a chunk's two logits are formed, reduced to their rows, replaced by their
gradients and multiplied back to dhidden, dother and dW. So the gradients are formed in forward, for a gradient of 1 of
every row; backward scales them. That saves forming the logits twice, and keeps tensors of the size of hidden where
backward needs hidden's gradient anyway. Only rows that keep a gradient each (reduction "none") do it in backward.
The technique: Liger-Kernel's fused linear losses, arXiv 2410.10989.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasp.ops import consistency, registry
from lorasp.reference import linear_consistency as reference

SCHEMA = (
    "(Tensor hidden, Tensor other, Tensor weight, Tensor? bias, Tensor? mask, Tensor? drows, str kind, "
    "bool need_dhidden, bool need_dother, bool need_dweight, bool need_dbias) "
    "-> (Tensor rows, Tensor dhidden, Tensor dother, Tensor dweight, Tensor dbias)"
)
LOGITS_BYTES = 40 << 20  # both logits of a chunk; with what else is in flight the workspace stays below 64 MiB
PIECE_BYTES = 8 << 20  # one chunk's share of a piece of dW, before it is added in fp32


def _fake(hidden, other, weight, bias, mask, drows, kind, need_dhidden, need_dother, need_dweight, need_dbias):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return (
        hidden.new_empty(hidden.shape[:1], dtype=dtype),
        hidden.new_empty(hidden.shape if need_dhidden else (0,)),
        other.new_empty(other.shape if need_dother else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
        weight.new_empty(weight.shape[:1] if need_dbias else (0,)),
    )


def _reference(hidden, *arguments):
    with registry.autocast_off(hidden.device.type):
        return reference.forward(hidden, *arguments)


def chunk_rows(M: int, V: int, itemsize: int) -> int:
    """Rows whose two logits fit LOGITS_BYTES; whole multiples of 8 where there are that many."""
    rows = max(1, LOGITS_BYTES // (2 * V * itemsize))
    return min(M, rows // 8 * 8 if rows >= 8 else rows)


def _chunked(backend: str):
    form, replace = consistency.forward_ops[backend], consistency.replace_ops[backend]

    def run(hidden, other, weight, bias, mask, drows, kind, need_dhidden, need_dother, need_dweight, need_dbias):
        (M, H), V = hidden.shape, weight.shape[0]
        wide = torch.float32
        rows = hidden.new_empty(M, dtype=wide)
        drows = hidden.new_ones(M, dtype=wide) if drows is None else drows
        dhidden = hidden.new_empty((M, H) if need_dhidden else (0,))
        dother = other.new_empty((M, H) if need_dother else (0,))
        dweight = weight.new_zeros((V, H) if need_dweight else (0,), dtype=wide)
        dbias = weight.new_zeros((V,) if need_dbias else (0,), dtype=wide)
        head = need_dweight or need_dbias
        sides = (hidden, dhidden, need_dhidden), (other, dother, need_dother)
        step = chunk_rows(M, V, hidden.element_size())
        buffers = hidden.new_empty((2, step, V))
        for start in range(0, M, max(step, 1)):
            chunk = slice(start, min(M, start + step))
            logits = buffers[:, : chunk.stop - chunk.start]
            for (side, _, _), out in zip(sides, logits, strict=True):
                _linear(side[chunk], weight, bias, out)
            kept = None if mask is None else mask[chunk].unsqueeze(0)
            part, stats = form(logits[:1], logits[1:], kept, kind)
            rows[chunk] = part[0]
            needs = need_dhidden or head, need_dother or head
            if not any(needs):
                continue
            replace(drows[chunk].unsqueeze(0), logits[:1], logits[1:], stats, kept, kind, *needs)
            for (side, dside, need), dlogits in zip(sides, logits, strict=True):
                if need:
                    torch.mm(dlogits, weight, out=dside[chunk])
                if need_dweight:
                    seen = side[chunk] if kept is None else side[chunk].where(kept[0].unsqueeze(-1), 0)
                    _add_outer(dlogits, seen, dweight)
                if need_dbias:
                    dbias += dlogits.sum(0, dtype=wide)
        return rows, dhidden, dother, dweight.to(weight.dtype), dbias.to(weight.dtype)

    def without_autocast(hidden, *arguments):
        with registry.autocast_off(hidden.device.type):
            return run(hidden, *arguments)

    return without_autocast


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _add_outer(dlogits: Tensor, x: Tensor, dweight: Tensor) -> None:
    """dweight (V, H), fp32, += dlogits^T x, piece by piece: a half-precision product is rounded before it is added."""
    V, H = dweight.shape
    if x.dtype == dweight.dtype:
        dweight.addmm_(dlogits.t(), x)
        return
    step = max(1, PIECE_BYTES // (H * x.element_size()))
    for start in range(0, V, step):
        piece = slice(start, start + step)
        dweight[piece] += dlogits[:, piece].t() @ x


ops = registry.declare(
    "linear_consistency",
    SCHEMA,
    _fake,
    {"reference": _reference} | {backend: _chunked(backend) for backend in ("cpp", "triton", "cuda")},
)


class LinearConsistencyFunction(torch.autograd.Function):
    """sum(rows) / divisor, or the rows (M,) where divisor is None, over the raw op of one backend."""

    @staticmethod
    def forward(ctx, hidden, other, weight, bias, mask, divisor, kind, differentiate, dtype, backend):
        form_now = differentiate and divisor is not None
        needs = ctx.needs_input_grad[:4] if form_now else (False,) * 4
        rows, *gradients = ops[backend](*_cast(hidden, other, weight, bias, dtype), mask, None, kind, *needs)
        ctx.constants = (
            form_now,
            kind,
            dtype,
            backend,
            [t if t is None else t.dtype for t in (hidden, other, weight, bias)],
        )
        if form_now:
            ctx.save_for_backward(divisor, *(g if need else None for g, need in zip(gradients, needs, strict=True)))
        else:
            ctx.save_for_backward(hidden, other, weight, bias, mask)
        return rows if divisor is None else rows.sum() / divisor

    @staticmethod
    def backward(ctx, dloss):
        return _backward_once(ctx, dloss) if torch.is_grad_enabled() else _backward(ctx, dloss)


def _cast(hidden, other, weight, bias, dtype):
    return (t if t is None or t.dtype == dtype else t.to(dtype) for t in (hidden, other, weight, bias))


def _backward(ctx, dloss):
    form_now, kind, dtype, backend, dtypes = ctx.constants
    needs = ctx.needs_input_grad[:4]
    if form_now:
        divisor, *gradients = ctx.saved_tensors
        factor = dloss / divisor
    else:
        *inputs, mask = ctx.saved_tensors
        _, *gradients = ops[backend](*_cast(*inputs, dtype), mask, dloss, kind, *needs)
        factor = None
    results = (
        (g if factor is None else g * factor).to(dtype) if need else None
        for g, need, dtype in zip(gradients, needs, dtypes, strict=True)
    )
    return *results, *(None,) * 6


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
