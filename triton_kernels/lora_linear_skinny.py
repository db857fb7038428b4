"""The rank-R products of lora_linear: everything that is not the frozen GEMM.

All of them stream one large matrix once and are bound by its bytes, not by FLOPs, while R stays below about 100. Sums
are split over programs into fp32 partials that one later kernel adds in a fixed order: no atomics, the same bits every
run. Shapes: p (M, C) is x or dy; q (C, R) is Aᵀ or B; h (M, R) is xa or g. R is padded to BLOCK_R inside. Reads and
writes named below are the least each kernel can do, in elements where no unit is given.
"""

import triton
import triton.language as tl

from .philox import keep_mask

_UNSPECIALIZED = ["M", "member", "threshold"]


@triton.jit
def rank_offsets(offs_c, offs_r, C, R: tl.constexpr, RANK_FIRST: tl.constexpr):
    """Offsets into a contiguous rank-R matrix: lora_A lies (R, C), rank first; lora_B lies (C, R)."""
    if RANK_FIRST:
        return offs_r.to(tl.int64) * C + offs_c
    else:
        return offs_c.to(tl.int64) * R + offs_r


@triton.jit
def _add_rank_step(
    acc, h_rows, q_ptr, offs_c, offs_r, mask_m, C,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h = tl.load(h_rows + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
    q_ptrs = q_ptr + rank_offsets(offs_c[None, :], offs_r[:, None], C, R, RANK_FIRST)
    q = tl.load(q_ptrs, mask=(offs_c < C)[None, :] & (offs_r < R)[:, None], other=0.0)
    return tl.dot(h, q, acc, input_precision=PRECISION)


@triton.jit
def add_rank_product(
    acc, h_ptr, q_ptr, offs_m, offs_c, M, C,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + h q for one tile: h (M, R) and q contiguous, q rank first (lora_A) or last (lora_B).

    Ranks above 64 run as a loop: unrolled, their addresses would take the registers of the accumulator.
    """
    mask_m = (offs_m < M)[:, None]
    h_rows = h_ptr + offs_m[:, None].to(tl.int64) * R
    if R <= 64:
        for r in tl.static_range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            acc = _add_rank_step(acc, h_rows, q_ptr, offs_c, offs_r, mask_m, C, R, RANK_FIRST, PRECISION)
    else:
        for r in tl.range(0, R, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            acc = _add_rank_step(acc, h_rows, q_ptr, offs_c, offs_r, mask_m, C, R, RANK_FIRST, PRECISION)
    return acc


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lora_linear_project_kernel(
    p_ptr, q_ptr, h_ptr, seed_ptr,
    M, C, split_c, stride_pm, scale, threshold, member,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h (M, R) = scale · (keep∘p) q: xa of the forward and g of the backward.

    Program (i, s, j) sums columns s·split_c … (s+1)·split_c − 1 of row block i for rank block j into h + s·M·R: h is
    the result when one program covers C, else the fp32 partials (S, M, R).
    Reads M·C per rank block and R·C; writes M·R, or 4·S·M·R bytes when split. FLOPs: 2·M·C·R.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    if DROPOUT:
        seed = tl.load(seed_ptr)
    p_rows = p_ptr + offs_m[:, None] * stride_pm

    start = pid_s * split_c
    stop = tl.minimum(start + split_c, C)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for c in range(start, stop, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < stop
        p = tl.load(p_rows + offs_c[None, :], mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        q_ptrs = q_ptr + rank_offsets(offs_c[:, None], offs_r[None, :], C, R, RANK_FIRST)
        q = tl.load(q_ptrs, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            p = tl.where(keep_mask(seed, offs_m, c, C, threshold, member, BLOCK_C, ALIGNED), p, 0.0)
        acc = tl.dot(p, q, acc, input_precision=PRECISION)

    h_rows = h_ptr + (pid_s.to(tl.int64) * M + offs_m)[:, None] * R
    tl.store(h_rows + offs_r[None, :], (acc * scale).to(h_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lora_linear_outer_kernel(
    p_ptr, h_ptr, out_ptr, mask_ptr, seed_ptr,
    M, C, split_m, stride_pm, threshold, member,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[c, r] = Σ_m (keep∘p)[m, c] · h[m, r]: dB (C, R) from dy and xa, dA (R, C) from x and g.

    Program (i, s, j) sums rows s·split_m … (s+1)·split_m − 1 of column block i for rank block j into out + s·C·R, the
    result (where `mask` is True) when one program covers M, else the fp32 partials, which the reduction masks.
    Reads M·C per rank block and M·R; writes C·R, or 4·S·C·R bytes when split. FLOPs: 2·M·C·R.
    """
    pid_c = tl.program_id(0)
    pid_s = tl.program_id(1)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_c = offs_c < C
    mask_r = offs_r < R
    if DROPOUT:
        seed = tl.load(seed_ptr)

    start = pid_s * split_m
    stop = tl.minimum(start + split_m, M)
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in range(start, stop, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < stop
        p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_c[None, :]
        p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if DROPOUT:
            p = tl.where(keep_mask(seed, offs_m, pid_c * BLOCK_C, C, threshold, member, BLOCK_C, ALIGNED), p, 0.0)
        acc = tl.dot(tl.trans(p), h, acc, input_precision=PRECISION)

    offs_o = rank_offsets(offs_c[:, None], offs_r[None, :], C, R, RANK_FIRST)
    mask_o = mask_c[:, None] & mask_r[None, :]
    if HAS_MASK:
        acc = tl.where(tl.load(mask_ptr + offs_o, mask=mask_o, other=0) != 0, acc, 0.0)
    out = out_ptr + pid_s.to(tl.int64) * C * R
    tl.store(out + offs_o, acc.to(out_ptr.dtype.element_ty), mask=mask_o)


@triton.jit(do_not_specialize=["M"])
def _lora_linear_project_outer_kernel(
    dy_ptr, b_ptr, xa_ptr, g_ptr, part_ptr, position_ptr,
    M, N, features, split_n, stride_dym, scale,
    R: tl.constexpr, SELECTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """g (M, R) = scale · dy B and the row-block partials of dB (N, R) = dyᵀ xa, in one pass over dy (R <= BLOCK_R).

    Program (i, s) walks columns s·split_n … (s+1)·split_n − 1 of row block i; g is written as in the projection, dB's
    partials as fp32 (cdiv(M, BLOCK_M), features, R). Column n owns dB's row n, or with SELECTED row position[n], none
    where that is negative: single frozen columns share their sectors with trained ones, so dy is read whole.
    Reads M·N and M·R; writes M·R and 4·features·R·cdiv(M, BLOCK_M) bytes. FLOPs: 4·M·N·R.
    """
    pid_m = tl.program_id(0).to(tl.int64)
    pid_s = tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    mask_h = mask_m[:, None] & mask_r[None, :]
    xa = tl.load(xa_ptr + offs_m[:, None] * R + offs_r[None, :], mask=mask_h, other=0.0)
    dy_rows = dy_ptr + offs_m[:, None] * stride_dym

    start = pid_s * split_n
    stop = tl.minimum(start + split_n, N)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(start, stop, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < stop
        mask_q = mask_n[:, None] & mask_r[None, :]
        rows_n = offs_n[:, None].to(tl.int64)
        dy = tl.load(dy_rows + offs_n[None, :], mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        b = tl.load(b_ptr + rows_n * R + offs_r[None, :], mask=mask_q, other=0.0)
        acc = tl.dot(dy, b, acc, input_precision=PRECISION)
        part = tl.dot(tl.trans(dy), xa, input_precision=PRECISION)  # (BLOCK_N, BLOCK_R)
        if SELECTED:
            rows_n = tl.load(position_ptr + offs_n, mask=mask_n, other=-1)[:, None].to(tl.int64)
            mask_q = (rows_n >= 0) & mask_r[None, :]
        tl.store(part_ptr + (pid_m * features + rows_n) * R + offs_r[None, :], part, mask=mask_q)

    g_rows = g_ptr + (pid_s.to(tl.int64) * M + offs_m)[:, None] * R
    tl.store(g_rows + offs_r[None, :], (acc * scale).to(g_ptr.dtype.element_ty), mask=mask_h)


@triton.jit(do_not_specialize=["parts"])
def _lora_linear_reduce_kernel(
    part_ptr, out_ptr, mask_ptr, parts, size,
    HAS_MASK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_s part[s, i] where mask[i], else 0, for i < size; partials (parts, size) in fp32, in a fixed order.

    Reads 4·parts·size bytes, writes size.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offs_s = tl.arange(0, BLOCK_S)
    mask = offs < size
    acc = tl.zeros((BLOCK_S, BLOCK), dtype=tl.float32)
    for s in range(0, parts, BLOCK_S):
        rows = (s + offs_s).to(tl.int64)
        live = (rows < parts)[:, None] & mask[None, :]
        acc += tl.load(part_ptr + rows[:, None] * size + offs[None, :], mask=live, other=0.0)
    total = tl.sum(acc, axis=0)
    if HAS_MASK:
        total = tl.where(tl.load(mask_ptr + offs, mask=mask, other=0) != 0, total, 0.0)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def _lora_linear_accumulate_kernel(
    h_ptr, q_ptr, out_ptr, seed_ptr,
    M, C, threshold, member,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (M, C) += keep∘(h q) in place, h (M, R), q (R, C): plan addmm's y += xa Bᵀ and dx += keep∘(g A).

    Reads and writes M·C, reads M·R and R·C. FLOPs: 2·M·C·R.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid_m = (tl.program_id(0) // tiles_c).to(tl.int64)
    pid_c = tl.program_id(0) % tiles_c
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    mask_o = mask_m[:, None] & mask_c[None, :]
    out = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    old = tl.load(out, mask=mask_o, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    acc = add_rank_product(acc, h_ptr, q_ptr, offs_m, offs_c, M, C, R, RANK_FIRST, BLOCK_R, PRECISION)
    if DROPOUT:
        keep = keep_mask(tl.load(seed_ptr), offs_m, pid_c * BLOCK_C, C, threshold, member, BLOCK_C, ALIGNED)
        acc = tl.where(keep, acc, 0.0)
    tl.store(out, (old.to(tl.float32) + acc).to(out_ptr.dtype.element_ty), mask=mask_o)
