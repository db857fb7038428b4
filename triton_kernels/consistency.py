"""consistency on Triton: launchers with the semantics of the operator's raw ops.

P = softmax(logits), Q = softmax(other), d = log P − log Q:

    kl = ½(KL(P‖Q) + KL(Q‖P))          js = KL(P‖Q)
    dlogits = α P∘(d − KL(P‖Q)) + β (P − Q)          dother = β Q∘(−d − KL(Q‖P)) + α (Q − P)

Forward reads both logits once, a program for each row; backward reads them once more and forms P and Q again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, as_bytes, check_operand, device_of, per_shape, with_unit_stride
from .tuning import ceil_div, next_power_of_two

_STATS = 6
_MOST_FORWARD, _MOST_BACKWARD = 4096, 2048  # entries of one block


@triton.jit
def _finite(x):
    return x - x == 0.0


@triton.jit
def _consistency_fwd_kernel(
    a_ptr, b_ptr, mask_ptr, rows_ptr, stats_ptr, T, V, stride_ab, stride_at, stride_bb, stride_bt,
    SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rows and stats (max, 1/Σexp(a − max), of b likewise, KL(P‖Q), KL(Q‖P)) of one row.

    sum_a = Σ exp(x), dot_a = Σ exp(x)·(x − y − shift), x = a − ref_a, y = b − ref_b, over the blocks so far; dot_b with
    exp(y). shift is the log ratio of the sums: where the distributions are close, nothing large cancels in the dots.
    """
    row = tl.program_id(0).to(tl.int64)
    kept = row >= 0
    if HAS_MASK:
        kept = tl.load(mask_ptr + row) != 0
    top_a, ref_a, sum_a, dot_a = -float("inf"), 0.0, 0.0, 0.0
    top_b, ref_b, sum_b, dot_b = -float("inf"), 0.0, 0.0, 0.0
    shift = 0.0
    a_ptr += row // T * stride_ab + row % T * stride_at
    b_ptr += row // T * stride_bb + row % T * stride_bt
    for start in range(0, tl.where(kept, V, 0), BLOCK_V):
        offs = start + tl.arange(0, BLOCK_V)
        a = tl.load(a_ptr + offs, mask=offs < V, other=-float("inf")).to(tl.float32)
        b = tl.load(b_ptr + offs, mask=offs < V, other=-float("inf")).to(tl.float32)
        top_a, top_b = tl.maximum(top_a, tl.max(a)), tl.maximum(top_b, tl.max(b))
        new_a, new_b = tl.where(top_a == -float("inf"), 0.0, top_a), tl.where(top_b == -float("inf"), 0.0, top_b)
        moved = (new_a - ref_a) - (new_b - ref_b)
        scale_a = tl.where(sum_a == 0.0, 0.0, tl.exp(ref_a - new_a))
        scale_b = tl.where(sum_b == 0.0, 0.0, tl.exp(ref_b - new_b))
        ref_a, ref_b = new_a, new_b
        x, y = a - ref_a, b - ref_b
        p, q = tl.exp(x), tl.exp(y)
        sum_a, dot_a = sum_a * scale_a, tl.where(scale_a == 0.0, 0.0, dot_a * scale_a)
        sum_b, dot_b = sum_b * scale_b, tl.where(scale_b == 0.0, 0.0, dot_b * scale_b)
        more_a, more_b = tl.sum(p), tl.sum(q)
        ratio = tl.log(sum_a + more_a) - tl.log(sum_b + more_b)
        ratio = tl.where(_finite(ratio), ratio, shift)
        dot_a -= (ratio - shift + moved) * sum_a
        dot_b -= (ratio - shift + moved) * sum_b
        shift = ratio
        d = x - y - shift
        dot_a += tl.sum(tl.where(p == 0.0, 0.0, p * d))
        dot_b += tl.sum(tl.where(q == 0.0, 0.0, q * d))
        sum_a += more_a
        sum_b += more_b
    # A row left out divides 1 by 1.
    sum_a, sum_b = tl.where(kept, sum_a, 1.0), tl.where(kept, sum_b, 1.0)
    rest = tl.log(sum_a) - tl.log(sum_b) - shift
    kl_ab = dot_a / sum_a - rest
    kl_ba = rest - dot_b / sum_b
    if SYMMETRIC:
        tl.store(rows_ptr + row, (kl_ab + kl_ba) * 0.5)
    else:
        tl.store(rows_ptr + row, kl_ab)
    stats_ptr += row * 6
    tl.store(stats_ptr, tl.where(kept, top_a, 0.0))
    tl.store(stats_ptr + 1, tl.where(kept, 1.0 / sum_a, 0.0))
    tl.store(stats_ptr + 2, tl.where(kept, top_b, 0.0))
    tl.store(stats_ptr + 3, tl.where(kept, 1.0 / sum_b, 0.0))
    tl.store(stats_ptr + 4, kl_ab)
    tl.store(stats_ptr + 5, kl_ba)


@triton.jit
def _consistency_bwd_kernel(
    drows_ptr, a_ptr, b_ptr, stats_ptr, mask_ptr, da_ptr, db_ptr, T, V, stride_ab, stride_at, stride_bb, stride_bt,
    stride_dab, stride_dat, stride_dbb, stride_dbt, SYMMETRIC: tl.constexpr, HAS_MASK: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block of one row of dlogits and dother, which may lie where logits and other do."""
    blocks = tl.cdiv(V, BLOCK_V)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    offs = pid % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    b_index, t_index = row // T, row % T
    inside = offs < V
    kept = inside
    if HAS_MASK:
        kept = offs < V * tl.load(mask_ptr + row).to(tl.int32)  # a row left out has no entry
    a = tl.load(a_ptr + b_index * stride_ab + t_index * stride_at + offs, mask=kept, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + b_index * stride_bb + t_index * stride_bt + offs, mask=kept, other=0.0).to(tl.float32)
    stats_ptr += row * 6
    over_a, over_b = tl.load(stats_ptr + 1), tl.load(stats_ptr + 3)
    kl_ab, kl_ba = tl.load(stats_ptr + 4), tl.load(stats_ptr + 5)
    drow = tl.load(drows_ptr + row)
    x, y = a - tl.load(stats_ptr), b - tl.load(stats_ptr + 2)
    p, q = tl.exp(x) * over_a, tl.exp(y) * over_b
    d = x - y - (tl.log(over_b) - tl.log(over_a))
    if SYMMETRIC:
        da = 0.5 * (tl.where(p == 0.0, 0.0, p * (d - kl_ab)) + (p - q))
        db = 0.5 * (tl.where(q == 0.0, 0.0, q * (-d - kl_ba)) + (q - p))
        finite = _finite(kl_ab + kl_ba)
    else:
        da = tl.where(p == 0.0, 0.0, p * (d - kl_ab))
        db = q - p
        finite = _finite(kl_ab)
    if NEED_A:
        da = tl.where(kept, tl.where(finite, da, float("nan")) * drow, 0.0)
        da_ptr += b_index * stride_dab + t_index * stride_dat
        tl.store(da_ptr + offs, da.to(da_ptr.dtype.element_ty), mask=inside)
    if NEED_B:
        db = tl.where(kept, tl.where(finite, db, float("nan")) * drow, 0.0)
        db_ptr += b_index * stride_dbb + t_index * stride_dbt
        tl.store(db_ptr + offs, db.to(db_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, other: Tensor, mask: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """(rows (B, T), stats (B, T, 6)), fp32, of logits and other (B, T, V) in fp32, bf16 or fp16, any strides.

    Raises ValueError for a dtype or a device that the kernels do not take.
    """
    check_operand("consistency", "logits", logits)
    B, T, V = logits.shape
    rows = torch.empty((B, T), dtype=torch.float32, device=logits.device)
    stats = torch.empty((B, T, _STATS), dtype=torch.float32, device=logits.device)
    if B * T == 0:
        return rows, stats
    logits, other = with_unit_stride(logits), with_unit_stride(other)
    mask = as_bytes(mask)
    run = _forward_launch((B, T, V), logits.stride(), other.stride(), kind, mask is not None)
    with device_of(logits):
        run(logits, other, mask, rows, stats)
    return rows, stats


@per_shape
def _forward_launch(shape, strides, other_strides, kind, masked) -> Launch:
    """(logits, other, mask, rows, stats)"""
    B, T, V = shape
    arguments = {
        "T": T, "V": V, "stride_ab": strides[0], "stride_at": strides[1], "stride_bb": other_strides[0],
        "stride_bt": other_strides[1], "SYMMETRIC": kind == "kl", "HAS_MASK": masked,
        "BLOCK_V": min(_MOST_FORWARD, max(16, next_power_of_two(V))),
    }  # fmt: skip
    free = ("a_ptr", "b_ptr", "mask_ptr", "rows_ptr", "stats_ptr")
    return Launch(_consistency_fwd_kernel, (B * T,), arguments, free, num_warps=8, num_stages=2)


def backward(
    drows: Tensor, logits: Tensor, other: Tensor, stats: Tensor, mask: Tensor | None, kind: str, need_dlogits: bool,
    need_dother: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dlogits, dother), contiguous, in the inputs' dtype, (0,) where it is not needed. Raises as forward does."""
    dlogits, dother = (
        torch.empty(side.shape if needed else (0,), dtype=side.dtype, device=side.device)
        for side, needed in ((logits, need_dlogits), (other, need_dother))
    )
    logits, other = with_unit_stride(logits), with_unit_stride(other)
    _gradients(
        drows, logits, other, stats, mask, kind, dlogits if need_dlogits else None, dother if need_dother else None
    )
    return dlogits, dother


def replace(
    drows: Tensor, logits: Tensor, other: Tensor, stats: Tensor, mask: Tensor | None, kind: str, need_dlogits: bool,
    need_dother: bool,
) -> None:  # fmt: skip
    """The needed gradients in place of logits and other, whose rows must have unit stride (ValueError)."""
    for side in (logits, other):
        if side.stride(2) != 1 and side.shape[2] != 1:
            raise ValueError(f"consistency: rows to be replaced must have unit stride, got strides {side.stride()}")
    _gradients(
        drows, logits, other, stats, mask, kind, logits if need_dlogits else None, other if need_dother else None
    )


def _gradients(drows, logits, other, stats, mask, kind, dlogits, dother) -> None:
    check_operand("consistency", "logits", logits)
    B, T, V = logits.shape
    if B * T == 0:
        return
    mask = as_bytes(mask)
    run = _gradients_launch(
        (B, T, V), logits.stride(), other.stride(), None if dlogits is None else dlogits.stride(),
        None if dother is None else dother.stride(), kind, mask is not None,
    )  # fmt: skip
    with device_of(logits):
        run(drows.contiguous(), logits, other, stats.contiguous(), mask, dlogits, dother)


@per_shape
def _gradients_launch(shape, strides, other_strides, da_strides, db_strides, kind, masked) -> Launch:
    """(drows, logits, other, stats, mask, dlogits, dother)"""
    B, T, V = shape
    block = min(_MOST_BACKWARD, max(16, next_power_of_two(V)))
    (da_b, da_t), (db_b, db_t) = (s[:2] if s else (0, 0) for s in (da_strides, db_strides))
    arguments = {
        "T": T, "V": V, "stride_ab": strides[0], "stride_at": strides[1], "stride_bb": other_strides[0],
        "stride_bt": other_strides[1], "stride_dab": da_b, "stride_dat": da_t, "stride_dbb": db_b, "stride_dbt": db_t,
        "SYMMETRIC": kind == "kl", "HAS_MASK": masked, "NEED_A": da_strides is not None,
        "NEED_B": db_strides is not None, "BLOCK_V": block,
    }  # fmt: skip
    free = ("drows_ptr", "a_ptr", "b_ptr", "stats_ptr", "mask_ptr", "da_ptr", "db_ptr")
    grid = (B * T * ceil_div(V, block),)
    return Launch(_consistency_bwd_kernel, grid, arguments, free, num_warps=4, num_stages=1)
