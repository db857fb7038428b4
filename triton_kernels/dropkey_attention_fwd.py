"""dropkey_attention's forward kernels, and what its backward shares with them: the key lists and the masked logits.

A column or span pattern drops whole keys of a (batch, query head). The kernels then walk a list of the kept keys, in
order, and fetch rows of k and v through it: dropped keys cost nothing. The element pattern and p = 0 walk every key.
Shapes: q, o (B, H, Sq, D | Dv), k, v (B, Hkv, Sk, D | Dv), lse (B, H, Sq). Query head h reads key head h // group.
"""

import triton
import triton.language as tl

from .philox import keep_mask

_PURPOSE_DROPKEY = tl.constexpr(1)
LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Lengths, and what depends on them, vary from batch to batch: no variant of their own for 1 or multiples of 16.
UNSPECIALIZED = ["H", "group", "Sq", "Sk", "threshold", "length"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dropkey_attention_index_kernel(
    index_ptr, rank_ptr, seed_ptr,
    Sk, threshold, length,
    SPAN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key list of one (batch, query head) per program: index (B·H, Sk) and rank (B·H, Sk + 1), both int32.

    rank[n] counts the kept keys before key n, so rank[Sk] is how many are kept. index holds the kept keys in order, and
    behind them the dropped ones, from the back: a permutation, through which every row of a gradient is written once.
    SPAN drops `length` keys from a start that word 0 of one Philox call gives, else every key has its own decision.
    """
    pid = tl.program_id(0).to(tl.int64)
    seed = tl.load(seed_ptr)
    index = index_ptr + pid * Sk
    rank = rank_ptr + pid * (Sk + 1)
    if SPAN:
        low = pid.to(tl.uint32)
        w0, _, _, _ = tl.philox(seed, low, (pid >> 32).to(tl.uint32), low * 0 + _PURPOSE_DROPKEY, low * 0, n_rounds=7)
        first = (w0 % (Sk - length + 1).to(tl.uint32)).to(tl.int32)
    count = 0
    for start in range(0, Sk, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < Sk
        if SPAN:
            keep = (offs < first) | (offs >= first + length)
        else:
            row = pid + tl.arange(0, 1)
            keep = tl.reshape(keep_mask(seed, row, start, Sk, threshold, 0, BLOCK, ALIGNED, _PURPOSE_DROPKEY), (BLOCK,))
        kept = (keep & inside).to(tl.int32)
        before = count + tl.cumsum(kept, 0) - kept
        tl.store(rank + offs, before, mask=inside)
        tl.store(index + tl.where(keep, before, Sk - 1 - (offs - before)), offs, mask=inside)
        count += tl.sum(kept, 0)
    tl.store(rank + Sk, count)


@triton.jit
def load_rows(ptr, rows, stride, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(rows), BLOCK_D) of a matrix with unit column stride; 0 where mask is False and from column D on."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    if D == BLOCK_D:
        return tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=mask[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, tile, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of load_rows, rounded to the matrix's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask[:, None] & (offs_d < D)[None, :])


@triton.jit
def load_keys(index_ptr, offs_j, live, INDEXED: tl.constexpr):
    """The keys that list entries offs_j stand for."""
    if INDEXED:
        return tl.load(index_ptr + offs_j, mask=live, other=0)
    else:
        return offs_j


@triton.jit
def masked_logits(
    s, rows, keys, live, mask_ptr, stride_mm, stride_mn, seed, first_row, start_n, Sq, Sk, threshold, scale,
    FACTOR: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_WIDE: tl.constexpr,
    MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, EDGE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """FACTOR·(scale·s + mask), −inf where a logit is masked or dropped; with EDGE also where not live or in the future.

    s, keys and live are (M, N) tiles or broadcast to one, (N, M) if TRANSPOSED; rows likewise. MASK: none, bool or
    additive, whose entries up to MASK_FLOOR count as masked; MASK_ROWS: it has rows, not one for all queries;
    MASK_WIDE: offsets in one head of it take 64 bits. The drop bits of an element pattern start at logit
    (first_row, start_n) of the (B·H·Sq, Sk) matrix.
    """
    z = s * (scale * FACTOR)
    if MASK != "none":
        if MASK_WIDE:
            rows_w, keys_w = rows.to(tl.int64), keys.to(tl.int64)
        else:
            rows_w, keys_w = rows, keys
        if MASK_ROWS:
            value = tl.load(mask_ptr + (rows_w * stride_mm + keys_w * stride_mn), mask=live & (rows < Sq), other=0)
        else:
            value = tl.load(mask_ptr + keys_w * stride_mn, mask=live, other=0)
        if MASK == "bool":
            z = tl.where(value != 0, z, float("-inf"))
        else:
            value = value.to(tl.float32)
            z = tl.where(value <= MASK_FLOOR, float("-inf"), z + value * FACTOR)
    if ELEMENT:
        offs_e = first_row + tl.arange(0, BLOCK_M)
        keep = keep_mask(seed, offs_e, start_n, Sk, threshold, 0, BLOCK_N, ALIGNED, _PURPOSE_DROPKEY)
        z = tl.where(tl.trans(keep) if TRANSPOSED else keep, z, float("-inf"))
    if EDGE:
        z = tl.where(live & (keys <= rows) if CAUSAL else live, z, float("-inf"))
    return z


@triton.jit
def exponential(x, BASE_2: tl.constexpr):
    """2^x or e^x. tl.exp keeps denormals, which takes two products and a comparison more than tl.exp2 per value."""
    return tl.exp2(x) if BASE_2 else tl.exp(x)


@triton.jit
def key_frontier(
    rank_ptr, start_m, Sq, Sk, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(full, stop, count): list entries before `full`, a multiple of BLOCK_N, are seen by all of the block's queries,
    those from `stop` on by none; count entries are kept."""
    full, stop, count = Sk, Sk, Sk
    if CAUSAL:
        full = tl.minimum(start_m + 1, Sk)
        stop = tl.minimum(tl.minimum(start_m + BLOCK_M, Sq), Sk)
    if INDEXED:
        count = tl.load(rank_ptr + Sk)
        full = tl.load(rank_ptr + full)
        stop = tl.load(rank_ptr + stop)
    return full // BLOCK_N * BLOCK_N, stop, count


@triton.jit
def _attend(
    acc, total, top, q, rows, start, stop, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr, stride_mm,
    stride_mn, seed, first_row, Sq, Sk, threshold, scale,
    D: tl.constexpr, DV: tl.constexpr, INDEXED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr, EDGE: tl.constexpr, BASE_2: tl.constexpr, RISING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The online softmax over list entries start … stop − 1: acc and total relative to e^top, top the row maximum.

    BASE_2: logits, and top, in units of log 2, which saves a product per logit and costs a bit of their precision.
    RISING: scale > 0. The maximum is then taken before the product with it, which leaves one multiply-add per logit.
    """
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_j = start_n + tl.arange(0, BLOCK_N)
        live = offs_j < count
        keys = load_keys(index_ptr, offs_j, live, INDEXED)
        k = load_rows(k_ptr, keys, stride_kn, live, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z = masked_logits(
            s, rows[:, None], keys[None, :], live[None, :], mask_ptr, stride_mm, stride_mn, seed, first_row, start_n,
            Sq, Sk, threshold, scale, LOG2_E if BASE_2 else 1.0, MASK, MASK_ROWS, MASK_WIDE, MASK_FLOOR, CAUSAL,
            ELEMENT, ALIGNED, EDGE, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if RISING and MASK == "none" and not ELEMENT and not EDGE:
            above = tl.maximum(top, tl.max(s, 1) * (scale * (LOG2_E if BASE_2 else 1.0)))
        else:
            above = tl.maximum(top, tl.max(z, 1))
        base = tl.where(above == float("-inf"), 0.0, above)  # nothing seen yet: exp(−inf − 0) is 0, not NaN
        p = exponential(z - base[:, None], BASE_2)
        shrink = exponential(top - base, BASE_2)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, keys, stride_vn, live, DV, BLOCK_DV)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = above
    return acc, total, top


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dropkey_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, index_ptr, rank_ptr, seed_ptr, mask_ptr,
    H, group, Sq, Sk, threshold, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_mb, stride_mh, stride_mm, stride_mn,
    D: tl.constexpr, DV: tl.constexpr, OUT_DV: tl.constexpr, INDEXED: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BASE_2: tl.constexpr, RISING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """o and lse of BLOCK_M queries of one (batch, query head) per program, by FlashAttention-2's online softmax.

    Reads q, writes o and lse once; reads the kept rows of k and v once per block of queries. FLOPs per query and kept
    key: 2·(D + Dv). Source: Dao, arXiv 2307.08691, algorithm 1.
    """
    tiles_m = tl.cdiv(Sq, BLOCK_M)
    pid_bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    pid_m = tl.program_id(0) % tiles_m
    if CAUSAL:  # the longest rows first
        pid_m = tiles_m - 1 - pid_m
    b, h = pid_bh // H, pid_bh % H
    start_m = pid_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Sq
    if ELEMENT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, mask_m, D, BLOCK_D)
    k_ptr += b * stride_kb + h // group * stride_kh
    v_ptr += b * stride_vb + h // group * stride_vh
    if MASK != "none":
        mask_ptr += b * stride_mb + h * stride_mh
    if INDEXED:
        index_ptr += pid_bh * Sk
        rank_ptr += pid_bh * (Sk + 1)
    full, stop, count = key_frontier(rank_ptr, start_m, Sq, Sk, INDEXED, CAUSAL, BLOCK_M, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    acc, total, top = _attend(
        acc, total, top, q, offs_m, 0, full, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr, stride_mm,
        stride_mn, seed, pid_bh * Sq + start_m, Sq, Sk, threshold, scale, D, DV, INDEXED, MASK, MASK_ROWS, MASK_WIDE,
        MASK_FLOOR, CAUSAL, ELEMENT, ALIGNED, False, BASE_2, RISING, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, offs_m, full, stop, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr,
        stride_mm, stride_mn, seed, pid_bh * Sq + start_m, Sq, Sk, threshold, scale, D, DV, INDEXED, MASK, MASK_ROWS,
        MASK_WIDE, MASK_FLOOR, CAUSAL, ELEMENT, ALIGNED, True, BASE_2, RISING, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D,
        BLOCK_DV,
    )  # fmt: skip

    some = total > 0
    total = tl.where(some, total, 1.0)
    lse = top * _LN_2 + tl.log(total) if BASE_2 else top + tl.log(total)
    lse = tl.where(some, lse, float("-inf"))
    tl.store(lse_ptr + pid_bh * Sq + offs_m, lse, mask=mask_m)
    store_rows(
        o_ptr + b * stride_ob + h * stride_oh, offs_m, stride_om, acc / total[:, None], mask_m, OUT_DV, BLOCK_DV
    )  # fmt: skip
