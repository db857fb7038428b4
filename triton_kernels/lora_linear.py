"""lora_linear on Triton: launchers with the semantics of the operator's raw ops.

    xa = s·(D∘x) Aᵀ      y  = x Wᵀ + bias + xa Bᵀ
    g  = s·dy B          dx = D∘(g A) + dy W        dB = dyᵀ xa        dA = gᵀ (D∘x)

D = keep·65536/(65536 − t): the mask is regenerated in every kernel (philox.py), its factor is folded into xa and g.
Plans: addmm (torch's GEMM, then a rank-R product added in place), fused (xa or g by a skinny kernel, then one GEMM
whose accumulator also takes the rank-R product), onepass (forward only: xa formed inside that GEMM). tuning.py chooses.
"""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning
from .launch import Launch, check_operand, device_of, per_shape, precision_of, target_of, with_unit_stride
from .lora_linear_gemm import _lora_linear_gemm_kernel, _lora_linear_onepass_kernel
from .lora_linear_products import (
    MASK_FREE,
    NO_DROPOUT,
    Dropout,
    accumulate,
    factor,
    from_dy,
    mask_constants,
    outer,
    project,
    wide_rows,
)
from .lora_linear_tma import _lora_linear_gemm_tma_kernel, _lora_linear_onepass_tma_kernel
from .tuning import ceil_div


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
    dropout = Dropout(seed, round(dropout_p * 65536), member)
    chosen = tuning.select_plan(plan, "forward", M, N, K, R, x.dtype, dropout.active, target)
    if chosen.name == "onepass" and R > tuning.ONEPASS_MAX_RANK:
        raise ValueError(f"lora_linear: plan onepass takes R <= {tuning.ONEPASS_MAX_RANK}, got {R}")
    if M == 0:
        return x.new_empty((0, N)), x.new_empty((0, R))

    x = with_unit_stride(x)
    lora_A, lora_B = factor(lora_A, x.dtype), factor(lora_B, x.dtype)
    with device_of(x):
        if chosen.name == "onepass":
            return onepass(x, weight, bias, lora_A, lora_B, scale * dropout.rescale, dropout, chosen.gemm, target)
        xa = project(x, lora_A, scale * dropout.rescale, dropout, target, rank_first=True)
        if chosen.name == "addmm":
            y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
            accumulate(y, xa, lora_B, NO_DROPOUT, target, rank_first=False)
        else:
            y = gemm(x, weight.t(), bias, xa, lora_B, NO_DROPOUT, chosen.gemm, target, rank_first=False)
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
    dropout = Dropout(seed, round(dropout_p * 65536), member)
    chosen = tuning.select_plan(plan, "backward", M, N, K, R, dy.dtype, dropout.active, target)
    if M == 0:
        dx = dy.new_empty((0, K)) if need_dx else dy.new_empty(0)
        dA = torch.zeros_like(lora_A, memory_format=torch.contiguous_format) if need_dA else dy.new_empty(0)
        dB = torch.zeros_like(lora_B, memory_format=torch.contiguous_format) if need_dB else dy.new_empty(0)
        return dx, dA, dB

    dy = with_unit_stride(dy)
    A, B = factor(lora_A, dy.dtype), factor(lora_B, dy.dtype)
    with device_of(dy):
        scale = scale * dropout.rescale
        g, dB = from_dy(dy, B, xa, scale, mask_B, lora_B.dtype, need_dx or need_dA, need_dB, target)
        if need_dA:
            dA = outer(with_unit_stride(x), g, lora_A.dtype, mask_A, dropout, target, rank_first=True)
        else:
            dA = dy.new_empty(0)
        if not need_dx:
            dx = dy.new_empty(0)
        elif chosen.name == "addmm":
            dx = torch.mm(dy, weight)
            accumulate(dx, g, A, dropout, target, rank_first=True)
        else:
            dx = gemm(dy, weight, None, g, A, dropout, chosen.gemm, target, rank_first=True)
        return dx, dA, dB


def gemm(p, v, bias, h, q, dropout, config, target, rank_first) -> Tensor:
    """out (M, C) = keep∘(h q) + p v + bias for p (M, D) with unit column stride, v (D, C), h (M, R).

    q is contiguous: lora_A (R, C) if rank_first, else lora_B (C, R), which stands for its transpose. config None: the
    architecture's own tiles, as for operands that do not suit a configuration's descriptors.
    """
    (M, D), C, R = p.shape, v.shape[1], h.shape[1]
    out = p.new_empty((M, C))
    stored, transposed = as_stored(v)
    run, config = _gemm_launch(
        target, p.dtype, M, D, C, R, p.stride(), v.stride(), rank_first, bias is not None, dropout.threshold > 0,
        suits_tma(p) and suits_tma(stored) and suits_tma(out), config, precision_of(p),
    )  # fmt: skip
    if not config.tma:
        run(p, v, out, h, q, bias, *dropout.free)
        return out
    block_v = (config.block_c, config.block_d) if transposed else (config.block_d, config.block_c)
    p_desc, v_desc = descriptor(p, config.block_m, config.block_d), descriptor(stored, *block_v)
    out_desc = descriptor(out, config.block_m, config.block_c // config.subtiles)
    run(p_desc, v_desc, out_desc, h, q, bias, *dropout.free)
    return out


@per_shape
def _gemm_launch(
    target, dtype, M, D, C, R, p_strides, v_strides, rank_first, has_bias, dropout, tma, config, precision
) -> tuple[Launch, tuning.GemmConfig]:
    transposed = v_strides[0] == 1
    if config is None or (config.tma and not tma):
        aligned = wide_rows(p_strides) and wide_rows(v_strides[::-1] if transposed else v_strides)
        config = tuning.gemm_config(target, dtype, M, tma=tma, aligned=aligned, dropout=dropout)
    # Under dropout the tile's mask takes the registers that a wider step would need.
    block_r = tuning.pad_rank(R, 16 if dropout or dtype.itemsize == 4 else 32)
    arguments = {
        "M": M, "C": C, "D": D, "R": R, "RANK_FIRST": rank_first, "HAS_BIAS": has_bias, "BLOCK_M": config.block_m,
        "BLOCK_C": config.block_c, "BLOCK_D": config.block_d, "BLOCK_R": block_r, "GROUP_M": config.group_m,
    } | mask_constants(dropout, C)  # fmt: skip
    tiles = ceil_div(M, config.block_m) * ceil_div(C, config.block_c)
    operands = ("h_ptr", "q_ptr", "bias_ptr", *MASK_FREE)
    if config.tma:
        arguments |= {
            "V_TRANSPOSED": transposed, "SUBTILES": config.subtiles,
            "FLATTEN": config.flatten and not dropout and R <= 64,
        }  # fmt: skip
        kernel, grid = _lora_linear_gemm_tma_kernel, (min(tiles, target.sm_count),)
        free = ("p_desc", "v_desc", "out_desc", *operands)
    else:
        arguments |= {
            "stride_pm": p_strides[0], "stride_vd": v_strides[0], "stride_vc": v_strides[1],
            "EVEN_D": D % config.block_d == 0, "PRECISION": precision,
        }  # fmt: skip
        kernel, grid, free = _lora_linear_gemm_kernel, (tiles,), ("p_ptr", "v_ptr", "out_ptr", *operands)
    return Launch(kernel, grid, arguments, free, config.num_warps, config.num_stages), config


def onepass(x, weight, bias, lora_A, lora_B, scale, dropout, config, target) -> tuple[Tensor, Tensor]:
    """(y, xa) from one kernel; R <= tuning.ONEPASS_MAX_RANK, lora_A and lora_B contiguous; config as in gemm."""
    (M, K), (N, R) = x.shape, lora_B.shape
    y, xa = x.new_empty((M, N)), x.new_empty((M, R))
    stored, transposed = as_stored(weight.t())
    run, config = _onepass_launch(
        target, x.dtype, M, K, N, R, x.stride(), weight.stride(), bias is not None, dropout.threshold > 0,
        suits_tma(x) and suits_tma(stored) and suits_tma(lora_A) and suits_tma(y), config, precision_of(x),
    )  # fmt: skip
    if not config.tma:
        run(x, weight, lora_A, y, lora_B, bias, xa, scale, *dropout.free)
        return y, xa
    block_w = (config.block_c, config.block_d) if transposed else (config.block_d, config.block_c)
    x_desc, w_desc = descriptor(x, config.block_m, config.block_d), descriptor(stored, *block_w)
    a_desc = descriptor(lora_A, tuning.pad_rank(R, tuning.ONEPASS_MAX_RANK), config.block_d)
    y_desc = descriptor(y, config.block_m, config.block_c // config.subtiles)
    run(x_desc, w_desc, a_desc, y_desc, lora_B, bias, xa, scale, *dropout.free)
    return y, xa


@per_shape
def _onepass_launch(
    target, dtype, M, K, N, R, x_strides, w_strides, has_bias, dropout, tma, config, precision
) -> tuple[Launch, tuning.GemmConfig]:
    transposed = w_strides[1] == 1
    block_r = tuning.pad_rank(R, tuning.ONEPASS_MAX_RANK)
    if config is None or (config.tma and not tma):
        aligned = wide_rows(x_strides) and wide_rows(w_strides if transposed else w_strides[::-1])
        config = tuning.gemm_config(target, dtype, M, tma=tma, aligned=aligned, dropout=dropout, extra_rank=block_r)
    arguments = {
        "M": M, "N": N, "K": K, "R": R, "HAS_BIAS": has_bias, "BLOCK_M": config.block_m, "BLOCK_N": config.block_c,
        "BLOCK_K": config.block_d, "BLOCK_R": block_r, "GROUP_M": config.group_m,
    } | mask_constants(dropout, K)  # fmt: skip
    tiles = ceil_div(M, config.block_m) * ceil_div(N, config.block_c)
    operands = ("b_ptr", "bias_ptr", "xa_ptr", "scale", *MASK_FREE)
    if config.tma:
        arguments |= {
            "W_TRANSPOSED": transposed, "SUBTILES": config.subtiles, "FLATTEN": config.flatten and not dropout,
        }  # fmt: skip
        kernel, grid = _lora_linear_onepass_tma_kernel, (min(tiles, target.sm_count),)
        free = ("x_desc", "w_desc", "a_desc", "y_desc", *operands)
    else:
        arguments |= {
            "stride_xm": x_strides[0], "stride_wn": w_strides[0], "stride_wk": w_strides[1],
            "EVEN_K": K % config.block_d == 0, "PRECISION": precision,
        }  # fmt: skip
        kernel, grid, free = _lora_linear_onepass_kernel, (tiles,), ("x_ptr", "w_ptr", "a_ptr", "y_ptr", *operands)
    return Launch(kernel, grid, arguments, free, config.num_warps, config.num_stages), config


def as_stored(v: Tensor) -> tuple[Tensor, bool]:
    """(matrix, transposed): the view of v (D, C) that is contiguous along its rows, if either is."""
    return (v.t(), True) if v.stride(0) == 1 else (v, False)


def suits_tma(matrix: Tensor) -> bool:
    """Unit column stride, rows and base at multiples of 16 bytes, rows that do not overlap."""
    row, column = matrix.stride()
    aligned = row * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return column == 1 and row >= matrix.shape[1] and aligned and matrix.element_size() == 2


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
