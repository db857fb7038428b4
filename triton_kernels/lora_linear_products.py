"""Launchers of the rank-R products, which lora_linear, lora_update and lora_linear_group share.

    project        h = scale · (keep∘p) q          xa from x, g from dy
    outer          out = (keep∘p)ᵀ h               dA from x and g, dB from dy and xa
    project_outer  g and dB from one pass over dy
    accumulate     out += keep∘(h q)               y from xa, dx from g

Kernels: lora_linear_skinny.py; tiles: tuning.py. What a shape determines is computed once (launch.per_shape).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import tuning
from .launch import Launch, as_bytes, per_shape, precision_of
from .lora_linear_skinny import (
    _lora_linear_accumulate_kernel,
    _lora_linear_outer_kernel,
    _lora_linear_project_kernel,
    _lora_linear_project_outer_kernel,
    _lora_linear_reduce_kernel,
)
from .tuning import ceil_div


class Dropout(NamedTuple):
    """The mask of one call. threshold 0 is no dropout, whatever the seed."""

    seed: Tensor | None
    threshold: int
    member: int

    @property
    def active(self) -> bool:
        return self.threshold > 0

    @property
    def rescale(self) -> float:
        return 65536.0 / (65536 - self.threshold)

    @property
    def word(self) -> int:
        """The 32 bits of `member` as the signed number that a kernel's int32 argument holds."""
        return self.member - (self.member >> 31 << 32)

    @property
    def free(self) -> tuple[Tensor | None, int, int]:
        """The arguments named MASK_FREE."""
        return self.seed if self.threshold > 0 else None, self.threshold, self.word


MASK_FREE = ("seed_ptr", "threshold", "member")
NO_DROPOUT = Dropout(None, 0, 0)


def mask_constants(active: bool, columns: int) -> dict:
    """The constexprs of a mask with `columns` columns; ALIGNED: a row starts at a multiple of eight elements."""
    return {"DROPOUT": active, "ALIGNED": columns % 8 == 0}


def from_dy(dy, lora_B, xa, scale, mask_B, dtype, need_g, need_dB, target, rows=None) -> tuple[Tensor | None, Tensor]:
    """(g, dB) as project_outer gives them, in one pass over dy where that moves fewer bytes than two; g may be None,
    dB is (0,) where it is not needed. rows: which rows of dB are wanted; None: all."""
    if need_g and need_dB and in_one_pass(target, dy.dtype, *dy.shape, lora_B.shape[1], dy.stride()):
        places, features = (None, None) if rows is None else (positions(rows, dy.shape[1]), rows.shape[0])
        return project_outer(dy, lora_B, xa, scale, mask_B, dtype, target, places, features)
    g = project(dy, lora_B, scale, NO_DROPOUT, target, rank_first=False) if need_g else None
    if not need_dB:
        return g, dy.new_empty(0)
    dB = outer(dy, xa.contiguous(), dtype, mask_B, NO_DROPOUT, target, rank_first=False)
    return g, dB if rows is None else dB.index_select(0, rows)


@per_shape
def in_one_pass(target, dtype, M, N, R, strides) -> bool:
    """Whether g and dB come from one pass over dy (M, N)."""
    block_m = tuning.rank_config("project_outer", target, dtype, M, N, R, aligned=wide_rows(strides)).block_m
    return tuning.one_pass_over_dy(M, N, R, dtype.itemsize, block_m)


def project(p, q, scale, dropout, target, rank_first) -> Tensor:
    """h (M, R) = scale · (keep∘p) q in p's dtype, for p (M, C) with unit column stride.

    q is contiguous: (R, C) if rank_first, else (C, R).
    """
    (M, C), R = p.shape, q.shape[0 if rank_first else 1]
    run, parts = _project_launch(
        target, p.dtype, M, C, R, p.stride(), rank_first, dropout.threshold > 0, precision_of(p)
    )
    h = p.new_empty((M, R))
    partials = h if parts == 1 else p.new_empty((parts, M, R), dtype=torch.float32)
    run(p, q, partials, scale, *dropout.free)
    return h if parts == 1 else reduce(partials, h, None)


@per_shape
def _project_launch(target, dtype, M, C, R, strides, rank_first, dropout, precision) -> tuple[Launch, int]:
    config = tuning.rank_config("project", target, dtype, M, C, R, aligned=wide_rows(strides), dropout=dropout)
    tiles = ceil_div(M, config.block_m), ceil_div(R, config.block_r)
    parts, split_c = split_sum(target, tiles[0] * tiles[1], C, config.block_c, M * C * dtype.itemsize, M * R)
    arguments = {
        "M": M, "C": C, "split_c": split_c, "stride_pm": strides[0], "R": R, "RANK_FIRST": rank_first,
        "PRECISION": precision, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | mask_constants(dropout, C)  # fmt: skip
    free = ("p_ptr", "q_ptr", "h_ptr", "scale", *MASK_FREE)
    grid = (tiles[0], parts, tiles[1])
    return Launch(_lora_linear_project_kernel, grid, arguments, free, config.num_warps, config.num_stages), parts


def outer(p, h, dtype, mask, dropout, target, rank_first) -> Tensor:
    """(keep∘p)ᵀ h as (C, R), or (R, C) if rank_first, in `dtype`; 0 where mask, shaped like the result, is False."""
    (M, C), R = p.shape, h.shape[1]
    run, parts = _outer_launch(
        target, p.dtype, M, C, R, p.stride(), rank_first, mask is not None, dropout.threshold > 0, precision_of(p)
    )
    out = p.new_empty((R, C) if rank_first else (C, R), dtype=dtype)
    partials = out if parts == 1 else p.new_empty((parts, *out.shape), dtype=torch.float32)
    mask = as_bytes(mask)
    run(p, h, partials, mask if parts == 1 else None, *dropout.free)
    return out if parts == 1 else reduce(partials, out, mask)


@per_shape
def _outer_launch(target, dtype, M, C, R, strides, rank_first, masked, dropout, precision) -> tuple[Launch, int]:
    config = tuning.rank_config("outer", target, dtype, M, C, R, aligned=wide_rows(strides), dropout=dropout)
    tiles = ceil_div(C, config.block_c), ceil_div(R, config.block_r)
    parts, split_m = split_sum(target, tiles[0] * tiles[1], M, config.block_m, M * C * dtype.itemsize, C * R)
    arguments = {
        "M": M, "C": C, "split_m": split_m, "stride_pm": strides[0], "R": R, "RANK_FIRST": rank_first,
        "HAS_MASK": masked and parts == 1, "PRECISION": precision, "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | mask_constants(dropout, C)  # fmt: skip
    free = ("p_ptr", "h_ptr", "out_ptr", "mask_ptr", *MASK_FREE)
    grid = (tiles[0], parts, tiles[1])
    return Launch(_lora_linear_outer_kernel, grid, arguments, free, config.num_warps, config.num_stages), parts


def project_outer(dy, lora_B, xa, scale, mask_B, dtype, target, positions=None, features=None):
    """g (M, R) = scale · dy B in dy's dtype and dB (N, R) = dyᵀ xa in `dtype`, from one pass over dy.

    positions: int32 (N,), the row of dB (features, R) that each column of dy owns, negative for none.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    features = N if positions is None else features
    run, parts, tiles = _project_outer_launch(
        target, dy.dtype, M, N, R, dy.stride(), features, positions is not None, precision_of(dy)
    )
    g, dB = dy.new_empty((M, R)), dy.new_empty((features, R), dtype=dtype)
    g_partials = g if parts == 1 else dy.new_empty((parts, M, R), dtype=torch.float32)
    dB_partials = dy.new_empty((tiles, features, R), dtype=torch.float32)
    run(dy, lora_B, xa.contiguous(), g_partials, dB_partials, positions, scale)
    if parts > 1:
        reduce(g_partials, g, None)
    return g, reduce(dB_partials, dB, as_bytes(mask_B))


@per_shape
def _project_outer_launch(target, dtype, M, N, R, strides, features, selected, precision) -> tuple[Launch, int, int]:
    config = tuning.rank_config("project_outer", target, dtype, M, N, R, aligned=wide_rows(strides))
    tiles = ceil_div(M, config.block_m)
    parts, split_n = split_sum(target, tiles, N, config.block_c, M * N * dtype.itemsize, M * R)
    arguments = {
        "M": M, "N": N, "features": features, "split_n": split_n, "stride_dym": strides[0], "R": R,
        "SELECTED": selected, "PRECISION": precision, "BLOCK_M": config.block_m, "BLOCK_N": config.block_c,
        "BLOCK_R": config.block_r,
    }  # fmt: skip
    free = ("dy_ptr", "b_ptr", "xa_ptr", "g_ptr", "part_ptr", "position_ptr", "scale")
    run = Launch(
        _lora_linear_project_outer_kernel, (tiles, parts), arguments, free, config.num_warps, config.num_stages
    )
    return run, parts, tiles


def reduce(partials, out, mask) -> Tensor:
    """out = Σ over the first axis of partials, 0 where mask is 0."""
    _reduce_launch(partials.shape[0], out.numel(), mask is not None)(partials, out, mask)
    return out


@per_shape
def _reduce_launch(parts, size, masked) -> Launch:
    block_s = min(tuning.next_power_of_two(parts), 32)
    block = max(64, 2048 // block_s)
    arguments = {"parts": parts, "size": size, "HAS_MASK": masked, "BLOCK_S": block_s, "BLOCK": block}
    free = ("part_ptr", "out_ptr", "mask_ptr")
    return Launch(_lora_linear_reduce_kernel, (ceil_div(size, block),), arguments, free, num_warps=4, num_stages=1)


def accumulate(out, h, q, dropout, target, rank_first) -> None:
    """out (M, C) += keep∘(h q) in place, for contiguous out and h (M, R); q as in project."""
    (M, C), R = out.shape, h.shape[1]
    run = _accumulate_launch(target, out.dtype, M, C, R, rank_first, dropout.threshold > 0, precision_of(out))
    run(h, q, out, *dropout.free)


@per_shape
def _accumulate_launch(target, dtype, M, C, R, rank_first, dropout, precision) -> Launch:
    config = tuning.rank_config("accumulate", target, dtype, M, C, R, aligned=C % 16 == 0, dropout=dropout)
    arguments = {
        "M": M, "C": C, "R": R, "RANK_FIRST": rank_first, "PRECISION": precision, "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | mask_constants(dropout, C)  # fmt: skip
    grid = (ceil_div(M, config.block_m) * ceil_div(C, config.block_c),)
    free = ("h_ptr", "q_ptr", "out_ptr", *MASK_FREE)
    return Launch(_lora_linear_accumulate_kernel, grid, arguments, free, config.num_warps, config.num_stages)


def split_sum(target, programs, length, block, stream_bytes, partial_size) -> tuple[int, int]:
    """(parts, length of one part, a multiple of `block`) for a sum of `length` terms; partials are fp32."""
    blocks = ceil_div(length, block)
    parts = tuning.split(target, programs, blocks, stream_bytes, 4 * partial_size)
    step = ceil_div(blocks, parts) * block
    return ceil_div(length, step), step


def factor(lora: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B in one piece and in dtype, itself where it is that already."""
    return lora if lora.dtype == dtype and lora.is_contiguous() else lora.to(dtype).contiguous()


def positions(index: Tensor, size: int) -> Tensor:
    """int32 (size,): where each of 0 … size − 1 stands in `index`, −1 where it does not."""
    where = torch.full((size,), -1, dtype=torch.int32, device=index.device)
    return where.index_copy_(0, index, torch.arange(index.shape[0], dtype=torch.int32, device=index.device))


def wide_rows(strides: tuple[int, int]) -> bool:
    """Whether the JIT can prove wide loads: it knows of an integer argument only that it is 1 or divisible by 16."""
    return strides[1] == 1 and strides[0] % 16 == 0
