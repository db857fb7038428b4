"""Launchers of the kernels that serve up to three members of lora_linear_group at once.

    group_project     xa_i = s_i·(D_i∘x) A_iᵀ, and x[:, J]
    columns_outer     dA from x[:, J] under dropout
    add_low_rank      Σ_i D_i∘(g_i A_i) into dx
    group_gemm        Σ_i g_i A_i + dy_i W_i

Kernels: lora_linear_group_skinny.py, lora_linear_group_gemm.py. What a shape determines is computed once
(launch.per_shape).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .launch import Launch, per_shape, precision_of
from .lora_linear import as_stored, descriptor, suits_tma
from .lora_linear_group_gemm import _lora_linear_group_gemm_kernel, _lora_linear_group_gemm_tma_kernel
from .lora_linear_group_skinny import (
    _lora_linear_columns_outer_kernel,
    _lora_linear_group_accumulate_kernel,
    _lora_linear_group_project_kernel,
)
from .lora_linear_products import accumulate, mask_constants, positions, project, reduce, split_sum, wide_rows
from .tuning import ceil_div

MOST_MEMBERS = 3  # of one launch


def _numbered(*names: str) -> tuple[str, ...]:
    """The argument names of members 0 … 2, from member 0's."""
    return tuple(name.replace("0", str(i)) for name in names for i in range(MOST_MEMBERS))


def _filled(values: Sequence[object], absent: object = None) -> list[object]:
    """One value for each of three members."""
    return [*values, *[absent] * (MOST_MEMBERS - len(values))]


def _sizes(**sizes: Sequence[int]) -> dict:
    """Kernel arguments of members 0 … 2 under member 0's argument name, 0 for an absent one."""
    return {
        name.replace("0", str(i)): value for name, values in sizes.items() for i, value in enumerate(_filled(values, 0))
    }


_MASKS_FREE = ("seed_ptr", "threshold", *_numbered("member0"))


def _masks(dropouts) -> tuple:
    """The arguments named _MASKS_FREE."""
    seed, threshold, _ = dropouts[0].free
    return seed, threshold, *_filled([dropout.word for dropout in dropouts], 0)


def group_project(x, As, scales, dropouts, selection, target) -> list[Tensor]:
    """[xa_i (M, R_i)] of up to three members; selection: None or (J, x_columns), where x_columns receives x[:, J]."""
    scales = [scale * dropouts[0].rescale for scale in scales]
    if len(As) == 1 and selection is None:
        return [project(x, As[0], scales[0], dropouts[0], target, rank_first=True)]
    (M, K), ranks = x.shape, tuple(A.shape[0] for A in As)
    columns, x_columns = selection or (None, None)
    run, parts = _group_project_launch(
        target, x.dtype, M, K, ranks, x.stride(), None if columns is None else columns.shape[0],
        dropouts[0].threshold > 0, precision_of(x),
    )  # fmt: skip
    xas = [x.new_empty((M, R)) for R in ranks]
    partials = xas if parts == 1 else [x.new_empty((parts, M, R), dtype=torch.float32) for R in ranks]
    places = None if columns is None else positions(columns, K)
    run(x, *_filled(As), *_filled(partials), x_columns, places, *_filled(scales, 0.0), *_masks(dropouts))
    if parts > 1:
        for partial, xa in zip(partials, xas, strict=True):
            reduce(partial, xa, None)
    return xas


@per_shape
def _group_project_launch(
    target, dtype, M, K, ranks, strides, features, dropout, precision
) -> tuple[Launch, int]:  # fmt: skip
    gather = features is not None
    config = tuning.group_config(
        target, dtype, M, list(ranks), aligned=wide_rows(strides), gather=gather, dropout=dropout
    )
    tiles = ceil_div(M, config.block_m), ceil_div(max(ranks), config.block_r)
    parts, split_k = split_sum(
        target, tiles[0] * tiles[1], K, config.block_c, M * K * dtype.itemsize, M * sum(ranks)
    )  # fmt: skip
    arguments = {
        "M": M, "K": K, "features": features or 0, "split_k": split_k, "stride_xm": strides[0], "GATHER": gather,
        "PRECISION": precision, "BLOCK_M": config.block_m, "BLOCK_K": config.block_c, "BLOCK_R": config.block_r,
    } | _sizes(R0=ranks) | mask_constants(dropout, K)  # fmt: skip
    free = ("x_ptr", *_numbered("a0_ptr", "xa0_ptr"), "columns_ptr", "position_ptr", *_numbered("scale0"), *_MASKS_FREE)
    grid = (tiles[0], parts, tiles[1])
    return Launch(_lora_linear_group_project_kernel, grid, arguments, free, config.num_warps, config.num_stages), parts


def columns_outer(p, g, columns, K, dtype, dropout, target) -> Tensor:
    """gᵀ (keep[:, J]∘p) (R, |J|) in `dtype` for p (M, |J|) = x[:, J], both contiguous; keep is (M, K)."""
    (M, C), R = p.shape, g.shape[1]
    run, parts = _columns_outer_launch(target, p.dtype, M, C, R, K, precision_of(p))
    out = p.new_empty((R, C), dtype=dtype)
    partials = out if parts == 1 else p.new_empty((parts, R, C), dtype=torch.float32)
    run(p, g, partials, columns, dropout.seed, dropout.threshold, dropout.word)
    return out if parts == 1 else reduce(partials, out, None)


@per_shape
def _columns_outer_launch(target, dtype, M, C, R, K, precision) -> tuple[Launch, int]:
    config = tuning.columns_config(target, dtype, M, R, aligned=C % 16 == 0)
    tiles = ceil_div(C, config.block_c), ceil_div(R, config.block_r)
    parts, split_m = split_sum(target, tiles[0] * tiles[1], M, config.block_m, M * C * dtype.itemsize, C * R)
    arguments = {
        "M": M, "C": C, "K": K, "split_m": split_m, "R": R, "PRECISION": precision, "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    }  # fmt: skip
    free = ("p_ptr", "h_ptr", "out_ptr", "index_ptr", "seed_ptr", "threshold", "member")
    grid = (tiles[0], parts, tiles[1])
    return Launch(_lora_linear_columns_outer_kernel, grid, arguments, free, config.num_warps, config.num_stages), parts


def add_low_rank(out, gs, As, dropouts, has_old, target) -> None:
    """out (M, K) = Σ_i keep_i∘(g_i A_i), added to what `out` holds if has_old; out is contiguous."""
    if len(gs) == 1 and has_old:
        accumulate(out, gs[0], As[0], dropouts[0], target, rank_first=True)
        return
    for first in range(0, len(gs), MOST_MEMBERS):
        some = slice(first, first + MOST_MEMBERS)
        run = _add_low_rank_launch(
            target, out.dtype, *out.shape, tuple(A.shape[0] for A in As[some]), len(gs), has_old or first > 0,
            dropouts[0].threshold > 0, precision_of(out),
        )  # fmt: skip
        run(out, *_filled(gs[some]), *_filled(As[some]), *_masks(dropouts[some]))


@per_shape
def _add_low_rank_launch(target, dtype, M, C, ranks, members, has_old, dropout, precision) -> Launch:
    config = tuning.accumulate_config(target, dtype, M, max(ranks), aligned=C % 16 == 0, members=members)
    arguments = {
        "M": M, "C": C, "HAS_OLD": has_old, "PRECISION": precision, "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | _sizes(R0=ranks) | mask_constants(dropout, C)  # fmt: skip
    free = ("out_ptr", *_numbered("h0_ptr", "q0_ptr"), *_MASKS_FREE)
    grid = (ceil_div(M, config.block_m) * ceil_div(C, config.block_c),)
    return Launch(_lora_linear_group_accumulate_kernel, grid, arguments, free, config.num_warps, config.num_stages)


def group_gemm(out, dys, weights, gs, As, has_old, target) -> None:
    """out (M, K) = Σ_i g_i A_i + dy_i W_i, added to what `out` holds if has_old; None in gs stands for zero.

    Up to three members, whose weights share their strides.
    """
    run, config = _group_gemm_launch(
        target, out.dtype, *out.shape, tuple(0 if A is None else A.shape[0] for A in As),
        tuple(dy.shape[1] for dy in dys), tuple(dy.stride() for dy in dys), weights[0].stride(), has_old,
        all(map(suits_tma, (*dys, *weights, out))),
        all(wide_rows(matrix.stride()) for matrix in (*dys, *(as_stored(weight)[0] for weight in weights))),
        precision_of(out),
    )  # fmt: skip
    factors = *_filled(gs), *_filled(As)
    if not config.tma:
        run(out, *factors, *_filled(dys), *_filled(weights))
        return
    run(
        out, *factors, *_filled([descriptor(dy, config.block_m, config.block_d) for dy in dys]),
        *_filled([descriptor(weight, config.block_d, config.block_c) for weight in weights]),
        descriptor(out, config.block_m, config.block_c // config.subtiles),
    )  # fmt: skip


@per_shape
def _group_gemm_launch(
    target, dtype, M, C, ranks, depths, strides, v_strides, has_old, tma, aligned, precision
) -> tuple[Launch, tuning.GemmConfig]:
    # What the accumulator starts with takes registers as a mask does.
    config = tuning.gemm_config(target, dtype, M, tma=tma, aligned=aligned, dropout=has_old)
    arguments = {
        "M": M, "C": C, "HAS_OLD": has_old, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c,
        "BLOCK_D": config.block_d, "BLOCK_R": tuning.pad_rank(max(*ranks, 1), 16 if dtype.itemsize == 4 else 32),
        "GROUP_M": config.group_m,
    } | _sizes(D0=depths, R0=ranks)  # fmt: skip
    free = ("out_ptr", *_numbered("h0_ptr", "q0_ptr"))
    tiles = ceil_div(M, config.block_m) * ceil_div(C, config.block_c)
    if config.tma:
        arguments["SUBTILES"] = config.subtiles
        free += (*_numbered("p0_desc", "v0_desc"), "out_desc")
        kernel, grid = _lora_linear_group_gemm_tma_kernel, (min(tiles, target.sm_count),)
    else:
        arguments |= _sizes(stride_pm0=[rows for rows, _ in strides]) | {
            "stride_vd": v_strides[0], "stride_vc": v_strides[1],
            "EVEN_D": all(depth % config.block_d == 0 for depth in depths), "PRECISION": precision,
        }  # fmt: skip
        free += _numbered("p0_ptr", "v0_ptr")
        kernel, grid = _lora_linear_group_gemm_kernel, (tiles,)
    return Launch(kernel, grid, arguments, free, config.num_warps, config.num_stages), config
