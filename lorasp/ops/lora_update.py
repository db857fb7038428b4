"""lora_update: the low-rank update alone, accumulated in place onto a product that somebody else made.

    xa = s * (D o x) A^T          y += xa B^T
    g  = s * dy B                 dx += D o (g A)        dB = dy^T xa        dA = g^T (D o x)

What lora_linear does around a frozen product it makes itself, for products it cannot make: quantised weights. What
backward keeps: x itself (only if A trains), xa (only if B trains), 8 bytes of seed. The gradient of y passes through.
Sources: LoRA arXiv 2106.09685, eq. 3; LoRA-FA arXiv 2308.03303, section 3.
"""

import torch
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.ops.lora_linear import as_rows, cast
from lorasp.reference import lora_update as reference

FORWARD_SCHEMA = (
    "(Tensor(a!) y, Tensor x, Tensor lora_A, Tensor lora_B, Tensor? seed, float scale, float dropout_p, int member) "
    "-> Tensor xa"
)
BACKWARD_SCHEMA = (
    "(Tensor(a!)? dx, Tensor dy, Tensor? x, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, float scale, "
    "float dropout_p, int member, bool need_dA, bool need_dB) -> (Tensor dlora_A, Tensor dlora_B)"
)


def _forward_fake(y, x, lora_A, lora_B, seed, scale, dropout_p, member):
    return x.new_empty((x.shape[0], lora_A.shape[0]))


def _backward_fake(dx, dy, x, lora_A, lora_B, xa, seed, scale, dropout_p, member, need_dA, need_dB):
    return (
        lora_A.new_empty(lora_A.shape) if need_dA else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_dB else dy.new_empty(0),
    )


def _forward_reference(y, x, *arguments):
    with registry.autocast_off(x.device.type):
        return reference.forward(y, x, *arguments)


def _backward_reference(dx, dy, *arguments):
    with registry.autocast_off(dy.device.type):
        return reference.backward(dx, dy, *arguments)


def _forward_triton(y, x, *arguments):
    kernels = registry.triton_kernels("lora_update")
    with registry.autocast_off(x.device.type):
        return kernels.forward(y, x, *arguments)


def _backward_triton(dx, dy, *arguments):
    kernels = registry.triton_kernels("lora_update")
    with registry.autocast_off(dy.device.type):
        return kernels.backward(dx, dy, *arguments)


forward_ops = registry.declare(
    "lora_update_fwd", FORWARD_SCHEMA, _forward_fake, {"reference": _forward_reference, "triton": _forward_triton}
)
backward_ops = registry.declare(
    "lora_update_bwd", BACKWARD_SCHEMA, _backward_fake, {"reference": _backward_reference, "triton": _backward_triton}
)


def update(y, x, lora_A, lora_B, seed, scale, dropout_p, member, backend):
    """y (..., N) += the update of x (..., K), in place; xa (M, R)."""
    # Where several strides stand for the leading dimensions, y has no (M, N) view.
    rows = y if y.ndim == 2 else y.view(-1, y.shape[-1]) if y.is_contiguous() else y.reshape(-1, y.shape[-1])
    xa = forward_ops[backend](
        rows, as_rows(x, y.dtype), lora_A, lora_B, seed, scale, dropout_p, member
    )  # fmt: skip
    if y.ndim != 2 and not y.is_contiguous():
        y.copy_(rows.view(y.shape))
    return xa


class LoRAUpdateFunction(torch.autograd.Function):
    """Forward, in place on y, and backward of lora_update over the raw ops of one backend; second derivatives raise."""

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, seed, scale, dropout_p, member, backend):
        _, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        ctx.mark_dirty(y)
        xa = update(y, x, lora_A, lora_B, seed, scale, dropout_p, member, backend)
        ctx.save_for_backward(
            x if need_A else None, xa if need_B else None, lora_A, lora_B, seed if need_x or need_A else None
        )
        ctx.constants = (scale, dropout_p, member), x.shape, x.dtype, backend
        return y

    @staticmethod
    def backward(ctx, dy):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy):
    x, xa, lora_A, lora_B, seed = ctx.saved_tensors
    need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
    scalars, x_shape, x_dtype, backend = ctx.constants
    dx = dlora_A = dlora_B = None
    if need_x or need_A or need_B:
        rows = as_rows(dy, dy.dtype)
        dx = rows.new_zeros((rows.shape[0], x_shape[-1])) if need_x else None
        dlora_A, dlora_B = backward_ops[backend](
            dx, rows, as_rows(x, dy.dtype) if need_A else None, lora_A, lora_B, xa, seed, *scalars, need_A, need_B
        )
        dx = cast(dx.reshape(x_shape), x_dtype) if need_x else None
    rest = (None,) * 5
    return dy if need_y else None, dx, dlora_A if need_A else None, dlora_B if need_B else None, *rest


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
