"""lora_linear on Triton: launchers with the semantics of the operator's raw ops.

    xa = s·(D∘x) Aᵀ      y  = x Wᵀ + bias + xa Bᵀ
    g  = s·dy B          dx = D∘(g A) + dy W        dB = dyᵀ xa        dA = gᵀ (D∘x)

D = keep·65536/(65536 − t): the mask is regenerated in every kernel (philox.py), its factor is folded into xa and g.
Plans: addmm (torch's GEMM, then a rank-R product added in place), fused (xa or g by a skinny kernel, then one GEMM
whose accumulator also takes the rank-R product), onepass (forward only: xa formed inside that GEMM). tuning.py chooses.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .launch import check_operand, device_of, launch, precision_of, target_of
from .lora_linear_gemm import _lora_linear_gemm_kernel, _lora_linear_onepass_kernel
from .lora_linear_skinny import (
    _lora_linear_accumulate_kernel,
    _lora_linear_outer_kernel,
    _lora_linear_project_kernel,
    _lora_linear_project_outer_kernel,
    _lora_linear_reduce_kernel,
)
from .lora_linear_tma import _lora_linear_gemm_tma_kernel, _lora_linear_onepass_tma_kernel


@dataclass(frozen=True)
class _Dropout:
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

    def arguments(self, columns: int) -> dict:
        """Kernel arguments for a mask with `columns` columns."""
        return {
            "seed_ptr": self.seed if self.active else None,
            "threshold": self.threshold,
            "member": self.word,
            "DROPOUT": self.active,
            "ALIGNED": columns % 8 == 0,
        }


_NO_DROPOUT = _Dropout(None, 0, 0)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, seed: Tensor | None, scale: float,
    dropout_p: float, member: int, plan: str | tuning.Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, xa) for x (M, K), weight (N, K), bias (N,) or None, lora_A (R, K), lora_B (N, R); any strides.

    x, weight and bias are fp32, bf16 or fp16; lora_A and lora_B in x's dtype or fp32. y (M, N) and xa (M, R) are
    contiguous and in x's dtype. seed: 0-d int64 on x's device, None without dropout. Raises ValueError for a dtype,
    a device or a plan that these kernels do not take.
    """
    check_operand("lora_linear", "x", x)
    (M, K), (N, R) = x.shape, lora_B.shape
    target = target_of(x)
    dropout = _Dropout(seed, round(dropout_p * 65536), member)
    chosen = tuning.select_plan(plan, "forward", M, N, K, R, x.dtype, dropout.active, target)
    if chosen.name == "onepass" and R > tuning.ONEPASS_MAX_RANK:
        raise ValueError(f"lora_linear: plan onepass takes R <= {tuning.ONEPASS_MAX_RANK}, got {R}")
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))

    x = _with_unit_stride(x)
    lora_A, lora_B = lora_A.to(x.dtype).contiguous(), lora_B.to(x.dtype).contiguous()
    with device_of(x):
        if chosen.name == "onepass":
            return _onepass(x, weight, bias, lora_A, lora_B, scale * dropout.rescale, dropout, chosen.gemm, target)
        xa = _project(x, lora_A, scale * dropout.rescale, dropout, target, rank_first=True)
        if chosen.name == "addmm":
            y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            _accumulate(y, xa, lora_B, _NO_DROPOUT, target, rank_first=False)
        else:
            y = _gemm(x, weight.t(), bias, xa, lora_B, _NO_DROPOUT, chosen.gemm, target, rank_first=False)
        return y, xa


def backward(
    dy: Tensor, x: Tensor | None, weight: Tensor, lora_A: Tensor, lora_B: Tensor, xa: Tensor | None,
    seed: Tensor | None, mask_A: Tensor | None, mask_B: Tensor | None, scale: float, dropout_p: float, member: int,
    need_dx: bool, need_dA: bool, need_dB: bool, plan: str | tuning.Plan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dlora_A, dlora_B), each an empty (0,) tensor where it is not needed.

    dy (M, N), x (M, K) for dA, weight (N, K) for dx, lora_A (R, K), lora_B (N, R), xa (M, R) of the forward for dB.
    dx (M, K) is in dy's dtype, the others in their parameter's, rounded once from fp32; entries where mask_A or mask_B
    is False are 0. Raises ValueError as forward does.
    """
    check_operand("lora_linear", "dy", dy)
    (M, N), (R, K) = dy.shape, lora_A.shape
    target = target_of(dy)
    dropout = _Dropout(seed, round(dropout_p * 65536), member)
    chosen = tuning.select_plan(plan, "backward", M, N, K, R, dy.dtype, dropout.active, target)
    dx, dA, dB = dy.new_empty(0), dy.new_empty(0), dy.new_empty(0)
    if M == 0:
        dx = dy.new_empty((0, K)) if need_dx else dx
        dA = torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_dA else dA
        dB = torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_dB else dB
        return dx, dA, dB

    dy = _with_unit_stride(dy)
    A, B = lora_A.to(dy.dtype).contiguous(), lora_B.to(dy.dtype).contiguous()
    with device_of(dy):
        scale = scale * dropout.rescale
        g, dB = _from_dy(dy, B, xa, scale, mask_B, lora_B.dtype, need_dx or need_dA, need_dB, target)
        if need_dA:
            dA = _outer(_with_unit_stride(x), g, lora_A.dtype, mask_A, dropout, target, rank_first=True)
        if need_dx and chosen.name == "addmm":
            dx = torch.mm(dy, weight)
            _accumulate(dx, g, A, dropout, target, rank_first=True)
        elif need_dx:
            dx = _gemm(dy, weight, None, g, A, dropout, chosen.gemm, target, rank_first=True)
        return dx, dA, dB


def _from_dy(dy, lora_B, xa, scale, mask_B, dtype, need_g, need_dB, target) -> tuple[Tensor | None, Tensor]:
    """(g, dB) as _project_outer gives them, in one pass over dy where that moves fewer bytes than two; g may be None,
    dB is (0,) where it is not needed."""
    (M, N), R = dy.shape, lora_B.shape[1]
    block_m = tuning.rank_config("project_outer", target, dy.dtype, M, N, R, aligned=_vectorizes(dy)).block_m
    if need_g and need_dB and tuning.one_pass_over_dy(M, N, R, dy.element_size(), block_m):
        return _project_outer(dy, lora_B, xa, scale, mask_B, dtype, target)
    g = _project(dy, lora_B, scale, _NO_DROPOUT, target, rank_first=False) if need_g else None
    if not need_dB:
        return g, dy.new_empty(0)
    return g, _outer(dy, xa.contiguous(), dtype, mask_B, _NO_DROPOUT, target, rank_first=False)


def _project(p, q, scale, dropout, target, rank_first) -> Tensor:
    """h (M, R) = scale · (keep∘p) q in p's dtype, for p (M, C) with unit column stride; q as in _gemm."""
    (M, C), R = p.shape, q.shape[0 if rank_first else 1]
    config = tuning.rank_config("project", target, p.dtype, M, C, R, aligned=_vectorizes(p), dropout=dropout.active)
    tiles = triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r)
    parts, split_c = _split_sum(target, tiles[0] * tiles[1], C, config.block_c, M * C * p.element_size(), M * R)
    h = p.new_empty((M, R))
    partials = h if parts == 1 else p.new_empty((parts, M, R), dtype=torch.float32)
    arguments = {
        "p_ptr": p, "q_ptr": q, "h_ptr": partials, "M": M, "C": C, "split_c": split_c, "stride_pm": p.stride(0),
        "scale": scale, "R": R, "RANK_FIRST": rank_first, "PRECISION": precision_of(p), "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | dropout.arguments(C)  # fmt: skip
    grid = (tiles[0], parts, tiles[1])
    launch(_lora_linear_project_kernel, grid, arguments, config.num_warps, config.num_stages)
    return h if parts == 1 else _reduce(partials, h, None)


def _outer(p, h, dtype, mask, dropout, target, rank_first) -> Tensor:
    """(keep∘p)ᵀ h as (C, R), or (R, C) if rank_first, in `dtype`; 0 where mask, shaped like the result, is False."""
    (M, C), R = p.shape, h.shape[1]
    config = tuning.rank_config("outer", target, p.dtype, M, C, R, aligned=_vectorizes(p), dropout=dropout.active)
    tiles = triton.cdiv(C, config.block_c), triton.cdiv(R, config.block_r)
    parts, split_m = _split_sum(target, tiles[0] * tiles[1], M, config.block_m, M * C * p.element_size(), C * R)
    out = p.new_empty((R, C) if rank_first else (C, R), dtype=dtype)
    partials = out if parts == 1 else p.new_empty((parts, *out.shape), dtype=torch.float32)
    mask = _bytes(mask)
    arguments = {
        "p_ptr": p, "h_ptr": h, "out_ptr": partials, "mask_ptr": mask if parts == 1 else None, "M": M, "C": C,
        "split_m": split_m, "stride_pm": p.stride(0), "R": R, "RANK_FIRST": rank_first,
        "HAS_MASK": mask is not None and parts == 1, "PRECISION": precision_of(p), "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | dropout.arguments(C)  # fmt: skip
    grid = (tiles[0], parts, tiles[1])
    launch(_lora_linear_outer_kernel, grid, arguments, config.num_warps, config.num_stages)
    return out if parts == 1 else _reduce(partials, out, mask)


def _project_outer(dy, lora_B, xa, scale, mask_B, dtype, target, positions=None, features=None):
    """g (M, R) = scale · dy B in dy's dtype and dB (N, R) = dyᵀ xa in `dtype`, from one pass over dy.

    positions: int32 (N,), the row of dB (features, R) that each column of dy owns, negative for none.
    """
    (M, N), R = dy.shape, lora_B.shape[1]
    features = N if positions is None else features
    config = tuning.rank_config("project_outer", target, dy.dtype, M, N, R, aligned=_vectorizes(dy))
    tiles = triton.cdiv(M, config.block_m)
    parts, split_n = _split_sum(target, tiles, N, config.block_c, M * N * dy.element_size(), M * R)
    g, dB = dy.new_empty((M, R)), dy.new_empty((features, R), dtype=dtype)
    g_partials = g if parts == 1 else dy.new_empty((parts, M, R), dtype=torch.float32)
    dB_partials = dy.new_empty((tiles, features, R), dtype=torch.float32)
    arguments = {
        "dy_ptr": dy, "b_ptr": lora_B, "xa_ptr": xa.contiguous(), "g_ptr": g_partials, "part_ptr": dB_partials,
        "position_ptr": positions, "M": M, "N": N, "features": features, "split_n": split_n,
        "stride_dym": dy.stride(0), "scale": scale, "R": R, "SELECTED": positions is not None,
        "PRECISION": precision_of(dy), "BLOCK_M": config.block_m, "BLOCK_N": config.block_c, "BLOCK_R": config.block_r,
    }  # fmt: skip
    launch(_lora_linear_project_outer_kernel, (tiles, parts), arguments, config.num_warps, config.num_stages)
    if parts > 1:
        _reduce(g_partials, g, None)
    return g, _reduce(dB_partials, dB, _bytes(mask_B))


def _reduce(partials, out, mask) -> Tensor:
    """out = Σ over the first axis of partials, 0 where mask is 0."""
    parts, size = partials.shape[0], out.numel()
    block_s = min(tuning.next_power_of_two(parts), 32)
    block = max(64, 2048 // block_s)
    arguments = {
        "part_ptr": partials, "out_ptr": out, "mask_ptr": mask, "parts": parts, "size": size,
        "HAS_MASK": mask is not None, "BLOCK_S": block_s, "BLOCK": block,
    }  # fmt: skip
    launch(_lora_linear_reduce_kernel, (triton.cdiv(size, block),), arguments, num_warps=4, num_stages=1)
    return out


def _accumulate(out, h, q, dropout, target, rank_first) -> None:
    """out (M, C) += keep∘(h q) in place, for h (M, R); q as in _gemm."""
    (M, C), R = out.shape, h.shape[1]
    config = tuning.rank_config(
        "accumulate", target, out.dtype, M, C, R, aligned=_vectorizes(out), dropout=dropout.active
    )
    arguments = {
        "h_ptr": h, "q_ptr": q, "out_ptr": out, "M": M, "C": C, "R": R, "RANK_FIRST": rank_first,
        "PRECISION": precision_of(out), "BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_R": config.block_r,
    } | dropout.arguments(C)  # fmt: skip
    grid = (triton.cdiv(M, config.block_m) * triton.cdiv(C, config.block_c),)
    launch(_lora_linear_accumulate_kernel, grid, arguments, config.num_warps, config.num_stages)


def _gemm(p, v, bias, h, q, dropout, config, target, rank_first) -> Tensor:
    """out (M, C) = keep∘(h q) + p v + bias for p (M, D) with unit column stride, v (D, C), h (M, R).

    q is contiguous: lora_A (R, C) if rank_first, else lora_B (C, R), which stands for its transpose.
    """
    (M, D), C, R = p.shape, v.shape[1], h.shape[1]
    out = p.new_empty((M, C))
    stored, transposed = _as_stored(v)
    tma = all(map(_suits_tma, (p, stored, out)))
    if config is None or (config.tma and not tma):
        aligned = _vectorizes(p, stored)
        config = tuning.gemm_config(target, p.dtype, M, tma=tma, aligned=aligned, dropout=dropout.active)
    # Under dropout the tile's mask takes the registers that a wider step would need.
    block_r = tuning.pad_rank(R, 16 if dropout.active or p.dtype.itemsize == 4 else 32)
    arguments = {
        "h_ptr": h, "q_ptr": q, "bias_ptr": bias, "M": M, "C": C, "D": D, "R": R, "RANK_FIRST": rank_first,
        "HAS_BIAS": bias is not None, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c, "BLOCK_D": config.block_d,
        "BLOCK_R": block_r, "GROUP_M": config.group_m,
    } | dropout.arguments(C)  # fmt: skip
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(C, config.block_c)
    if config.tma:
        block_v = (config.block_c, config.block_d) if transposed else (config.block_d, config.block_c)
        arguments |= {
            "p_desc": _descriptor(p, config.block_m, config.block_d), "v_desc": _descriptor(stored, *block_v),
            "out_desc": _descriptor(out, config.block_m, config.block_c // config.subtiles), "V_TRANSPOSED": transposed,
            "SUBTILES": config.subtiles, "FLATTEN": config.flatten and not dropout.active and R <= 64,
        }  # fmt: skip
        kernel, grid = _lora_linear_gemm_tma_kernel, (min(tiles, target.sm_count),)
    else:
        arguments |= {
            "p_ptr": p, "v_ptr": v, "out_ptr": out, "stride_pm": p.stride(0), "stride_vd": v.stride(0),
            "stride_vc": v.stride(1), "EVEN_D": D % config.block_d == 0, "PRECISION": precision_of(p),
        }  # fmt: skip
        kernel, grid = _lora_linear_gemm_kernel, (tiles,)
    launch(kernel, grid, arguments, config.num_warps, config.num_stages)
    return out


def _onepass(x, weight, bias, lora_A, lora_B, scale, dropout, config, target) -> tuple[Tensor, Tensor]:
    """(y, xa) from one kernel; R <= tuning.ONEPASS_MAX_RANK, lora_A and lora_B contiguous."""
    (M, K), (N, R) = x.shape, lora_B.shape
    y, xa = x.new_empty((M, N)), x.new_empty((M, R))
    stored, transposed = _as_stored(weight.t())
    block_r = tuning.pad_rank(R, tuning.ONEPASS_MAX_RANK)
    tma = all(map(_suits_tma, (x, stored, lora_A, y)))
    if config is None or (config.tma and not tma):
        config = tuning.gemm_config(
            target, x.dtype, M, tma=tma, aligned=_vectorizes(x, stored), dropout=dropout.active, extra_rank=block_r
        )
    arguments = {
        "b_ptr": lora_B, "bias_ptr": bias, "xa_ptr": xa, "M": M, "N": N, "K": K, "scale": scale, "R": R,
        "HAS_BIAS": bias is not None, "BLOCK_M": config.block_m, "BLOCK_N": config.block_c, "BLOCK_K": config.block_d,
        "BLOCK_R": block_r, "GROUP_M": config.group_m,
    } | dropout.arguments(K)  # fmt: skip
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_c)
    if config.tma:
        block_w = (config.block_c, config.block_d) if transposed else (config.block_d, config.block_c)
        arguments |= {
            "x_desc": _descriptor(x, config.block_m, config.block_d), "w_desc": _descriptor(stored, *block_w),
            "a_desc": _descriptor(lora_A, block_r, config.block_d),
            "y_desc": _descriptor(y, config.block_m, config.block_c // config.subtiles), "W_TRANSPOSED": transposed,
            "SUBTILES": config.subtiles, "FLATTEN": config.flatten and not dropout.active,
        }  # fmt: skip
        kernel, grid = _lora_linear_onepass_tma_kernel, (min(tiles, target.sm_count),)
    else:
        arguments |= {
            "x_ptr": x, "w_ptr": weight, "a_ptr": lora_A, "y_ptr": y, "stride_xm": x.stride(0),
            "stride_wn": weight.stride(0), "stride_wk": weight.stride(1), "EVEN_K": K % config.block_d == 0,
            "PRECISION": precision_of(x),
        }  # fmt: skip
        kernel, grid = _lora_linear_onepass_kernel, (tiles,)
    launch(kernel, grid, arguments, config.num_warps, config.num_stages)
    return y, xa


def _as_stored(v: Tensor) -> tuple[Tensor, bool]:
    """(matrix, transposed): the view of v (D, C) that is contiguous along its rows, if either is."""
    return (v.t(), True) if v.stride(0) == 1 else (v, False)


def _split_sum(target, programs, length, block, stream_bytes, partial_size) -> tuple[int, int]:
    """(parts, length of one part, a multiple of `block`) for a sum of `length` terms; partials are fp32."""
    blocks = triton.cdiv(length, block)
    parts = tuning.split(target, programs, blocks, stream_bytes, 4 * partial_size)
    step = triton.cdiv(blocks, parts) * block
    return triton.cdiv(length, step), step


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _vectorizes(*matrices: Tensor) -> bool:
    """Whether the JIT can prove wide loads: it knows of an integer argument only that it is 1 or divisible by 16."""
    return all(matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 for matrix in matrices)


def _suits_tma(matrix: Tensor) -> bool:
    """Unit column stride, rows and base at multiples of 16 bytes, rows that do not overlap."""
    row, column = matrix.stride()
    aligned = row * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return column == 1 and row >= matrix.shape[1] and aligned and matrix.element_size() == 2


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as the contiguous bytes that kernels read."""
    return None if mask is None else mask.contiguous().view(torch.uint8)
