"""dropkey_attention's backward kernels. p is recomputed from lse; drop decisions come from the key lists or the seed.

    delta = rowsum(do∘o)    dz = p∘(do vᵀ − delta)    dq = scale·dz k    dk = scale·dzᵀ q    dv = pᵀ do    dmask = dz

No atomics: every output element is written by one program, sums over programs go through fp32 partials. Shapes as in
the forward's file; sums in fp32. Source: Dao, arXiv 2307.08691, algorithm 2.
"""

import triton
import triton.language as tl

from .dropkey_attention_fwd import (
    LOG2_E,
    UNSPECIALIZED,
    exponential,
    key_frontier,
    load_keys,
    load_rows,
    masked_logits,
    store_rows,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dropkey_attention_delta_kernel(
    do_ptr, o_ptr, lse_ptr, delta_ptr, base_ptr,
    H, Sq, rows, stride_dob, stride_doh, stride_dom, stride_ob, stride_oh, stride_om,
    DV: tl.constexpr, BASE_2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do∘o) and base = lse, fp32 (B, H, rows): what the other kernels need to know of a query.

    rows is Sq padded to whole blocks of theirs, which load without a mask. base is in units of log 2 if BASE_2, and
    +inf, which makes p 0 whatever z is, for rows that see nothing or lie behind Sq. Reads do, o and lse once.
    """
    tiles_m = tl.cdiv(rows, BLOCK_M)
    pid_bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    offs_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Sq
    do = load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_m, stride_dom, mask_m, DV, BLOCK_DV)
    o = load_rows(o_ptr + b * stride_ob + h * stride_oh, offs_m, stride_om, mask_m, DV, BLOCK_DV)
    lse = tl.load(lse_ptr + pid_bh * Sq + offs_m, mask=mask_m, other=float("inf"))
    base = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E if BASE_2 else lse)
    tl.store(delta_ptr + pid_bh * rows + offs_m, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1))
    tl.store(base_ptr + pid_bh * rows + offs_m, base)


@triton.jit
def _accumulate_dq(
    dq, q, do, base, delta, rows, start, stop, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr,
    stride_mm, stride_mn, seed, first_row, Sq, Sk, threshold, scale,
    D: tl.constexpr, DV: tl.constexpr, INDEXED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr, EDGE: tl.constexpr, BASE_2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq + dz k over list entries start … stop − 1."""
    for start_n in tl.range(start, stop, BLOCK_N):
        offs_j = start_n + tl.arange(0, BLOCK_N)
        live = offs_j < count
        keys = load_keys(index_ptr, offs_j, live, INDEXED)
        k = load_rows(k_ptr, keys, stride_kn, live, D, BLOCK_D)
        v = load_rows(v_ptr, keys, stride_vn, live, DV, BLOCK_DV)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z = masked_logits(
            s, rows[:, None], keys[None, :], live[None, :], mask_ptr, stride_mm, stride_mn, seed, first_row, start_n,
            Sq, Sk, threshold, scale, LOG2_E if BASE_2 else 1.0, MASK, MASK_ROWS, MASK_WIDE, MASK_FLOOR, CAUSAL,
            ELEMENT, ALIGNED, EDGE, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dz = exponential(z - base[:, None], BASE_2) * (dp - delta[:, None])
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dropkey_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, delta_ptr, dq_ptr, index_ptr, rank_ptr, seed_ptr, mask_ptr,
    H, group, Sq, Sk, rows, threshold, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_dqb, stride_dqh, stride_dqm, stride_mb, stride_mh, stride_mm, stride_mn,
    D: tl.constexpr, DV: tl.constexpr, OUT_D: tl.constexpr, INDEXED: tl.constexpr, MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr, MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, BASE_2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries of one (batch, query head) per program, over the kept keys.

    Reads q, do, base and delta, writes dq once; reads the kept rows of k and v once per block of queries. FLOPs per
    query and kept key: 4·D + 2·Dv.
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
    do = load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_m, stride_dom, mask_m, DV, BLOCK_DV)
    base = tl.load(base_ptr + pid_bh * rows + offs_m)
    delta = tl.load(delta_ptr + pid_bh * rows + offs_m)
    k_ptr += b * stride_kb + h // group * stride_kh
    v_ptr += b * stride_vb + h // group * stride_vh
    if MASK != "none":
        mask_ptr += b * stride_mb + h * stride_mh
    if INDEXED:
        index_ptr += pid_bh * Sk
        rank_ptr += pid_bh * (Sk + 1)
    full, stop, count = key_frontier(rank_ptr, start_m, Sq, Sk, INDEXED, CAUSAL, BLOCK_M, BLOCK_N)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    dq = _accumulate_dq(
        dq, q, do, base, delta, offs_m, 0, full, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr,
        stride_mm, stride_mn, seed, pid_bh * Sq + start_m, Sq, Sk, threshold, scale, D, DV, INDEXED, MASK, MASK_ROWS,
        MASK_WIDE, MASK_FLOOR, CAUSAL, ELEMENT, ALIGNED, False, BASE_2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, base, delta, offs_m, full, stop, count, k_ptr, v_ptr, stride_kn, stride_vn, index_ptr, mask_ptr,
        stride_mm, stride_mn, seed, pid_bh * Sq + start_m, Sq, Sk, threshold, scale, D, DV, INDEXED, MASK, MASK_ROWS,
        MASK_WIDE, MASK_FLOOR, CAUSAL, ELEMENT, ALIGNED, True, BASE_2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    store_rows(dq_ptr + b * stride_dqb + h * stride_dqh, offs_m, stride_dqm, dq * scale, mask_m, OUT_D, BLOCK_D)


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, keys, live, first, steps, b, g, heads, q_ptr, do_ptr, base_ptr, delta_ptr, stride_qb, stride_qh,
    stride_qm, stride_dob, stride_doh, stride_dom, mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn, seed, start_n,
    H, Sq, Sk, rows, threshold, scale,
    D: tl.constexpr, DV: tl.constexpr, GROUPED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr,
    MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
    EDGE: tl.constexpr, BASE_2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk + dzᵀ q and dv + pᵀ do over `steps` blocks of queries from row `first` on, of each of `heads` heads.

    EDGE: some of these queries do not see all of the keys. Tiles are transposed, (keys, queries). One loop over heads
    and queries: two nested ones spill.
    """
    for step in tl.range(0, heads * steps if GROUPED else steps):
        if GROUPED:
            h = g * heads + step // steps
            start_m = first + step % steps * BLOCK_M
        else:
            h = g
            start_m = first + step * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < Sq
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, mask_m, D, BLOCK_D)
        do = load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_m, stride_dom, mask_m, DV, BLOCK_DV)
        base = tl.load(base_ptr + (b * H + h) * rows + offs_m)
        delta = tl.load(delta_ptr + (b * H + h) * rows + offs_m)
        mask_head = mask_ptr
        if MASK != "none":
            mask_head = mask_ptr + b * stride_mb + h * stride_mh
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        z = masked_logits(
            s, offs_m[None, :], keys[:, None], live[:, None], mask_head, stride_mm, stride_mn, seed,
            (b * H + h) * Sq + start_m, start_n, Sq, Sk, threshold, scale, LOG2_E if BASE_2 else 1.0, MASK, MASK_ROWS,
            MASK_WIDE, MASK_FLOOR, EDGE, ELEMENT, ALIGNED, EDGE, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        p = exponential(z - base[None, :], BASE_2)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dz = p * (dp - delta[None, :])
        dk = tl.dot(dz.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "heads"])
def _dropkey_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, delta_ptr, dk_ptr, dv_ptr, index_ptr, rank_ptr, seed_ptr, mask_ptr,
    H, group, heads, Sq, Sk, rows, threshold, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mb, stride_mh, stride_mm, stride_mn,
    D: tl.constexpr, DV: tl.constexpr, OUT_D: tl.constexpr, OUT_DV: tl.constexpr, GROUPED: tl.constexpr,
    INDEXED: tl.constexpr, MASK: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_WIDE: tl.constexpr,
    MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr,
    BASE_2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N list entries of one batch and `heads` query heads per program, H / heads programs a batch.

    heads is group, and dk, dv are the results, where no key list differs from head to head; else it is 1, and dk, dv
    have a row of heads for every query head (partials for the caller to add where group > 1). GROUPED: heads > 1. Rows
    of dropped keys, the last of the list, are written as zeros.
    Reads k and v, writes dk and dv once; reads q, do, base and delta once per block of keys. FLOPs per query and kept
    key: 4·(D + Dv).
    """
    tiles_n = tl.cdiv(Sk, BLOCK_N)
    pid_bg = (tl.program_id(0) // tiles_n).to(tl.int64)
    b, g = pid_bg // (H // heads), pid_bg % (H // heads)
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_j = start_n + tl.arange(0, BLOCK_N)
    inside = offs_j < Sk
    count = Sk
    if INDEXED:
        index_ptr += pid_bg * Sk
        count = tl.load(rank_ptr + pid_bg * (Sk + 1) + Sk)
    keys = load_keys(index_ptr, offs_j, inside, INDEXED)
    live = offs_j < count
    kv = g * heads // group
    k = load_rows(k_ptr + b * stride_kb + kv * stride_kh, keys, stride_kn, live, D, BLOCK_D)
    v = load_rows(v_ptr + b * stride_vb + kv * stride_vh, keys, stride_vn, live, DV, BLOCK_DV)
    if ELEMENT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0
    steps = tl.where(start_n < count, tl.cdiv(Sq, BLOCK_M), 0)

    # A key that is not live has k = 0 and a p without meaning, which stays in its own row.
    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_DV), dtype=tl.float32)
    first = 0
    if CAUSAL:  # of the blocks of queries `skipped` see none of these keys, then `mixed` see some
        skipped = tl.minimum(tl.min(tl.where(live, keys, Sq)) // BLOCK_M, steps)
        first = skipped * BLOCK_M
        steps -= skipped
        # fp32 masks every block: its products, on the FMA units, dwarf the masks and spill when written out twice.
        if BASE_2:
            mixed = tl.minimum(tl.cdiv(tl.max(tl.where(live, keys, 0)), BLOCK_M) - skipped, steps)
            dk, dv = _accumulate_dkv(
                dk, dv, k, v, keys, live, first, mixed, b, g, heads, q_ptr, do_ptr, base_ptr, delta_ptr, stride_qb,
                stride_qh, stride_qm, stride_dob, stride_doh, stride_dom, mask_ptr, stride_mb, stride_mh, stride_mm,
                stride_mn, seed, start_n, H, Sq, Sk, rows, threshold, scale, D, DV, GROUPED, MASK, MASK_ROWS,
                MASK_WIDE, MASK_FLOOR, ELEMENT, ALIGNED, True, BASE_2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            first += mixed * BLOCK_M
            steps -= mixed
    dk, dv = _accumulate_dkv(
        dk, dv, k, v, keys, live, first, steps, b, g, heads, q_ptr, do_ptr, base_ptr, delta_ptr, stride_qb, stride_qh,
        stride_qm, stride_dob, stride_doh, stride_dom, mask_ptr, stride_mb, stride_mh, stride_mm, stride_mn, seed,
        start_n, H, Sq, Sk, rows, threshold, scale, D, DV, GROUPED, MASK, MASK_ROWS, MASK_WIDE, MASK_FLOOR, ELEMENT,
        ALIGNED, CAUSAL and not BASE_2, BASE_2, PRECISION, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
    )  # fmt: skip

    dk = tl.where(live[:, None], dk * scale, 0.0)
    dv = tl.where(live[:, None], dv, 0.0)
    store_rows(dk_ptr + b * stride_dkb + g * stride_dkh, keys, stride_dkn, dk, inside, OUT_D, BLOCK_D)
    store_rows(dv_ptr + b * stride_dvb + g * stride_dvh, keys, stride_dvn, dv, inside, OUT_DV, BLOCK_DV)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "tiles_h", "tiles_m", "tiles_n", "reps_h", "reps_m", "reps_n", "items"])
def _dropkey_attention_bwd_mask_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, base_ptr, delta_ptr, part_ptr, rank_ptr, seed_ptr, mask_ptr,
    H, group, Sq, Sk, rows, threshold, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_dob, stride_doh, stride_dom, stride_mb, stride_mh, stride_mm, stride_mn,
    tiles_h, tiles_m, tiles_n, reps_h, reps_m, reps_n, items, split,
    D: tl.constexpr, DV: tl.constexpr, INDEXED: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_KEYS: tl.constexpr,
    MASK_WIDE: tl.constexpr, MASK_FLOOR: tl.constexpr, CAUSAL: tl.constexpr, ELEMENT: tl.constexpr,
    ALIGNED: tl.constexpr, BASE_2: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dmask in the mask's own shape: dz summed over what the mask broadcasts.

    Program (i, s) owns tile i of the mask: of its tiles_n tiles of keys, tiles_m of queries, tiles_h heads and batches.
    Where the mask broadcasts it has one tile and reps_* steps; items steps in all, of which the program adds numbers
    s·split … (s+1)·split − 1 into out + s·(size of the mask), the result where one program covers all, else fp32
    partials. Keys are walked in place. FLOPs per logit: 2·(D + Dv).
    """
    pid = tl.program_id(0)
    pid_s = tl.program_id(1)
    tile_n, pid = pid % tiles_n, pid // tiles_n
    tile_m, pid = pid % tiles_m, pid // tiles_m
    tile_h, tile_b = pid % tiles_h, pid // tiles_h
    if ELEMENT:
        seed = tl.load(seed_ptr)
    else:
        seed = 0
    start = pid_s * split
    stop = tl.minimum(start + split, items)
    if CAUSAL and MASK_ROWS and MASK_KEYS:  # a tile wholly in the future
        stop = tl.where(tile_n * BLOCK_N < (tile_m + 1) * BLOCK_M, stop, start)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for item in range(start, stop):
        start_n = (tile_n + item % reps_n) * BLOCK_N
        start_m = (tile_m + item // reps_n % reps_m) * BLOCK_M
        h = (tile_h + item // reps_n // reps_m % reps_h).to(tl.int64)
        b = (tile_b + item // reps_n // reps_m // reps_h).to(tl.int64)
        bh = b * H + h
        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask_m = offs_m < Sq
        live = offs_n < Sk
        if INDEXED:
            rank = rank_ptr + bh * (Sk + 1) + offs_n
            live = live & (tl.load(rank, mask=live, other=0) != tl.load(rank + 1, mask=live, other=0))
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, stride_qm, mask_m, D, BLOCK_D)
        k = load_rows(k_ptr + b * stride_kb + h // group * stride_kh, offs_n, stride_kn, live, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        z = masked_logits(
            s, offs_m[:, None], offs_n[None, :], live[None, :], mask_ptr + b * stride_mb + h * stride_mh, stride_mm,
            stride_mn, seed, bh * Sq + start_m, start_n, Sq, Sk, threshold, scale, LOG2_E if BASE_2 else 1.0,
            "additive", MASK_ROWS, MASK_WIDE, MASK_FLOOR, CAUSAL, ELEMENT, ALIGNED, True, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        p = exponential(z - tl.load(base_ptr + bh * rows + offs_m)[:, None], BASE_2)
        do = load_rows(do_ptr + b * stride_dob + h * stride_doh, offs_m, stride_dom, mask_m, DV, BLOCK_DV)
        v = load_rows(v_ptr + b * stride_vb + h // group * stride_vh, offs_n, stride_vn, live, DV, BLOCK_DV)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        acc += p * (dp - tl.load(delta_ptr + bh * rows + offs_m)[:, None])

    queries, size_m = tl.arange(0, 1), 1
    if MASK_ROWS:
        queries, size_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), Sq
    else:
        acc = tl.sum(acc, 0, keep_dims=True)
    keys, size_n = tl.arange(0, 1), 1
    if MASK_KEYS:
        keys, size_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), Sk
    else:
        acc = tl.sum(acc, 1, keep_dims=True)
    tiles_b = tl.num_programs(0) // (tiles_h * tiles_m * tiles_n)
    head = (pid_s.to(tl.int64) * tiles_b + tile_b) * tiles_h + tile_h
    out = part_ptr + (head * size_m + queries)[:, None] * size_n + keys[None, :]
    tl.store(out, acc.to(part_ptr.dtype.element_ty), mask=(queries < size_m)[:, None] & (keys < size_n)[None, :])
