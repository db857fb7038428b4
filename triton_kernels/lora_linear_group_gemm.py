"""dx of lora_linear_group in one accumulator: every member's frozen product and low-rank product.

    dx (M, K) = Σ_i g_i A_i + dy_i W_i:    p_i = dy_i (M, D_i), v_i = W_i (D_i, C), h_i = g_i, q_i = A_i, C = K

The accumulator starts as what `out` holds with HAS_OLD: the low-rank sum where dropout masks it (the masks of several
members do not fit beside a GEMM's accumulator), and the earlier launches of a group of more than three members. Rank
0 stands for no low-rank product. The dimensions D_i are walked one after the other.
FLOPs: 2·M·C·Σ(D_i + R_i). At least Σ(M·D_i + D_i·C + M·R_i + R_i·C) elements are read and M·C written.
"""

import triton
import triton.language as tl

from .lora_linear_gemm import tile_of
from .lora_linear_skinny import add_rank_product
from .lora_linear_tma import _store_tile


@triton.jit
def _start(
    out_ptr, h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr, offs_m, offs_c, M, C,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HAS_OLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The accumulator before the frozen products."""
    acc = tl.zeros((offs_m.shape[0], offs_c.shape[0]), dtype=tl.float32)
    if HAS_OLD:
        out = out_ptr + offs_m[:, None].to(tl.int64) * C + offs_c[None, :]
        acc = tl.load(out, mask=(offs_m < M)[:, None] & (offs_c < C)[None, :], other=0.0).to(tl.float32)
    if R0 > 0:
        acc = add_rank_product(acc, h0_ptr, q0_ptr, offs_m, offs_c, M, C, R0, True, BLOCK_R, PRECISION)
    if R1 > 0:
        acc = add_rank_product(acc, h1_ptr, q1_ptr, offs_m, offs_c, M, C, R1, True, BLOCK_R, PRECISION)
    if R2 > 0:
        acc = add_rank_product(acc, h2_ptr, q2_ptr, offs_m, offs_c, M, C, R2, True, BLOCK_R, PRECISION)
    return acc


@triton.jit
def _add_product(
    acc, p_ptr, v_ptr, offs_m, offs_c, M, C, D, stride_pm, stride_vd, stride_vc,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if p_ptr is not None:
        mask_m = (offs_m < M)[:, None]
        mask_c = (offs_c < C)[None, :]
        offs_d = tl.arange(0, BLOCK_D)
        p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_d[None, :]
        v_ptrs = v_ptr + offs_d[:, None].to(tl.int64) * stride_vd + offs_c[None, :].to(tl.int64) * stride_vc
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                p = tl.load(p_ptrs, mask=mask_m, other=0.0)
                v = tl.load(v_ptrs, mask=mask_c, other=0.0)
            else:
                p = tl.load(p_ptrs, mask=mask_m & (offs_d[None, :] < D - d), other=0.0)
                v = tl.load(v_ptrs, mask=mask_c & (offs_d[:, None] < D - d), other=0.0)
            acc = tl.dot(p, v, acc, input_precision=PRECISION)
            p_ptrs += BLOCK_D
            v_ptrs += BLOCK_D * stride_vd
    return acc


@triton.jit(do_not_specialize=["M"])
def _lora_linear_group_gemm_kernel(
    p0_ptr, p1_ptr, p2_ptr, v0_ptr, v1_ptr, v2_ptr, h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr, out_ptr,
    M, C, D0, D1, D2, stride_pm0, stride_pm1, stride_pm2, stride_vd, stride_vc,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HAS_OLD: tl.constexpr, EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile per program, plain pointers: any architecture, dtype and shape; the members' v_i share their strides."""
    pid_m, pid_c = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = _start(
        out_ptr, h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr, offs_m, offs_c, M, C, R0, R1, R2, HAS_OLD, PRECISION,
        BLOCK_R,
    )  # fmt: skip
    acc = _add_product(
        acc, p0_ptr, v0_ptr, offs_m, offs_c, M, C, D0, stride_pm0, stride_vd, stride_vc, EVEN_D, PRECISION, BLOCK_D
    )
    acc = _add_product(
        acc, p1_ptr, v1_ptr, offs_m, offs_c, M, C, D1, stride_pm1, stride_vd, stride_vc, EVEN_D, PRECISION, BLOCK_D
    )
    acc = _add_product(
        acc, p2_ptr, v2_ptr, offs_m, offs_c, M, C, D2, stride_pm2, stride_vd, stride_vc, EVEN_D, PRECISION, BLOCK_D
    )
    out = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_c < C)[None, :])


@triton.jit
def _add_product_tma(acc, p_desc, v_desc, row, col, D, BLOCK_D: tl.constexpr):
    if p_desc is not None:
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(p_desc.load([row, d]), v_desc.load([d, col]), acc)
    return acc


@triton.jit(do_not_specialize=["M"])
def _lora_linear_group_gemm_tma_kernel(
    p0_desc, p1_desc, p2_desc, v0_desc, v1_desc, v2_desc, out_desc, out_ptr,
    h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr,
    M, C, D0, D1, D2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HAS_OLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr,
):  # fmt: skip
    """The persistent form on tensor descriptors, for weights that lie row after row; see lora_linear_tma.py."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_C)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_c, tl.num_programs(0)):
        pid_m, pid_c = tile_of(index, tiles_m, tiles_c, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_c * BLOCK_C
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_c = col + tl.arange(0, BLOCK_C)
        acc = _start(
            out_ptr, h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr, offs_m, offs_c, M, C, R0, R1, R2, HAS_OLD,
            "ieee", BLOCK_R,
        )  # fmt: skip
        acc = _add_product_tma(acc, p0_desc, v0_desc, row, col, D0, BLOCK_D)
        acc = _add_product_tma(acc, p1_desc, v1_desc, row, col, D1, BLOCK_D)
        acc = _add_product_tma(acc, p2_desc, v2_desc, row, col, D2, BLOCK_D)
        _store_tile(out_desc, acc, row, col, BLOCK_M, BLOCK_C, SUBTILES)
