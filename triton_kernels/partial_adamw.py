"""partial_adamw on Triton: one AdamW step over the active entries of parameters, in place, one kernel per parameter.

    m = b1 m + (1 − b1) g         v = b2 v + (1 − b2) g²
    p = (1 − lr wd) p − lr / (1 − b1ᵗ) m / (√(v / (1 − b2ᵗ)) + eps)          t: the entry's own active steps

Where `active` is False nothing is written, whatever the gradient holds. Nothing is read on the host.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, as_bytes, check_operand, device_of, per_shape
from .tuning import ceil_div

_BLOCK = 1024
_FREE = (
    "param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "grad_ptr", "steps_ptr", "active_ptr", "lr", "log_beta1", "log_beta2",
    "beta2", "gain1", "gain2", "decay", "eps",
)  # fmt: skip


@triton.jit
def _one_minus_power(log_beta, steps):
    """1 − betaᵗ to fp32's precision: 1 − exp(t·log beta) would cancel while betaᵗ is close to 1."""
    x = log_beta * steps
    near = tl.maximum(x, -0.5)
    series = 1.0 + near / 9.0
    for order in tl.static_range(8, 1, -1):
        series = 1.0 + near / order * series
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _partial_adamw_kernel(
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, steps_ptr, active_ptr,
    size, columns, stride_sr, stride_sc, lr, log_beta1, log_beta2, beta2, gain1, gain2, decay, eps,
    HAS_ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Entries i of a contiguous parameter (size / columns, columns); steps, counted up before, and active lie at
    row·stride_sr + column·stride_sc.

    Reads 4·size and writes 3·size elements, less where nothing is active, 4 bytes of steps and 1 of active per entry,
    row or column.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    offs_s = offs // columns * stride_sr + offs % columns * stride_sc
    if HAS_ACTIVE:
        mask &= tl.load(active_ptr + offs_s, mask=mask, other=0) != 0
    steps = tl.load(steps_ptr + offs_s, mask=mask, other=1).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    param = tl.load(param_ptr + offs, mask=mask, other=0.0).to(tl.float32)

    exp_avg += gain1 * (grad - exp_avg)
    exp_avg_sq = beta2 * exp_avg_sq + gain2 * grad * grad
    step_size = lr / _one_minus_power(log_beta1, steps)
    root = tl.sqrt(exp_avg_sq) / tl.sqrt(_one_minus_power(log_beta2, steps))
    param = decay * param - step_size * exp_avg / (root + eps)
    tl.store(exp_avg_ptr + offs, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptr + offs, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
    tl.store(param_ptr + offs, param.to(param_ptr.dtype.element_ty), mask=mask)


def step_(
    params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor], actives: Sequence[Tensor | None], lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """One step, in place. Shapes as the raw op says; fp32, bf16 or fp16, computed in fp32 and rounded once.

    A tensor that does not lie in one piece is copied, and written back. Raises ValueError for a dtype or a device that
    the kernel does not take.
    """
    decay = 1.0 - lr * weight_decay
    scalars = float(lr), _log(beta1), _log(beta2), float(beta2), 1.0 - beta1, 1.0 - beta2, decay, float(eps)
    for i, param in enumerate(params):
        check_operand("partial_adamw", f"params[{i}]", param)
        active = actives[i]
        with device_of(param):
            steps[i].add_(1 if active is None else active)
            if param.numel() == 0:
                continue
            originals = param, exp_avgs[i], exp_avg_sqs[i]
            written = [tensor.contiguous() for tensor in originals]
            run = _launch(param.numel(), param.shape[-1] if param.ndim else 1, active is not None and active.shape)
            bits = as_bytes(active)
            run(*written, grads[i].contiguous(), steps[i].contiguous(), bits, *scalars)
            for tensor, new in zip(originals, written, strict=True):
                if tensor is not new:
                    tensor.copy_(new)


@per_shape
def _launch(size: int, columns: int, active: tuple[int, int] | bool) -> Launch:
    """(_FREE); active: the shape of a parameter's bits, False where all of it steps."""
    rows, wide = active or (1, 1)
    arguments = {
        "size": size, "columns": columns, "stride_sr": 0 if rows == 1 else wide, "stride_sc": 0 if wide == 1 else 1,
        "HAS_ACTIVE": bool(active), "BLOCK": _BLOCK,
    }  # fmt: skip
    return Launch(_partial_adamw_kernel, (ceil_div(size, _BLOCK),), arguments, _FREE, num_warps=4, num_stages=1)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
