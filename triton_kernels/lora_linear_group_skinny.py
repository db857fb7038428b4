"""The rank-R products of lora_linear_group: what reads the shared input once, or knows of the selected features.

Up to three members per launch (a longer group takes several), one argument each: absent ones have rank 0 and cost
nothing. Sums are split over programs into fp32 partials that _lora_linear_reduce_kernel adds in a fixed order.
"""

import triton
import triton.language as tl

from .lora_linear_skinny import add_rank_product, rank_offsets
from .philox import keep_columns, keep_mask, runs_of_eight


@triton.jit
def _project_step(
    acc, x, a_ptr, seed, offs_m, k, mask_k, offs_r, K, threshold, member,
    R: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + (keep∘x) aᵀ for one tile of x and a (R, K)."""
    if R > 0:
        offs_k = k + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rank_offsets(offs_k[:, None], offs_r[None, :], K, R, True)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & (offs_r < R)[None, :], other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(seed, offs_m, k, K, threshold, member, BLOCK_K, ALIGNED), x, 0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_xa(acc, xa_ptr, offs_m, mask_m, offs_r, part, M, scale, R: tl.constexpr):
    if R > 0:
        xa_ptrs = xa_ptr + (part * M + offs_m)[:, None] * R + offs_r[None, :]
        tl.store(xa_ptrs, (acc * scale).to(xa_ptr.dtype.element_ty), mask=mask_m[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["M", "threshold", "member0", "member1", "member2"])
def _lora_linear_group_project_kernel(
    x_ptr, a0_ptr, a1_ptr, a2_ptr, xa0_ptr, xa1_ptr, xa2_ptr, columns_ptr, position_ptr, seed_ptr,
    M, K, features, split_k, stride_xm, scale0, scale1, scale2, threshold, member0, member1, member2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, GATHER: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """xa_i (M, R_i) = scale_i · (keep_i∘x) A_iᵀ of every member, and with GATHER x[:, J], in one pass over x (M, K).

    Program (i, s, j) sums columns s·split_k … (s+1)·split_k − 1 of row block i for ranks j·BLOCK_R … of each member
    into xa + s·M·R, as the projection of one layer does. position (K,): the column of x[:, J] (M, features) that a
    column of x goes to, negative for none; rank block 0 stores it, undropped.
    Reads M·K per rank block and K·ΣR; writes M·ΣR (4·S·M·ΣR bytes when split) and M·|J|. FLOPs: 2·M·K·ΣR.
    """
    pid_s = tl.program_id(1).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    x_rows = x_ptr + offs_m[:, None] * stride_xm

    start = tl.program_id(1) * split_k
    stop = tl.minimum(start + split_k, K)
    acc0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc1 = acc0
    acc2 = acc0
    for k in range(start, stop, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < stop
        x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if GATHER:
            position = tl.load(position_ptr + offs_k, mask=mask_k, other=-1)
            position = tl.where(tl.program_id(2) == 0, position, -1)
            live = mask_m[:, None] & (position >= 0)[None, :]
            tl.store(columns_ptr + offs_m[:, None] * features + position[None, :], x, mask=live)
        acc0 = _project_step(
            acc0, x, a0_ptr, seed, offs_m, k, mask_k, offs_r, K, threshold, member0, R0, DROPOUT, ALIGNED, PRECISION,
            BLOCK_K,
        )  # fmt: skip
        acc1 = _project_step(
            acc1, x, a1_ptr, seed, offs_m, k, mask_k, offs_r, K, threshold, member1, R1, DROPOUT, ALIGNED, PRECISION,
            BLOCK_K,
        )  # fmt: skip
        acc2 = _project_step(
            acc2, x, a2_ptr, seed, offs_m, k, mask_k, offs_r, K, threshold, member2, R2, DROPOUT, ALIGNED, PRECISION,
            BLOCK_K,
        )  # fmt: skip

    _store_xa(acc0, xa0_ptr, offs_m, mask_m, offs_r, pid_s, M, scale0, R0)
    _store_xa(acc1, xa1_ptr, offs_m, mask_m, offs_r, pid_s, M, scale1, R1)
    _store_xa(acc2, xa2_ptr, offs_m, mask_m, offs_r, pid_s, M, scale2, R2)


@triton.jit
def _columns_sum(
    acc, p_ptr, h_ptr, column, seed, start, stop, offs_c, offs_r, C, K, threshold, member,
    R: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    mask_c = offs_c < C
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < stop
        p = tl.load(p_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        mask_h = mask_m[:, None] & (offs_r < R)[None, :]
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_h, other=0.0)
        keep = keep_columns(seed, offs_m, column, K, threshold, member, RUNS)
        acc = tl.dot(tl.trans(tl.where(keep, p, 0.0)), h, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "member"])
def _lora_linear_columns_outer_kernel(
    p_ptr, h_ptr, out_ptr, index_ptr, seed_ptr,
    M, C, K, split_m, threshold, member,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[r, c] = Σ_m keep[m, J[c]] · p[m, c] · h[m, r]: dA of the features J under dropout, p (M, C) = x[:, J].

    index (C,) is J, keep the (M, K) mask of the whole x, regenerated for eight columns at a time where this block's are
    whole groups of eight, as selections of blocks are. Program (i, s, j) as in _lora_linear_outer_kernel.
    Reads M·C per rank block, M·R and J; writes C·R, or 4·S·C·R bytes when split. FLOPs: 2·M·C·R.
    """
    pid_s = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    seed = tl.load(seed_ptr)
    start = pid_s * split_m
    stop = tl.minimum(start + split_m, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    if runs_of_eight(index_ptr, offs_c, C, K):
        offs_g = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C // 8) * 8
        first = tl.load(index_ptr + offs_g, mask=offs_g < C, other=0)
        acc = _columns_sum(
            acc, p_ptr, h_ptr, first, seed, start, stop, offs_c, offs_r, C, K, threshold, member, R, True, PRECISION,
            BLOCK_M,
        )  # fmt: skip
    else:
        column = tl.load(index_ptr + offs_c, mask=offs_c < C, other=0)
        acc = _columns_sum(
            acc, p_ptr, h_ptr, column, seed, start, stop, offs_c, offs_r, C, K, threshold, member, R, False, PRECISION,
            BLOCK_M,
        )  # fmt: skip
    out = out_ptr + pid_s.to(tl.int64) * C * R + rank_offsets(offs_c[:, None], offs_r[None, :], C, R, True)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(offs_c < C)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _add_member(
    acc, h_ptr, q_ptr, seed_ptr, offs_m, offs_c, start_c, M, C, threshold, member,
    R: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    if R > 0:
        if DROPOUT:
            # Keeps the members' random words from being computed, and held in registers, all at once.
            tl.debug_barrier()
            keep = keep_mask(tl.load(seed_ptr), offs_m, start_c, C, threshold, member, BLOCK_C, ALIGNED)
            product = tl.zeros(acc.shape, dtype=tl.float32)
            product = add_rank_product(product, h_ptr, q_ptr, offs_m, offs_c, M, C, R, True, BLOCK_R, PRECISION)
            acc += tl.where(keep, product, 0.0)
        else:
            acc = add_rank_product(acc, h_ptr, q_ptr, offs_m, offs_c, M, C, R, True, BLOCK_R, PRECISION)
    return acc


@triton.jit(do_not_specialize=["M", "threshold", "member0", "member1", "member2"])
def _lora_linear_group_accumulate_kernel(
    h0_ptr, h1_ptr, h2_ptr, q0_ptr, q1_ptr, q2_ptr, out_ptr, seed_ptr,
    M, C, threshold, member0, member1, member2,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HAS_OLD: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (M, C) = Σ_i keep_i∘(h_i q_i), the low-rank share of dx from every member, added to `out` with HAS_OLD.

    Writes M·C, with HAS_OLD reads it too, and (M + C)·ΣR. FLOPs: 2·M·C·ΣR.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    start_c = tl.program_id(0) % tiles_c * BLOCK_C
    offs_m = (tl.program_id(0) // tiles_c).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = start_c + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    out = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    if HAS_OLD:
        acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    acc = _add_member(
        acc, h0_ptr, q0_ptr, seed_ptr, offs_m, offs_c, start_c, M, C, threshold, member0, R0, DROPOUT, ALIGNED,
        PRECISION, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    acc = _add_member(
        acc, h1_ptr, q1_ptr, seed_ptr, offs_m, offs_c, start_c, M, C, threshold, member1, R1, DROPOUT, ALIGNED,
        PRECISION, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    acc = _add_member(
        acc, h2_ptr, q2_ptr, seed_ptr, offs_m, offs_c, start_c, M, C, threshold, member2, R2, DROPOUT, ALIGNED,
        PRECISION, BLOCK_C, BLOCK_R,
    )  # fmt: skip
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)
