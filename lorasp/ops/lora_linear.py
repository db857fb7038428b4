"""lora_linear: the frozen product and the low-rank update as one operator with one autograd node.

    xa = s * (D o x) A^T          y  = x W^T + bias + xa B^T
    g  = s * dy B                 dx = D o (g A) + dy W        dB = dy^T xa        dA = g^T (D o x)

What backward keeps beyond weights: x itself (only if A or the weight trains), xa (only if B trains), 8 bytes of seed.
Sources: LoRA arXiv 2106.09685, eq. 3; LoRA-FA arXiv 2308.03303, section 3.
"""

import torch
from torch.autograd.function import once_differentiable

from lorasp.ops import registry
from lorasp.reference import lora_linear as reference

FORWARD_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scale, "
    "float dropout_p, int member, str plan, Tensor? packed) -> (Tensor y, Tensor xa)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? xa, Tensor? seed, "
    "Tensor? mask_A, Tensor? mask_B, float scale, float dropout_p, int member, bool need_dx, bool need_dA, "
    "bool need_dB, str plan, Tensor? packed) -> (Tensor dx, Tensor dlora_A, Tensor dlora_B)"
)


def _forward_fake(x, weight, bias, lora_A, lora_B, seed, scale, dropout_p, member, plan, packed):
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], lora_A.shape[0]))


def _backward_fake(
    dy, x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, scale, dropout_p, member, need_dx, need_dA, need_dB, plan,
    packed,
):  # fmt: skip
    return (
        dy.new_empty((dy.shape[0], weight.shape[1])) if need_dx else dy.new_empty(0),
        lora_A.new_empty(lora_A.shape) if need_dA else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape) if need_dB else dy.new_empty(0),
    )


def _forward_reference(x, weight, bias, lora_A, lora_B, seed, scale, dropout_p, member, plan, packed):
    refuse_plan("reference", plan)
    with registry.autocast_off(x.device.type):
        return reference.forward(x, weight, bias, lora_A, lora_B, seed, scale, dropout_p, member)


def _backward_reference(
    dy, x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, scale, dropout_p, member, need_dx, need_dA, need_dB, plan,
    packed,
):  # fmt: skip
    with registry.autocast_off(dy.device.type):
        return reference.backward(
            dy, x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, scale, dropout_p, member, need_dx, need_dA, need_dB
        )


def refuse_plan(backend: str, plan: str) -> None:
    if plan != "auto":
        raise ValueError(f"lora_linear: plan must be auto for backend {backend}, got {plan!r}")


def _forward_triton(x, weight, bias, lora_A, lora_B, seed, scale, dropout_p, member, plan, packed):
    kernels = registry.triton_kernels("lora_linear")
    with registry.autocast_off(x.device.type):
        return kernels.forward(x, weight, bias, lora_A, lora_B, seed, scale, dropout_p, member, plan)


def _backward_triton(
    dy, x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, scale, dropout_p, member, need_dx, need_dA, need_dB, plan,
    packed,
):  # fmt: skip
    kernels = registry.triton_kernels("lora_linear")
    with registry.autocast_off(dy.device.type):
        return kernels.backward(
            dy, x, weight, lora_A, lora_B, xa, seed, mask_A, mask_B, scale, dropout_p, member, need_dx, need_dA,
            need_dB, plan,
        )  # fmt: skip


registry.define("pack_weight_cpp(Tensor weight, bool backward) -> Tensor")
forward_ops = registry.declare(
    "lora_linear_fwd", FORWARD_SCHEMA, _forward_fake, {"reference": _forward_reference, "triton": _forward_triton}
)
backward_ops = registry.declare(
    "lora_linear_bwd", BACKWARD_SCHEMA, _backward_fake, {"reference": _backward_reference, "triton": _backward_triton}
)


def as_rows(x, dtype):
    """x (..., K) as (M, K) in dtype, untouched where it is that already: per-call overhead counts at small M."""
    x = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return x if x.dtype == dtype else x.to(dtype)


def cast(tensor, dtype):
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def shaped(y, x):
    """y (M, N) with x's leading dims; autograd must not take it for a view, or it could not be written to in place."""
    return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))


class LoRALinearFunction(torch.autograd.Function):
    """Forward and backward of lora_linear over the raw ops of one backend; second derivatives raise."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, lora_A, lora_B, mask_A, mask_B, seed, packed_forward, packed_backward, scale, dropout_p,
        member, dtype, backend, plan,
    ):  # fmt: skip
        need_x, need_weight, _, need_A, need_B = ctx.needs_input_grad[:5]
        y, xa = forward_ops[backend](
            as_rows(x, dtype), cast(weight, dtype), cast(bias, dtype), lora_A, lora_B, seed, scale, dropout_p, member,
            plan, packed_forward,
        )  # fmt: skip
        ctx.save_for_backward(
            x if need_A or need_weight else None,
            xa if need_B else None,
            weight if need_x else None,
            lora_A,
            lora_B,
            mask_A if need_A else None,
            mask_B if need_B else None,
            seed if need_x or need_A else None,
            packed_backward if need_x else None,
        )
        ctx.constants = (
            (scale, dropout_p, member), x.shape, (x.dtype, weight.dtype, None if bias is None else bias.dtype), dtype,
            backend, plan,
        )  # fmt: skip
        return shaped(y, x)

    @staticmethod
    def backward(ctx, dy):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy):
    x, xa, weight, lora_A, lora_B, mask_A, mask_B, seed, packed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
    scalars, x_shape, (x_dtype, weight_dtype, bias_dtype), dtype, backend, plan = ctx.constants
    dy = dy if dy.ndim == 2 else dy.reshape(-1, dy.shape[-1])
    rows = None if x is None else as_rows(x, dtype)
    dx = dweight = dbias = dlora_A = dlora_B = None
    if need_x or need_A or need_B:
        # The weight is read for dx only; the kernels take K and N from lora_A and dy.
        dx, dlora_A, dlora_B = backward_ops[backend](
            dy, rows if need_A else None, cast(weight, dtype) if need_x else dy.new_empty((0, 0)), lora_A, lora_B, xa,
            seed, mask_A, mask_B, *scalars, need_x, need_A, need_B, plan, packed,
        )  # fmt: skip
        dx = (cast(dx, x_dtype) if len(x_shape) == 2 else dx.reshape(x_shape).to(x_dtype)) if need_x else None
    if need_weight:
        dweight = (dy.t() @ rows).to(weight_dtype)
    if need_bias:
        dbias = dy.sum(0).to(bias_dtype)
    rest = (None,) * 11
    return dx, dweight, dbias, dlora_A if need_A else None, dlora_B if need_B else None, *rest


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)
