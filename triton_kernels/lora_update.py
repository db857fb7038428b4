"""lora_update on Triton: launchers with the semantics of the operator's raw ops, over lora_linear's plan addmm.

    xa = s·(D∘x) Aᵀ      y += xa Bᵀ
    g  = s·dy B          dx += D∘(g A)          dB = dyᵀ xa        dA = gᵀ (D∘x)

The skinny kernels and their tiles are lora_linear's: lora_linear_skinny.py, tuning.py.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .launch import check_operand, device_of, target_of, with_unit_stride
from .lora_linear_products import (
    NO_DROPOUT,
    Dropout,
    accumulate,
    factor,
    from_dy,
    outer,
    project,
)


def forward(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scale: float, dropout_p: float,
    member: int,
) -> Tensor:  # fmt: skip
    """xa (M, R) of x (M, K), lora_A (R, K), lora_B (N, R); y (M, N) += xa lora_Bᵀ in place; any strides.

    y and x are fp32, bf16 or fp16 alike; lora_A and lora_B in their dtype or fp32. seed: 0-d int64 on x's device, None
    without dropout. Raises ValueError for a dtype or a device that these kernels do not take.
    """
    check_operand("lora_update", "x", x)
    if x.shape[0] == 0:
        return x.new_empty((0, lora_A.shape[0]))
    target, dropout = target_of(x), Dropout(seed, round(dropout_p * 65536), member)
    A, B = factor(lora_A, x.dtype), factor(lora_B, x.dtype)
    with device_of(x), _contiguous(y) as rows:
        xa = project(with_unit_stride(x), A, scale * dropout.rescale, dropout, target, rank_first=True)
        accumulate(rows, xa, B, NO_DROPOUT, target, rank_first=False)
    return xa


def backward(
    dx: Tensor | None, dy: Tensor, x: Tensor | None, lora_A: Tensor, lora_B: Tensor, xa: Tensor | None,
    seed: Tensor | None, scale: float, dropout_p: float, member: int, need_dA: bool, need_dB: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dlora_A, dlora_B), an empty (0,) tensor where not needed; dx (M, K), unless None, += D∘(g A) in place.

    dy (M, N), x (M, K) for dA, lora_A (R, K), lora_B (N, R), xa (M, R) of the forward for dB. Gradients are in their
    parameter's dtype, rounded once from fp32. Raises ValueError as forward does.
    """
    check_operand("lora_update", "dy", dy)
    dA, dB = dy.new_empty(0), dy.new_empty(0)
    if dy.shape[0] == 0:
        dA = torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_dA else dA
        dB = torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_dB else dB
        return dA, dB
    target, dropout = target_of(dy), Dropout(seed, round(dropout_p * 65536), member)
    dy = with_unit_stride(dy)
    A, B = factor(lora_A, dy.dtype), factor(lora_B, dy.dtype)
    with device_of(dy):
        need_g = dx is not None or need_dA
        g, dB = from_dy(dy, B, xa, scale * dropout.rescale, None, lora_B.dtype, need_g, need_dB, target)
        if need_dA:
            dA = outer(with_unit_stride(x), g, lora_A.dtype, None, dropout, target, rank_first=True)
        if dx is not None:
            with _contiguous(dx) as rows:
                accumulate(rows, g, A, dropout, target, rank_first=True)
    return dA, dB


@contextlib.contextmanager
def _contiguous(out: Tensor) -> Iterator[Tensor]:
    """`out` itself, or a contiguous copy that is written back: the kernel knows no strides of what it adds to."""
    rows = out.contiguous()
    yield rows
    if rows is not out:
        out.copy_(rows)
