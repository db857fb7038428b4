"""lora_linear_group in plain PyTorch: several linear layers over one input, each with factors that may train in part.

    y_i = x W_i^T + bias_i + s_i (D_i o x) A_i^T B_i^T        dx = sum_i (D_i o (g_i A_i) + dy_i W_i)

A_i and B_i are put together from a trainable and a frozen part (effective_A, effective_B); gradients come in the shape
of the trainable part. LoRA-SP: arXiv 2403.08822 (its abstract fixes that half is frozen, not the granularity).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasp.reference import lora_linear


def effective_A(lora_A: Tensor, frozen_A: Tensor | None, columns: Tensor | None, entries: Tensor | None) -> Tensor:
    """A (R, K) in lora_A's dtype: frozen_A, columns or flat entries replaced by lora_A; without frozen_A, lora_A."""
    if frozen_A is None:
        return lora_A
    base = frozen_A.to(lora_A.dtype)
    if entries is not None:
        return base.flatten().index_copy(0, entries, lora_A).view(base.shape)
    return base.index_copy(1, columns, lora_A)


def effective_B(
    lora_B: Tensor, frozen_B: Tensor | None, rows: Tensor | None, entries: Tensor | None, shape: tuple[int, int]
) -> Tensor:
    """B (N, R): frozen_B, or zeros, with its rows, or its flat entries, replaced by lora_B; a dense lora_B itself."""
    if lora_B.shape == shape:
        return lora_B
    base = lora_B.new_zeros(shape) if frozen_B is None else frozen_B.to(lora_B.dtype)
    if entries is not None:
        return base.flatten().index_copy(0, entries, lora_B).view(shape)
    return base.index_copy(0, rows, lora_B)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    frozen_As: Sequence[Tensor | None],
    frozen_Bs: Sequence[Tensor | None],
    columns: Tensor | None,
    rows: Sequence[Tensor | None],
    entries_A: Sequence[Tensor | None],
    entries_B: Sequence[Tensor | None],
    seed: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    members: Sequence[int],
    keep_columns: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """([y_i (M, N_i)], [xa_i (M, R_i)], x[:, columns]) of x (M, K); the last is (0,) unless keep_columns."""
    ys, xas = [], []
    for i, weight in enumerate(weights):
        lora_A = effective_A(lora_As[i], frozen_As[i], columns, entries_A[i])
        shape = (weight.shape[0], lora_A.shape[0])
        lora_B = effective_B(lora_Bs[i], frozen_Bs[i], rows[i], entries_B[i], shape)
        y, xa = lora_linear.forward(x, weight, biases[i], lora_A, lora_B, seed, scales[i], dropout_p, members[i])
        ys.append(y)
        xas.append(xa)
    return ys, xas, x.index_select(1, columns) if keep_columns else x.new_empty(0)


def backward(
    dys: Sequence[Tensor],
    x: Tensor | None,
    x_columns: Tensor | None,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    frozen_As: Sequence[Tensor | None],
    frozen_Bs: Sequence[Tensor | None],
    columns: Tensor | None,
    rows: Sequence[Tensor | None],
    entries_A: Sequence[Tensor | None],
    entries_B: Sequence[Tensor | None],
    xas: Sequence[Tensor | None],
    seed: Tensor | None,
    mask_As: Sequence[Tensor | None],
    mask_Bs: Sequence[Tensor | None],
    scales: Sequence[float],
    dropout_p: float,
    members: Sequence[int],
    in_features: int,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx (M, K), [dlora_A_i], [dlora_B_i]), gradients in the shapes of lora_As and lora_Bs; (0,) where not needed.

    x_columns (M, |columns|) stands for x where `columns` is given.
    """
    dx, dlora_As, dlora_Bs = dys[0].new_empty(0), [], []
    if columns is not None and any(need_dA):
        # Zeros in the other columns: their gradients are not looked at.
        x = x_columns.new_zeros((x_columns.shape[0], in_features)).index_copy(1, columns, x_columns)
    for i, dy in enumerate(dys):
        lora_A = effective_A(lora_As[i], frozen_As[i], columns, entries_A[i])
        lora_B = effective_B(lora_Bs[i], frozen_Bs[i], rows[i], entries_B[i], (dy.shape[1], lora_A.shape[0]))
        dx_i, dlora_A, dlora_B = lora_linear.backward(
            dy, x, weights[i], lora_A, lora_B, xas[i], seed, mask_As[i], mask_Bs[i], scales[i], dropout_p, members[i],
            need_dx, need_dA[i], need_dB[i],
        )  # fmt: skip
        if need_dx:
            dx = dx_i if i == 0 else dx + dx_i
        if need_dA[i] and entries_A[i] is not None:
            dlora_A = dlora_A.flatten().index_select(0, entries_A[i])
        elif need_dA[i] and frozen_As[i] is not None:
            dlora_A = dlora_A.index_select(1, columns)
        if need_dB[i] and entries_B[i] is not None:
            dlora_B = dlora_B.flatten().index_select(0, entries_B[i])
        elif need_dB[i] and rows[i] is not None:
            trained = dlora_B.index_select(0, rows[i])
            packed = lora_Bs[i].shape[0] != dy.shape[1]
            dlora_B = trained if packed else torch.zeros_like(dlora_B).index_copy(0, rows[i], trained)
        dlora_As.append(dlora_A)
        dlora_Bs.append(dlora_B)
    return dx, dlora_As, dlora_Bs
