"""The fused GEMMs on tensor descriptors (TMA): persistent kernels for sm_90 and later, bf16 and fp16.

Same mathematics, names, FLOPs and bytes as lora_linear_gemm.py. Descriptors are made on the host: device-side ones need
a scratch allocator (triton.set_allocator), which belongs to the application and is not seen by autograd's threads. Rows
and base addresses of what a descriptor covers are 16-byte aligned. Warp specialisation is off: with host descriptors it
does not compile at BLOCK_M = 128 (triton#11587).
"""

import triton
import triton.language as tl

from .lora_linear_gemm import tile_of
from .lora_linear_skinny import add_rank_product, rank_offsets
from .philox import keep_mask


@triton.jit
def _store_tile(desc, acc, row, col, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, SUBTILES: tl.constexpr):
    """Store acc through `desc`, whose block is (BLOCK_M, BLOCK_C / SUBTILES); rows and columns outside are clipped."""
    if SUBTILES == 1:
        desc.store([row, col], acc.to(desc.dtype))
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_C // 2)), (0, 2, 1)))
        desc.store([row, col], left.to(desc.dtype))
        desc.store([row, col + BLOCK_C // 2], right.to(desc.dtype))


@triton.jit(do_not_specialize=["M", "member", "threshold"])
def _lora_linear_gemm_tma_kernel(
    p_desc, v_desc, out_desc, h_ptr, q_ptr, bias_ptr, seed_ptr,
    M, C, D, threshold, member,
    R: tl.constexpr, RANK_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    V_TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = keep∘(h q) + p v + bias. V_TRANSPOSED: v_desc covers (C, D), as the weight lies in the forward.

    The rank-R product comes last, so that a flattened loop hands the accumulator from step to step in the tensor cores;
    under dropout it must come first, because the mask applies to it alone.
    """
    tl.assume(D > 0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_c = tl.cdiv(C, BLOCK_C)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_c, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_c = tile_of(index, tiles_m, tiles_c, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_c * BLOCK_C
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_c = col + tl.arange(0, BLOCK_C)
        acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
        if DROPOUT:
            # The mask before the product: the random words and the accumulator then never need registers together.
            keep = keep_mask(tl.load(seed_ptr), offs_m, col, C, threshold, member, BLOCK_C, ALIGNED)
            acc = add_rank_product(acc, h_ptr, q_ptr, offs_m, offs_c, M, C, R, RANK_FIRST, BLOCK_R, "ieee")
            acc = tl.where(keep, acc, 0.0)
        for d in range(0, D, BLOCK_D):
            p = p_desc.load([row, d])
            if V_TRANSPOSED:
                v = tl.trans(v_desc.load([col, d]))
            else:
                v = v_desc.load([d, col])
            acc = tl.dot(p, v, acc)
        if not DROPOUT:
            acc = add_rank_product(acc, h_ptr, q_ptr, offs_m, offs_c, M, C, R, RANK_FIRST, BLOCK_R, "ieee")
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)[None, :]
        _store_tile(out_desc, acc, row, col, BLOCK_M, BLOCK_C, SUBTILES)


@triton.jit(do_not_specialize=["M", "member", "threshold"])
def _lora_linear_onepass_tma_kernel(
    x_desc, w_desc, a_desc, y_desc, b_ptr, bias_ptr, xa_ptr, seed_ptr,
    M, N, K, scale, threshold, member,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, W_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias + xa Bᵀ and xa = scale · (keep∘x) Aᵀ from one stream of x through shared memory (R <= BLOCK_R).

    W_TRANSPOSED: w_desc covers (N, K), as the weight of nn.Linear lies; a_desc covers (R, K).
    """
    tl.assume(K > 0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = tile_of(index, tiles_m, tiles_n, GROUP_M)
        row = pid_m * BLOCK_M
        col = pid_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = col + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        acc_xa = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            if W_TRANSPOSED:
                w = tl.trans(w_desc.load([col, k]))
            else:
                w = w_desc.load([k, col])
            a = tl.trans(a_desc.load([0, k]))
            acc = tl.dot(x, w, acc)
            if DROPOUT:
                x = tl.where(keep_mask(tl.load(seed_ptr), offs_m, k, K, threshold, member, BLOCK_K, ALIGNED), x, 0.0)
            acc_xa = tl.dot(x, a, acc_xa)
        xa = (acc_xa * scale).to(xa_ptr.dtype.element_ty)
        if pid_n == 0:
            xa_rows = xa_ptr + offs_m[:, None].to(tl.int64) * R
            tl.store(xa_rows + offs_r[None, :], xa, mask=(offs_m < M)[:, None] & mask_r[None, :])
        b_ptrs = b_ptr + rank_offsets(offs_n[None, :], offs_r[:, None], N, R, False)
        b = tl.load(b_ptrs, mask=mask_n[None, :] & mask_r[:, None], other=0.0)
        acc = tl.dot(xa, b, acc)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        _store_tile(y_desc, acc, row, col, BLOCK_M, BLOCK_N, SUBTILES)
