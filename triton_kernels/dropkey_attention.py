"""dropkey_attention on Triton: launchers with the semantics of the operator's raw ops.

    z = scale·q kᵀ + attn_mask;  z[masked or dropped] = −inf;  p = softmax(z);  o = p v;  lse = log Σ exp z
    dv = pᵀ do;  dp = do vᵀ;  dz = p∘(dp − rowsum(do∘o));  dq = scale·dz k;  dk = scale·dzᵀ q;  dmask = dz

Nothing of size Sq×Sk is stored but dmask. Key lists of dropped columns and spans are built on the device, in both
directions; no host sync, no atomics: the same bits every run. dropkey_attention_tiles.py chooses the tiles.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import tuning
from .dropkey_attention_bwd import (
    _dropkey_attention_bwd_dkv_kernel,
    _dropkey_attention_bwd_dq_kernel,
    _dropkey_attention_bwd_mask_kernel,
    _dropkey_attention_delta_kernel,
)
from .dropkey_attention_fwd import _dropkey_attention_fwd_kernel, _dropkey_attention_index_kernel
from .dropkey_attention_tiles import AttentionConfig, attention_config, pad_head_dim
from .launch import check_operand, device_of, launch, precision_of, target_of

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
        call = _Call.of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)
        config = call.config("forward")
        arguments = call.arguments(config) | {
            "o_ptr": o, "lse_ptr": lse, "OUT_DV": DV, "RISING": scale > 0, **_strides("o", "bhm", o),
        }  # fmt: skip
        grid = (triton.cdiv(Sq, config.block_m) * B * H,)
        launch(_dropkey_attention_fwd_kernel, grid, arguments, config.num_warps, config.num_stages)
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
    dq, dk, dv, dmask = (do.new_empty(0) for _ in range(4))
    if o.numel() == 0 or k.shape[2] == 0:
        dq, dk, dv = (
            torch.zeros_like(t) if need else do.new_empty(0) for t, need in ((q, need_dq), (k, need_dk), (v, need_dv))
        )
        return dq, dk, dv, attn_mask.new_zeros(attn_mask.shape) if need_dmask else dmask
    with device_of(q):
        call = _Call.of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale)
        do = _operand(do)
        common = {"do_ptr": do, **_strides("do", "bhm", do), **_statistics(call, do, o, lse)}
        if need_dq:
            dq = _dq(call, q, common)
        if need_dk or need_dv:
            dk, dv = _dkv(call, k, v, common)
        if need_dmask:
            dmask = _dmask(call, common)
    return dq, dk if need_dk else do.new_empty(0), dv if need_dv else do.new_empty(0), dmask


@dataclass(frozen=True)
class _Call:
    """What every kernel of one call shares. index and rank are the key lists, None where keys are walked in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    index: Tensor | None
    rank: Tensor | None
    seed: Tensor | None
    threshold: int
    element: bool
    is_causal: bool
    scale: float
    target: tuning.Target

    @staticmethod
    def of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale) -> "_Call":
        (B, H, _, _), Sk, target = q.shape, k.shape[2], target_of(q)
        threshold = round(dropout_p * 65536)
        length = min(Sk - 1, max(1, int(dropout_p * Sk))) if pattern == "span" and dropout_p > 0 else 0
        index = rank = None
        if length > 0 or (pattern == "column" and threshold > 0):
            index = q.new_empty((B * H, Sk), dtype=torch.int32)
            rank = q.new_empty((B * H, Sk + 1), dtype=torch.int32)
            arguments = {
                "index_ptr": index, "rank_ptr": rank, "seed_ptr": seed, "Sk": Sk, "threshold": threshold,
                "length": length, "SPAN": pattern == "span", "ALIGNED": Sk % 8 == 0,
                "BLOCK": 32 if target.arch == 0 else 1024,
            }  # fmt: skip
            launch(_dropkey_attention_index_kernel, (B * H,), arguments, num_warps=4, num_stages=1)
        q, k, v = map(_operand, (q, k, v))
        element = pattern == "element" and threshold > 0
        return _Call(q, k, v, attn_mask, index, rank, seed, threshold, element, is_causal, scale, target)

    def config(self, kernel: str) -> AttentionConfig:
        head_dim = max(self.q.shape[3], self.v.shape[3])
        if self.element:
            logits = "ragged" if self.k.shape[2] % 8 else "masked"
        elif self.attn_mask is None or self.attn_mask.shape[2] == 1:
            logits = "plain" if self.index is None else "listed"
        else:
            logits = "masked"
        return attention_config(self.target, self.q.dtype, head_dim, kernel, logits, self.is_causal)

    def arguments(self, config: AttentionConfig) -> dict:
        """The arguments that the forward, dq, dkv and mask kernels have in common."""
        q, k, v, mask = self.q, self.k, self.v, self.attn_mask
        (_, H, Sq, D), (_, key_heads, Sk, DV) = q.shape, v.shape
        additive = mask is not None and mask.dtype != torch.bool
        return {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "index_ptr": self.index, "rank_ptr": self.rank,
            "seed_ptr": self.seed if self.element else None,
            "mask_ptr": mask if mask is None or additive else mask.view(torch.uint8), "H": H, "group": H // key_heads,
            "Sq": Sq, "Sk": Sk, "threshold": self.threshold, "scale": self.scale, "D": D, "DV": DV,
            "INDEXED": self.index is not None, "MASK": "none" if mask is None else "additive" if additive else "bool",
            "MASK_ROWS": mask is not None and mask.shape[2] > 1, "MASK_WIDE": mask is not None and _spans_wide(mask),
            "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if additive else 0.0, "CAUSAL": self.is_causal,
            "ELEMENT": self.element, "ALIGNED": Sk % 8 == 0, "BASE_2": q.dtype != torch.float32,
            "PRECISION": precision_of(q), "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_D": pad_head_dim(D), "BLOCK_DV": pad_head_dim(DV), **_strides("q", "bhm", q),
            **_strides("k", "bhn", k), **_strides("v", "bhn", v), **_strides("m", "bhmn", mask),
        }  # fmt: skip


def _statistics(call, do, o, lse) -> dict:
    """What the backward kernels read of every query, in whole blocks of theirs: delta and base, fp32 (B, H, rows)."""
    (B, H, Sq), DV = lse.shape, o.shape[3]
    tallest = max(call.config(kernel).block_m for kernel in ("delta", "dq", "dkv", "mask"))
    rows = triton.cdiv(Sq, tallest) * tallest
    delta, base = lse.new_empty((2, B, H, rows))
    config = call.config("delta")
    arguments = {
        "do_ptr": do, "o_ptr": o, "lse_ptr": lse, "delta_ptr": delta, "base_ptr": base, "H": H, "Sq": Sq, "rows": rows,
        "DV": DV, "BASE_2": do.dtype != torch.float32, "BLOCK_M": config.block_m, "BLOCK_DV": pad_head_dim(DV),
        **_strides("do", "bhm", do), **_strides("o", "bhm", o),
    }  # fmt: skip
    grid = (rows // config.block_m * B * H,)
    launch(_dropkey_attention_delta_kernel, grid, arguments, config.num_warps, config.num_stages)
    return {"delta_ptr": delta, "base_ptr": base, "rows": rows}


def _dq(call, q, common) -> Tensor:
    B, H, Sq, _ = q.shape
    out = torch.empty_like(q)
    dq = _writable(out)
    config = call.config("dq")
    own = {"dq_ptr": dq, "OUT_D": q.shape[3], **_strides("dq", "bhm", dq)}
    grid = (triton.cdiv(Sq, config.block_m) * B * H,)
    arguments = call.arguments(config) | common | own
    launch(_dropkey_attention_bwd_dq_kernel, grid, arguments, config.num_warps, config.num_stages)
    return out if dq is out else out.copy_(dq)


def _dkv(call, k, v, common) -> tuple[Tensor, Tensor]:
    """(dk, dv): one program per block of keys and key head, or per query head, whose fp32 partials are then added."""
    (B, H, _, _), (key_heads, Sk) = call.q.shape, k.shape[1:3]
    config = call.config("dkv")
    tiles, group = triton.cdiv(Sk, config.block_n), H // key_heads
    split = group > 1 and (call.index is not None or tiles * B * key_heads < call.target.sm_count)
    heads = 1 if split or call.index is not None else group
    outs = torch.empty_like(k), torch.empty_like(v)
    if split:
        dk, dv = (t.new_empty((B, H, *t.shape[2:]), dtype=torch.float32) for t in (k, v))
    else:
        dk, dv = map(_writable, outs)
    arguments = call.arguments(config) | common | {
        "dk_ptr": dk, "dv_ptr": dv, "heads": heads, "GROUPED": heads > 1, "OUT_D": k.shape[3], "OUT_DV": v.shape[3],
        **_strides("dk", "bhn", dk), **_strides("dv", "bhn", dv),
    }  # fmt: skip
    grid = (tiles * B * (H // heads),)
    launch(_dropkey_attention_bwd_dkv_kernel, grid, arguments, config.num_warps, config.num_stages)
    if split:
        dk, dv = (partials.unflatten(1, (key_heads, group)).sum(2) for partials in (dk, dv))
    return tuple(out if out is result else out.copy_(result) for out, result in zip(outs, (dk, dv), strict=True))


def _dmask(call, common) -> Tensor:
    """The gradient of attn_mask in its own shape; few tiles of a mask that broadcasts share their sums."""
    (B, H, Sq, _), Sk, mask = call.q.shape, call.k.shape[2], call.attn_mask
    config = call.config("mask")
    full = (B, H, triton.cdiv(Sq, config.block_m), triton.cdiv(Sk, config.block_n))
    tiles = [count if size > 1 else 1 for count, size in zip(full, mask.shape, strict=True)]
    reps = [count // tile for count, tile in zip(full, tiles, strict=True)]
    programs, items = tiles[0] * tiles[1] * tiles[2] * tiles[3], reps[0] * reps[1] * reps[2] * reps[3]
    split = triton.cdiv(items, min(items, triton.cdiv(2 * call.target.sm_count, programs)))
    parts = triton.cdiv(items, split)
    dmask = mask.new_empty(mask.shape)
    partials = dmask if parts == 1 else mask.new_empty((parts, *mask.shape), dtype=torch.float32)
    arguments = call.arguments(config) | common | {
        "part_ptr": partials, "MASK_KEYS": mask.shape[3] > 1, "tiles_h": tiles[1], "tiles_m": tiles[2],
        "tiles_n": tiles[3], "reps_h": reps[1], "reps_m": reps[2], "reps_n": reps[3], "items": items, "split": split,
    }  # fmt: skip
    del arguments["index_ptr"], arguments["MASK"]
    launch(_dropkey_attention_bwd_mask_kernel, (programs, parts), arguments, config.num_warps, config.num_stages)
    return dmask if parts == 1 else dmask.copy_(partials.sum(0))


def _strides(name: str, dimensions: str, tensor: Tensor | None) -> dict:
    """stride_<name><dimension> for the leading dimensions of a 4-d tensor; 0 where it broadcasts."""
    if tensor is None:
        return {f"stride_{name}{dimension}": 0 for dimension in dimensions}
    return {
        f"stride_{name}{dimension}": 0 if tensor.shape[i] == 1 else tensor.stride(i)
        for i, dimension in enumerate(dimensions)
    }


def _spans_wide(mask: Tensor) -> bool:
    """Whether offsets within one head of the mask exceed 32 bits."""
    return sum((size - 1) * stride for size, stride in zip(mask.shape[2:], mask.stride()[2:], strict=True)) >= 2**31


def _operand(tensor: Tensor) -> Tensor:
    """`tensor` itself where its rows suit wide loads, else a copy padded with zeros to a multiple of 8 columns.

    The JIT knows of an integer only whether it is divisible by 16; half-precision loads of one element would be slow
    and take registers that the tiles do not leave.
    """
    B, H, S, D = tensor.shape
    steps = (stride for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1)
    if D % 8 == 0 and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps):
        return tensor
    padded = tensor.new_zeros((B, S, H, triton.cdiv(D, 16) * 16)).transpose(1, 2)
    padded[..., :D] = tensor
    return padded[..., : triton.cdiv(D, 8) * 8]


def _writable(out: Tensor) -> Tensor:
    """`out` itself, or memory of its shape that kernels can write rows of."""
    return out if out.stride(3) == 1 or out.shape[3] == 1 else out.new_empty(out.shape)
