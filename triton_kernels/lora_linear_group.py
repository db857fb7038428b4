"""lora_linear_group on Triton: launchers with the semantics of the operator's raw ops.

    xa_i = s_i·(D_i∘x) A_iᵀ      y_i = x W_iᵀ + bias_i + xa_i B_iᵀ
    g_i  = s_i·dy_i B_i          dx  = Σ_i D_i∘(g_i A_i) + dy_i W_i        dB_i = dy_iᵀ xa_i        dA_i = g_iᵀ (D_i∘x)

One pass over x forms every xa_i and x[:, J]; y_i runs lora_linear's plans on its xa_i (onepass forms its own). dx lies
in one buffer: fused walks every member's dy_i W_i in one accumulator, which starts as the low-rank sum (with dropout a
kernel of its own writes that sum first); addmm lets cuBLAS add member to member, then adds the low-rank sum. Factors
that train in part are put together at rank-R size by torch. g_i and dB_i come from one pass over dy_i, which is read
whole: its frozen single features share their sectors with trained ones. Gradients of single entries are gathered from
the dense rank-R gradient. No index is ever read on the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .launch import check_operand, device_of, target_of, with_unit_stride
from .lora_linear import gemm, onepass
from .lora_linear_group_products import (
    MOST_MEMBERS,
    add_low_rank,
    columns_outer,
    group_gemm,
    group_project,
)
from .lora_linear_products import (
    NO_DROPOUT,
    Dropout,
    accumulate,
    from_dy,
    outer,
)

_OPERATOR = "lora_linear_group"


def forward(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor], frozen_As: Sequence[Tensor | None], frozen_Bs: Sequence[Tensor | None],
    columns: Tensor | None, rows: Sequence[Tensor | None], entries_A: Sequence[Tensor | None],
    entries_B: Sequence[Tensor | None], seed: Tensor | None, scales: Sequence[float], dropout_p: float,
    members: Sequence[int], keep_columns: bool, plan: str,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """([y_i (M, N_i)], [xa_i (M, R_i)], x[:, columns] (M, |J|), or (0,) unless keep_columns), contiguous, in x's dtype.

    x (M, K) and weights [(N_i, K)] of any strides; factors whole or in part, in x's dtype or fp32. Raises ValueError
    for a dtype, a device or a plan that these kernels do not take.
    """
    check_operand(_OPERATOR, "x", x)
    M, K = x.shape
    target = target_of(x)
    dropouts = _dropouts(seed, dropout_p, members)
    sizes = [(weight.shape[0], _rank(a, frozen)) for weight, a, frozen in zip(weights, lora_As, frozen_As, strict=True)]
    plans = [
        tuning.select_plan(plan, "forward", M, N, K, R, x.dtype, dropouts[0].active, target, _OPERATOR)
        for N, R in sizes
    ]
    for chosen, (_, R) in zip(plans, sizes, strict=True):
        if chosen.name == "onepass" and R > tuning.ONEPASS_MAX_RANK:
            raise ValueError(f"{_OPERATOR}: plan onepass takes R <= {tuning.ONEPASS_MAX_RANK}, got {R}")
    if M == 0:
        x_columns = x.new_empty((0, columns.shape[0])) if keep_columns else x.new_empty(0)
        return [x.new_empty((0, N)) for N, _ in sizes], [x.new_empty((0, R)) for _, R in sizes], x_columns

    x = with_unit_stride(x)
    As = [_effective(a, f, 1, columns, e, (R, K), x.dtype)
          for a, f, e, (_, R) in zip(lora_As, frozen_As, entries_A, sizes, strict=True)]  # fmt: skip
    Bs = [_effective(b, f, 0, i, e, size, x.dtype)
          for b, f, i, e, size in zip(lora_Bs, frozen_Bs, rows, entries_B, sizes, strict=True)]  # fmt: skip
    ys, xas = [None] * len(sizes), [None] * len(sizes)
    with device_of(x):
        x_columns = x.new_empty((M, columns.shape[0])) if keep_columns else x.new_empty(0)
        shared = [i for i, chosen in enumerate(plans) if chosen.name != "onepass"]
        if keep_columns and not shared:
            torch.index_select(x, 1, columns, out=x_columns)
        for first in range(0, len(shared), MOST_MEMBERS):
            some = shared[first : first + MOST_MEMBERS]
            selection = (columns, x_columns) if keep_columns and first == 0 else None
            together = group_project(
                x, [As[i] for i in some], [scales[i] for i in some], [dropouts[i] for i in some], selection, target
            )
            for i, xa in zip(some, together, strict=True):
                xas[i] = xa
        for i, chosen in enumerate(plans):
            weight, bias, B = weights[i], biases[i], Bs[i]
            if chosen.name == "onepass":
                scale = scales[i] * dropouts[i].rescale
                ys[i], xas[i] = onepass(x, weight, bias, As[i], B, scale, dropouts[i], chosen.gemm, target)
            elif chosen.name == "fused":
                ys[i] = gemm(x, weight.t(), bias, xas[i], B, NO_DROPOUT, chosen.gemm, target, rank_first=False)
            else:
                ys[i] = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
                accumulate(ys[i], xas[i], B, NO_DROPOUT, target, rank_first=False)
    return ys, xas, x_columns


def backward(
    dys: Sequence[Tensor], x: Tensor | None, x_columns: Tensor | None, weights: Sequence[Tensor],
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], frozen_As: Sequence[Tensor | None],
    frozen_Bs: Sequence[Tensor | None], columns: Tensor | None, rows: Sequence[Tensor | None],
    entries_A: Sequence[Tensor | None], entries_B: Sequence[Tensor | None], xas: Sequence[Tensor | None],
    seed: Tensor | None, mask_As: Sequence[Tensor | None], mask_Bs: Sequence[Tensor | None], scales: Sequence[float],
    dropout_p: float, members: Sequence[int], in_features: int, need_dx: bool, need_dA: Sequence[bool],
    need_dB: Sequence[bool], plan: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """(dx (M, K), [dlora_A_i], [dlora_B_i]) in the shapes and dtypes of the factors; (0,) where not needed.

    dys [(M, N_i)]; x (M, K), or x_columns (M, |J|) where `columns` is given, for dA; weights [(N_i, K)] for dx; xas of
    the forward for dB. Raises ValueError as forward does.
    """
    check_operand(_OPERATOR, "dys", dys[0])
    M, K, dtype = dys[0].shape[0], in_features, dys[0].dtype
    target = target_of(dys[0])
    dropouts = _dropouts(seed, dropout_p, members)
    sizes = [(dy.shape[1], _rank(a, frozen)) for dy, a, frozen in zip(dys, lora_As, frozen_As, strict=True)]
    # Tables speak of single layers: the widest member stands for the group.
    N, R = (max(numbers) for numbers in zip(*sizes, strict=True))
    chosen = tuning.select_plan(plan, "backward", M, N, K, R, dtype, dropouts[0].active, target, _OPERATOR)
    nothing = dys[0].new_empty(0)
    if M == 0:
        return (
            dys[0].new_empty((0, K)) if need_dx else nothing,
            [torch.zeros_like(a, memory_format=torch.contiguous_format) if need else dys[0].new_empty(0)
             for a, need in zip(lora_As, need_dA, strict=True)],
            [torch.zeros_like(b, memory_format=torch.contiguous_format) if need else dys[0].new_empty(0)
             for b, need in zip(lora_Bs, need_dB, strict=True)],
        )  # fmt: skip

    dys = [with_unit_stride(dy) for dy in dys]
    dBs, gs = [], []
    with device_of(dys[0]):
        for i, (dy, size) in enumerate(zip(dys, sizes, strict=True)):
            B = _effective(lora_Bs[i], frozen_Bs[i], 0, rows[i], entries_B[i], size, dtype)
            g, dB = _down(
                dy, B, lora_Bs[i], rows[i], entries_B[i], xas[i], mask_Bs[i], scales[i] * dropouts[i].rescale,
                need_dx or need_dA[i], need_dB[i], target,
            )  # fmt: skip
            gs.append(g)
            dBs.append(dB)
        source = x if columns is None else x_columns
        dAs = _dA(source, gs, lora_As, columns, entries_A, mask_As, dropouts, need_dA, sizes, K, target)
        dx = nothing
        if need_dx:
            As = [_effective(a, f, 1, columns, e, (R, K), dtype)
                  for a, f, e, (_, R) in zip(lora_As, frozen_As, entries_A, sizes, strict=True)]  # fmt: skip
            dx = _dx(dys, weights, gs, As, dropouts, chosen, target)
    return dx, [dys[0].new_empty(0) if dA is None else dA for dA in dAs], dBs


def _dropouts(seed, dropout_p, members) -> list[Dropout]:
    return [Dropout(seed, round(dropout_p * 65536), member) for member in members]


def _rank(lora_A: Tensor, frozen_A: Tensor | None) -> int:
    return (lora_A if frozen_A is None else frozen_A).shape[0]


def _effective(lora, frozen, dim, index, entries, shape, dtype) -> Tensor:
    """The factor of `shape`, contiguous, in `dtype`: `frozen`, or zeros, with entries, or `index` along dim, from lora.

    A whole lora is the factor itself.
    """
    lora = lora.to(dtype)
    if entries is None and lora.shape == shape and (index is None or frozen is None):
        return lora.contiguous()
    if frozen is None:
        whole = lora.new_zeros(shape)
    else:
        whole = torch.empty(shape, dtype=dtype, device=lora.device).copy_(frozen)
    if entries is not None:
        whole.view(-1).index_copy_(0, entries, lora)
    else:
        whole.index_copy_(dim, index, lora)
    return whole


def _down(dy, B, lora_B, rows, entries, xa, mask, scale, need_g, need_dB, target) -> tuple[Tensor | None, Tensor]:
    """(g (M, R) or None, dB in lora_B's shape and dtype or (0,)) of one member."""
    g, dB = from_dy(dy, B, xa, scale, mask, lora_B.dtype, need_g, need_dB, target, rows)
    if need_dB and entries is not None:
        dB = dB.view(-1).index_select(0, entries)
    elif need_dB and rows is not None and lora_B.shape == B.shape:
        dB = torch.zeros_like(lora_B, memory_format=torch.contiguous_format).index_copy_(0, rows, dB)
    return g, dB


def _dA(source, gs, lora_As, columns, entries_A, masks, dropouts, needed, sizes, K, target) -> list[Tensor | None]:
    """[dA_i in lora_A_i's shape and dtype, or None]; source: x, or x[:, J] where `columns` is J."""
    dAs = [None] * len(gs)
    wanted = [i for i, need in enumerate(needed) if need]
    if not wanted:
        return dAs
    source = with_unit_stride(source)
    ranks = [sizes[i][1] for i in wanted]
    if len(wanted) > 1 and not dropouts[0].active:
        # Without masks the members are one product, which reads x once.
        together = outer(
            source, torch.cat([gs[i] for i in wanted], 1), torch.float32, None, NO_DROPOUT, target, rank_first=True
        )
        for i, dA in zip(wanted, together.split(ranks), strict=True):
            dA = dA.to(lora_As[i].dtype, copy=True)
            dAs[i] = dA if masks[i] is None else dA.masked_fill_(~masks[i], 0)
    else:
        for i in wanted:
            dtype, dropout = lora_As[i].dtype, dropouts[i]
            if columns is not None and dropout.active:
                dAs[i] = columns_outer(source.contiguous(), gs[i], columns, K, dtype, dropout, target)
            else:
                dAs[i] = outer(source, gs[i], dtype, masks[i], dropout, target, rank_first=True)
    for i, R in zip(wanted, ranks, strict=True):
        if entries_A[i] is not None:
            dAs[i] = dAs[i].view(-1).index_select(0, entries_A[i])
        elif columns is not None and lora_As[i].shape != dAs[i].shape:
            dAs[i] = lora_As[i].new_zeros((R, K)).index_copy_(1, columns, dAs[i])
    return dAs


def _dx(dys, weights, gs, As, dropouts, chosen, target) -> Tensor:
    """Σ_i keep_i∘(g_i A_i) + dy_i W_i (M, K)."""
    if chosen.name == "addmm":
        dx = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        add_low_rank(dx, gs, As, dropouts, True, target)
        return dx
    if len(dys) == 1:
        return gemm(dys[0], weights[0], None, gs[0], As[0], dropouts[0], chosen.gemm, target, rank_first=True)
    dx = dys[0].new_empty((dys[0].shape[0], As[0].shape[1]))
    masked = dropouts[0].active
    if masked:
        add_low_rank(dx, gs, As, dropouts, False, target)
        gs, As = [None] * len(gs), [None] * len(As)
    first = 0
    while first < len(dys):
        stop = first + MOST_MEMBERS
        while any(weight.stride() != weights[first].stride() for weight in weights[first:stop]):
            stop -= 1
        some = slice(first, stop)
        group_gemm(dx, dys[some], weights[some], gs[some], As[some], masked or first > 0, target)
        first = stop
    return dx
