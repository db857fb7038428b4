"""The fused GEMMs of lora_linear: the frozen product and the rank-R product in one accumulator.

Forward  y  (M, N) = xa Bᵀ + x Wᵀ + bias:   p = x,  v = Wᵀ, h = xa, q = Bᵀ.
Backward dx (M, K) = keep∘(g A) + dy W:     p = dy, v = W,  h = g,  q = A.
Both are out (M, C) = keep∘(h q) + p v + bias with p (M, D), v (D, C), h (M, R), q (R, C); D is what the GEMM sums over.
FLOPs: 2·M·C·(D + R). At least M·D + D·C + M·R + R·C elements are read and M·C written.
"""

import triton
import triton.language as tl

from .lora_linear_skinny import add_rank_product, rank_offsets
from .philox import keep_mask

_UNSPECIALIZED = ["M", "member", "threshold"]


@triton.jit
def tile_of(index, tiles_m, tiles_c, GROUP_M: tl.constexpr):
    """Tile coordinates in bands of GROUP_M rows, so that tiles in flight share rows of p and columns of v in L2."""
    band = index // (GROUP_M * tiles_c)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    inside = index % (GROUP_M * tiles_c)
    return band * GROUP_M + inside % height, inside // height


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lora_linear_gemm_kernel(
    p_ptr, v_ptr, h_ptr, q_ptr, bias_ptr, out_ptr, seed_ptr,
    M, C, D, stride_pm, stride_vd, stride_vc, threshold, member,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One tile per program, plain pointers: any architecture, dtype and shape, any strides of v."""
    pid_m, pid_c = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = (offs_m < M)[:, None]
    mask_c = (offs_c < C)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if DROPOUT:
        # Before the product: the random words and the accumulator then never need registers at the same time.
        keep = keep_mask(tl.load(seed_ptr), offs_m, pid_c * BLOCK_C, C, threshold, member, BLOCK_C, ALIGNED)
    acc = add_rank_product(acc, h_ptr, q_ptr, offs_m, offs_c, M, C, R, RANK_FIRST, BLOCK_R, PRECISION)
    if DROPOUT:
        acc = tl.where(keep, acc, 0.0)

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

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_m & mask_c)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lora_linear_onepass_kernel(
    x_ptr, w_ptr, a_ptr, b_ptr, bias_ptr, y_ptr, xa_ptr, seed_ptr,
    M, N, K, stride_xm, stride_wn, stride_wk, scale, threshold, member,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias + xa Bᵀ with xa = scale · (keep∘x) Aᵀ formed while x streams by (R <= BLOCK_R).

    Every tile of a row block forms the same xa and the tile of the first columns stores it: one kernel reads x.
    FLOPs: 2·M·N·(K + R) + 2·M·K·R·cdiv(N, BLOCK_N). At least M·K + N·K + R·(K + N) are read, M·(N + R) written.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    mask_r = (offs_r < R)[None, :]
    if DROPOUT:
        seed = tl.load(seed_ptr)

    offs_k = tl.arange(0, BLOCK_K)
    rows_k = offs_k[:, None].to(tl.int64)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + rows_k * stride_wk + offs_n[None, :].to(tl.int64) * stride_wn
    a_ptrs = a_ptr + rank_offsets(offs_k[:, None], offs_r[None, :], K, R, True)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_xa = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m, other=0.0)
            w = tl.load(w_ptrs, mask=mask_n, other=0.0)
            a = tl.load(a_ptrs, mask=mask_r, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m & (offs_k[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask=mask_n & (offs_k[:, None] < K - k), other=0.0)
            a = tl.load(a_ptrs, mask=mask_r & (offs_k[:, None] < K - k), other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if DROPOUT:
            x = tl.where(keep_mask(seed, offs_m, k, K, threshold, member, BLOCK_K, ALIGNED), x, 0.0)
        acc_xa = tl.dot(x, a, acc_xa, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
        a_ptrs += BLOCK_K

    xa = (acc_xa * scale).to(xa_ptr.dtype.element_ty)
    if pid_n == 0:
        tl.store(xa_ptr + offs_m[:, None] * R + offs_r[None, :], xa, mask=mask_m & mask_r)
    b_ptrs = b_ptr + rank_offsets(offs_n[None, :], offs_r[:, None], N, R, False)
    b = tl.load(b_ptrs, mask=mask_n & (offs_r < R)[:, None], other=0.0)
    acc = tl.dot(xa, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)
