"""hidden_cut: dropout of a sublayer's output and the residual add in one pass; backward regenerates the mask.

    y = residual + D o x          dx = D o dy          dresidual = dy

What backward keeps: 8 bytes of seed. Source: HiddenCut arXiv 2106.00149; HiddenKey arXiv 2403.00812.
"""

import torch
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.reference import hidden_cut as reference

PATTERNS = ("element", "column", "span")
FORWARD_SCHEMA = "(Tensor x, Tensor? residual, Tensor seed, float p, str pattern) -> Tensor"
BACKWARD_SCHEMA = "(Tensor dy, Tensor seed, float p, str pattern, ScalarType dtype) -> Tensor"


def _forward_fake(x, residual, seed, p, pattern):
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _backward_fake(dy, seed, p, pattern, dtype):
    return dy.new_empty(dy.shape, dtype=dtype)


def _forward_triton(x, residual, seed, p, pattern):
    kernels = registry.triton_kernels("hidden_cut")
    return kernels.forward(x, residual, seed, p, pattern)


def _backward_triton(dy, seed, p, pattern, dtype):
    kernels = registry.triton_kernels("hidden_cut")
    return kernels.backward(dy, seed, p, pattern, dtype)


forward_ops = registry.declare(
    "hidden_cut_fwd", FORWARD_SCHEMA, _forward_fake, {"reference": reference.forward, "triton": _forward_triton}
)
backward_ops = registry.declare(
    "hidden_cut_bwd", BACKWARD_SCHEMA, _backward_fake, {"reference": reference.backward, "triton": _backward_triton}
)


class HiddenCutFunction(torch.autograd.Function):
    """Forward and backward of hidden_cut over the raw ops of one backend; second derivatives raise."""

    @staticmethod
    def forward(ctx, x, residual, seed, p, pattern, backend):
        ctx.save_for_backward(seed if ctx.needs_input_grad[0] else None)
        ctx.constants = p, pattern, backend, x.dtype, None if residual is None else residual.dtype
        return forward_ops[backend](x, residual, seed, p, pattern)

    @staticmethod
    def backward(ctx, dy):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy):
    (seed,) = ctx.saved_tensors
    need_x, need_residual = ctx.needs_input_grad[:2]
    p, pattern, backend, x_dtype, residual_dtype = ctx.constants
    dx = backward_ops[backend](dy, seed, p, pattern, x_dtype) if need_x else None
    return dx, dy.to(residual_dtype) if need_residual else None, None, None, None, None


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
