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
import triton
from torch import Tensor

from . import tuning
from .launch import check_operand, device_of, launch, precision_of, target_of
from .lora_linear import (
    _NO_DROPOUT,
    _accumulate,
    _as_stored,
    _descriptor,
    _Dropout,
    _gemm,
    _onepass,
    _outer,
    _project,
    _project_outer,
    _reduce,
    _split_sum,
    _suits_tma,
    _vectorizes,
    _with_unit_stride,
)
from .lora_linear_group_gemm import _lora_linear_group_gemm_kernel, _lora_linear_group_gemm_tma_kernel
from .lora_linear_group_skinny import (
    _lora_linear_columns_outer_kernel,
    _lora_linear_group_accumulate_kernel,
    _lora_linear_group_project_kernel,
)

_OPERATOR = "lora_linear_group"
_MOST_MEMBERS = 3  # of one launch


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

    x = _with_unit_stride(x)
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
        for first in range(0, len(shared), _MOST_MEMBERS):
            some = shared[first : first + _MOST_MEMBERS]
            selection = (columns, x_columns) if keep_columns and first == 0 else None
            together = _group_project(
                x, [As[i] for i in some], [scales[i] for i in some], [dropouts[i] for i in some], selection, target
            )
            for i, xa in zip(some, together, strict=True):
                xas[i] = xa
        for i, chosen in enumerate(plans):
            weight, bias, B = weights[i], biases[i], Bs[i]
            if chosen.name == "onepass":
                scale = scales[i] * dropouts[i].rescale
                ys[i], xas[i] = _onepass(x, weight, bias, As[i], B, scale, dropouts[i], chosen.gemm, target)
            elif chosen.name == "fused":
                ys[i] = _gemm(x, weight.t(), bias, xas[i], B, _NO_DROPOUT, chosen.gemm, target, rank_first=False)
            else:
                ys[i] = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
                _accumulate(ys[i], xas[i], B, _NO_DROPOUT, target, rank_first=False)
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

    dys = [_with_unit_stride(dy) for dy in dys]
    dBs, gs = [], []
    with device_of(dys[0]):
        for i, (dy, size) in enumerate(zip(dys, sizes, strict=True)):
            B = _effective(lora_Bs[i], frozen_Bs[i], 0, rows[i], entries_B[i], size, dtype)
            g, dB = _down(
                dy, B, lora_Bs[i], rows[i], entries_B[i], xas[i], mask_Bs[i], scales[i] * dropouts[i].rescale,
                need_dx or need_dA[i], need_dB[i], target,
            )  # fmt: skip
            gs.append(g)
            dBs.append(dys[0].new_empty(0) if dB is None else dB)
        source = x if columns is None else x_columns
        dAs = _dA(source, gs, lora_As, columns, entries_A, mask_As, dropouts, need_dA, sizes, K, target)
        dx = nothing
        if need_dx:
            As = [_effective(a, f, 1, columns, e, (R, K), dtype)
                  for a, f, e, (_, R) in zip(lora_As, frozen_As, entries_A, sizes, strict=True)]  # fmt: skip
            dx = _dx(dys, weights, gs, As, dropouts, chosen, target)
    return dx, [dys[0].new_empty(0) if dA is None else dA for dA in dAs], dBs


def _dropouts(seed, dropout_p, members) -> list[_Dropout]:
    return [_Dropout(seed, round(dropout_p * 65536), member) for member in members]


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


def _positions(index: Tensor, size: int) -> Tensor:
    """int32 (size,): where each of 0 … size − 1 stands in `index`, −1 where it does not."""
    positions = torch.full((size,), -1, dtype=torch.int32, device=index.device)
    return positions.index_copy_(0, index, torch.arange(index.shape[0], dtype=torch.int32, device=index.device))


def _by_member(**fields) -> dict:
    """Kernel arguments of members 0 … 2 from (values, what stands for an absent one) under member 0's argument name."""
    return {
        name.replace("0", str(i)): values[i] if i < len(values) else absent
        for name, (values, absent) in fields.items()
        for i in range(_MOST_MEMBERS)
    }


def _masking(dropouts: list[_Dropout], columns: int) -> dict:
    arguments = dropouts[0].arguments(columns)
    del arguments["member"]
    return arguments | _by_member(member0=([dropout.word for dropout in dropouts], 0))


def _group_project(x, As, scales, dropouts, selection, target) -> list[Tensor]:
    """[xa_i (M, R_i)] of up to three members; selection: None or (J, x_columns), where x_columns receives x[:, J]."""
    scales = [scale * dropouts[0].rescale for scale in scales]
    if len(As) == 1 and selection is None:
        return [_project(x, As[0], scales[0], dropouts[0], target, rank_first=True)]
    (M, K), ranks = x.shape, [A.shape[0] for A in As]
    config = tuning.group_config(
        target, x.dtype, M, ranks, aligned=_vectorizes(x), gather=selection is not None, dropout=dropouts[0].active
    )
    tiles = triton.cdiv(M, config.block_m), triton.cdiv(max(ranks), config.block_r)
    size = sum(ranks)
    parts, split_k = _split_sum(target, tiles[0] * tiles[1], K, config.block_c, M * K * x.element_size(), M * size)
    xas = [x.new_empty((M, R)) for R in ranks]
    partials = xas if parts == 1 else [x.new_empty((parts, M, R), dtype=torch.float32) for R in ranks]
    columns, x_columns = selection or (None, None)
    arguments = {
        "x_ptr": x, "columns_ptr": x_columns, "position_ptr": None if columns is None else _positions(columns, K),
        "M": M, "K": K, "features": 0 if columns is None else columns.shape[0], "split_k": split_k,
        "stride_xm": x.stride(0), "GATHER": columns is not None, "PRECISION": precision_of(x),
        "BLOCK_M": config.block_m, "BLOCK_K": config.block_c, "BLOCK_R": config.block_r,
    } | _by_member(
        a0_ptr=(As, None), xa0_ptr=(partials, None), scale0=(scales, 0.0), R0=(ranks, 0)
    ) | _masking(dropouts, K)  # fmt: skip
    grid = (tiles[0], parts, tiles[1])
    launch(_lora_linear_group_project_kernel, grid, arguments, config.num_warps, config.num_stages)
    if parts > 1:
        for partial, xa in zip(partials, xas, strict=True):
            _reduce(partial, xa, None)
    return xas


def _down(dy, B, lora_B, rows, entries, xa, mask, scale, need_g, need_dB, target) -> tuple[Tensor | None, ...]:
    """(g (M, R) or None, dB in lora_B's shape and dtype or None) of one member."""
    (M, N), R = dy.shape, B.shape[1]
    g = dB = None
    block_m = tuning.rank_config("project_outer", target, dy.dtype, M, N, R, aligned=_vectorizes(dy)).block_m
    if need_g and need_dB and tuning.one_pass_over_dy(M, N, R, dy.element_size(), block_m):
        positions, features = (None, N) if rows is None else (_positions(rows, N), rows.shape[0])
        g, dB = _project_outer(dy, B, xa, scale, mask, lora_B.dtype, target, positions, features)
    else:
        if need_g:
            g = _project(dy, B, scale, _NO_DROPOUT, target, rank_first=False)
        if need_dB:
            dB = _outer(dy, xa.contiguous(), lora_B.dtype, mask, _NO_DROPOUT, target, rank_first=False)
            dB = dB if rows is None else dB.index_select(0, rows)
    if need_dB and entries is not None:
        dB = dB.view(-1).index_select(0, entries)
    elif need_dB and rows is not None and lora_B.shape[0] == N:
        dB = lora_B.new_zeros((N, R)).index_copy_(0, rows, dB)
    return g, dB


def _dA(source, gs, lora_As, columns, entries_A, masks, dropouts, needed, sizes, K, target) -> list[Tensor | None]:
    """[dA_i in lora_A_i's shape and dtype, or None]; source: x, or x[:, J] where `columns` is J."""
    dAs = [None] * len(gs)
    wanted = [i for i, need in enumerate(needed) if need]
    if not wanted:
        return dAs
    source = _with_unit_stride(source)
    ranks = [sizes[i][1] for i in wanted]
    if len(wanted) > 1 and not dropouts[0].active:
        # Without masks the members are one product, which reads x once.
        together = _outer(
            source, torch.cat([gs[i] for i in wanted], 1), torch.float32, None, _NO_DROPOUT, target, rank_first=True
        )
        for i, dA in zip(wanted, together.split(ranks), strict=True):
            dA = dA.to(lora_As[i].dtype, copy=True)
            dAs[i] = dA if masks[i] is None else dA.masked_fill_(~masks[i], 0)
    else:
        for i in wanted:
            dtype, dropout = lora_As[i].dtype, dropouts[i]
            if columns is not None and dropout.active:
                dAs[i] = _columns_outer(source.contiguous(), gs[i], columns, K, dtype, dropout, target)
            else:
                dAs[i] = _outer(source, gs[i], dtype, masks[i], dropout, target, rank_first=True)
    for i, R in zip(wanted, ranks, strict=True):
        if entries_A[i] is not None:
            dAs[i] = dAs[i].view(-1).index_select(0, entries_A[i])
        elif columns is not None and lora_As[i].shape != dAs[i].shape:
            dAs[i] = lora_As[i].new_zeros((R, K)).index_copy_(1, columns, dAs[i])
    return dAs


def _columns_outer(p, g, columns, K, dtype, dropout, target) -> Tensor:
    """gᵀ (keep[:, J]∘p) (R, |J|) in `dtype` for p (M, |J|) = x[:, J], both contiguous; keep is (M, K)."""
    (M, C), R = p.shape, g.shape[1]
    config = tuning.columns_config(target, p.dtype, M, R, aligned=_vectorizes(p))
    tiles = triton.cdiv(C, config.block_c), triton.cdiv(R, config.block_r)
    parts, split_m = _split_sum(target, tiles[0] * tiles[1], M, config.block_m, M * C * p.element_size(), C * R)
    out = p.new_empty((R, C), dtype=dtype)
    partials = out if parts == 1 else p.new_empty((parts, R, C), dtype=torch.float32)
    arguments = {
        "p_ptr": p, "h_ptr": g, "out_ptr": partials, "index_ptr": columns, "seed_ptr": dropout.seed, "M": M, "C": C,
        "K": K, "split_m": split_m, "threshold": dropout.threshold, "member": dropout.word, "R": R,
        "PRECISION": precision_of(p), "BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    }  # fmt: skip
    grid = (tiles[0], parts, tiles[1])
    launch(_lora_linear_columns_outer_kernel, grid, arguments, config.num_warps, config.num_stages)
    return out if parts == 1 else _reduce(partials, out, None)


def _dx(dys, weights, gs, As, dropouts, chosen, target) -> Tensor:
    """Σ_i keep_i∘(g_i A_i) + dy_i W_i (M, K)."""
    if chosen.name == "addmm":
        dx = torch.mm(dys[0], weights[0])
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        _add_low_rank(dx, gs, As, dropouts, True, target)
        return dx
    if len(dys) == 1:
        return _gemm(dys[0], weights[0], None, gs[0], As[0], dropouts[0], chosen.gemm, target, rank_first=True)
    dx = dys[0].new_empty((dys[0].shape[0], As[0].shape[1]))
    masked = dropouts[0].active
    if masked:
        _add_low_rank(dx, gs, As, dropouts, False, target)
        gs, As = [None] * len(gs), [None] * len(As)
    first = 0
    while first < len(dys):
        stop = first + _MOST_MEMBERS
        while any(weight.stride() != weights[first].stride() for weight in weights[first:stop]):
            stop -= 1
        some = slice(first, stop)
        _group_gemm(dx, dys[some], weights[some], gs[some], As[some], masked or first > 0, target)
        first = stop
    return dx


def _add_low_rank(out, gs, As, dropouts, has_old, target) -> None:
    """out (M, K) = Σ_i keep_i∘(g_i A_i), added to what `out` holds if has_old."""
    if len(gs) == 1 and has_old:
        _accumulate(out, gs[0], As[0], dropouts[0], target, rank_first=True)
        return
    (M, C) = out.shape
    for first in range(0, len(gs), _MOST_MEMBERS):
        some = slice(first, first + _MOST_MEMBERS)
        ranks = [A.shape[0] for A in As[some]]
        config = tuning.accumulate_config(target, out.dtype, M, max(ranks), aligned=_vectorizes(out), members=len(gs))
        arguments = {
            "out_ptr": out, "M": M, "C": C, "HAS_OLD": has_old or first > 0, "PRECISION": precision_of(out),
            "BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
        } | _by_member(
            h0_ptr=(gs[some], None), q0_ptr=(As[some], None), R0=(ranks, 0)
        ) | _masking(dropouts[some], C)  # fmt: skip
        grid = (triton.cdiv(M, config.block_m) * triton.cdiv(C, config.block_c),)
        launch(_lora_linear_group_accumulate_kernel, grid, arguments, config.num_warps, config.num_stages)


def _group_gemm(out, dys, weights, gs, As, has_old, target) -> None:
    """out (M, K) = Σ_i g_i A_i + dy_i W_i, added to what `out` holds if has_old; None in gs stands for zero.

    Up to three members, whose weights share their strides.
    """
    (M, C), ranks = out.shape, [0 if A is None else A.shape[0] for A in As]
    depths, strides = zip(*((dy.shape[1], dy.stride(0)) for dy in dys), strict=True)
    tma = all(map(_suits_tma, (*dys, *weights, out)))
    aligned = _vectorizes(*dys, *(_as_stored(weight)[0] for weight in weights))
    # What the accumulator starts with takes registers as a mask does.
    config = tuning.gemm_config(target, out.dtype, M, tma=tma, aligned=aligned, dropout=has_old)
    arguments = {
        "out_ptr": out, "M": M, "C": C, "HAS_OLD": has_old, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c,
        "BLOCK_D": config.block_d, "BLOCK_R": tuning.pad_rank(max(*ranks, 1), 16 if out.dtype.itemsize == 4 else 32),
        "GROUP_M": config.group_m,
    } | _by_member(h0_ptr=(gs, None), q0_ptr=(As, None), D0=(depths, 0), R0=(ranks, 0))  # fmt: skip
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(C, config.block_c)
    if config.tma:
        arguments |= _by_member(
            p0_desc=([_descriptor(dy, config.block_m, config.block_d) for dy in dys], None),
            v0_desc=([_descriptor(weight, config.block_d, config.block_c) for weight in weights], None),
        ) | {
            "out_desc": _descriptor(out, config.block_m, config.block_c // config.subtiles),
            "SUBTILES": config.subtiles,
        }  # fmt: skip
        kernel, grid = _lora_linear_group_gemm_tma_kernel, (min(tiles, target.sm_count),)
    else:
        arguments |= _by_member(p0_ptr=(dys, None), v0_ptr=(weights, None), stride_pm0=(strides, 0)) | {
            "stride_vd": weights[0].stride(0), "stride_vc": weights[0].stride(1),
            "EVEN_D": all(depth % config.block_d == 0 for depth in depths), "PRECISION": precision_of(out),
        }  # fmt: skip
        kernel, grid = _lora_linear_group_gemm_kernel, (tiles,)
    launch(kernel, grid, arguments, config.num_warps, config.num_stages)
