"""dropkey_attention on Triton: launchers with the semantics of the operator's raw ops.

    z = scale·q kᵀ + attn_mask;  z[masked or dropped] = −inf;  p = softmax(z);  o = p v;  lse = log Σ exp z
    dv = pᵀ do;  dp = do vᵀ;  dz = p∘(dp − rowsum(do∘o));  dq = scale·dz k;  dk = scale·dzᵀ q;  dmask = dz

Nothing of size Sq×Sk is stored but dmask. Key lists of dropped columns and spans are built on the device, in both
directions; no host sync, no atomics: the same bits every run. dropkey_attention_tiles.py chooses the tiles,
dropkey_attention_launch.py prepares the launches of one shape.
"""

import torch
from torch import Tensor

from . import dropkey_attention_launch as prepared
from .dropkey_attention_launch import Call, steps
from .launch import check_operand, device_of

_OPERATOR = "dropkey_attention"


def forward(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, seed: Tensor | None, dropout_p: float, pattern: str,
    is_causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o (B, H, Sq, Dv), lse (B, H, Sq)) of q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv); any strides.

    q, k, v are fp32, bf16 or fp16; o, in their dtype, has the strides of a contiguous (B, Sq, H, Dv), lse is fp32.
    attn_mask: bool (True = visible) or additive, 4-d, each dimension 1 or full. seed: 0-d int64 on q's device, None
    without dropout. Raises ValueError for a dtype or a device that these kernels do not take.
    """
    check_operand(_OPERATOR, "q", q)
    (B, H, Sq, _), DV = q.shape, v.shape[3]
    o = q.new_empty((B, Sq, H, DV)).transpose(1, 2)
    lse = q.new_empty((B, H, Sq), dtype=torch.float32)
    if k.shape[2] == 0:
        return o.zero_(), lse.fill_(float("-inf"))
    if o.numel() == 0:
        return o, lse
    with device_of(q):
        call = Call.of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)
        prepared.forward(call.spec, DV, steps(o))(*call.shared, o, lse)
    return o, lse


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, attn_mask: Tensor | None, seed: Tensor | None,
    dropout_p: float, pattern: str, is_causal: bool, scale: float, need_dq: bool, need_dk: bool, need_dv: bool,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dmask) in the shapes, dtypes and strides (torch.empty_like) of q, k, v, attn_mask.

    What is not needed is an empty tensor of shape (0,). dmask is contiguous and summed over the dimensions attn_mask
    broadcasts. Rows of dk and dv of dropped keys are 0. Raises ValueError as forward does.
    """
    check_operand(_OPERATOR, "q", q)
    if o.numel() == 0 or k.shape[2] == 0:
        dq, dk, dv = (
            torch.zeros_like(t) if need else do.new_empty(0) for t, need in ((q, need_dq), (k, need_dk), (v, need_dv))
        )
        return dq, dk, dv, attn_mask.new_zeros(attn_mask.shape) if need_dmask else do.new_empty(0)
    with device_of(q):
        call = Call.of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)
        do = prepared.operand(do)
        queries = do, *_statistics(call, do, o, lse)
        dq = _dq(call, q, *queries) if need_dq else do.new_empty(0)
        dk, dv = _dkv(call, k, v, *queries) if need_dk or need_dv else (None, None)
        dmask = _dmask(call, *queries) if need_dmask else do.new_empty(0)
    return dq, dk if need_dk else do.new_empty(0), dv if need_dv else do.new_empty(0), dmask


def _statistics(call, do, o, lse) -> tuple[Tensor, Tensor]:
    """What the backward kernels read of every query, in whole blocks of theirs: base and delta, fp32 (B, H, rows)."""
    run, rows = prepared.delta(call.spec, o.shape[3], steps(do), steps(o))
    base, delta = lse.new_empty((2, *lse.shape[:2], rows))
    run(do, o, lse, delta, base)
    return base, delta


def _dq(call, q, do, base, delta) -> Tensor:
    out = torch.empty_like(q)
    dq = _writable(out)
    prepared.dq(call.spec, q.shape[3], steps(do), steps(dq), base.shape[2])(*call.shared, do, base, delta, dq)
    return out if dq is out else out.copy_(dq)


def _dkv(call, k, v, do, base, delta) -> tuple[Tensor, Tensor]:
    """(dk, dv): one program per block of keys and key head, or per query head, whose fp32 partials are then added."""
    (B, H, _, _), key_heads = call.q.shape, k.shape[1]
    outs = torch.empty_like(k), torch.empty_like(v)
    split, _ = prepared.share_of_heads(call.spec)
    if split:
        dk, dv = (t.new_empty((B, H, *t.shape[2:]), dtype=torch.float32) for t in (k, v))
    else:
        dk, dv = map(_writable, outs)
    run = prepared.dkv(call.spec, k.shape[3], v.shape[3], steps(do), steps(dk), steps(dv), base.shape[2])
    run(*call.shared, do, base, delta, dk, dv)
    if split:
        dk, dv = (partials.unflatten(1, (key_heads, H // key_heads)).sum(2) for partials in (dk, dv))
    return tuple(out if out is result else out.copy_(result) for out, result in zip(outs, (dk, dv), strict=True))


def _dmask(call, do, base, delta) -> Tensor:
    """The gradient of attn_mask in its own shape; few tiles of a mask that broadcasts share their sums."""
    mask = call.attn_mask
    run, parts = prepared.dmask(call.spec, steps(do), base.shape[2])
    dmask = mask.new_empty(mask.shape)
    partials = dmask if parts == 1 else mask.new_empty((parts, *mask.shape), dtype=torch.float32)
    q, k, v, _, rank, seed, mask = call.shared
    run(q, k, v, rank, seed, mask, do, base, delta, partials)
    return dmask if parts == 1 else dmask.copy_(partials.sum(0))


def _writable(out: Tensor) -> Tensor:
    """`out` itself, or memory of its shape that kernels can write rows of."""
    return out if out.stride(3) == 1 or out.shape[3] == 1 else out.new_empty(out.shape)
