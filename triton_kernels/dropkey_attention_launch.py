"""What one shape of dropkey_attention launches: grid, tiles and fixed arguments, worked out once (launch.per_shape)."""

from typing import NamedTuple

import torch
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
from .launch import Launch, per_shape, precision_of, target_of
from .philox import span_length
from .tuning import ceil_div

Steps = tuple[int, ...]


class Mask(NamedTuple):
    """An attention mask but for its values; wide: offsets within one head of it exceed 32 bits."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    steps: Steps
    wide: bool

    @property
    def additive(self) -> bool:
        return self.dtype != torch.bool


class Spec(NamedTuple):
    """A call but for the values of its tensors: what its kernels are prepared from.

    sizes: B, H, Hkv, Sq, Sk, D, Dv of the operands; indexed: keys are walked through a list.
    """

    target: tuning.Target
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int, int, int]
    q_steps: Steps
    k_steps: Steps
    v_steps: Steps
    mask: Mask | None
    indexed: bool
    threshold: int
    element: bool
    causal: bool
    scale: float
    precision: str


class Call(NamedTuple):
    """What every kernel of one call shares. index and rank are the key lists, None where keys are walked in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None
    index: Tensor | None
    rank: Tensor | None
    seed: Tensor | None
    spec: Spec

    @staticmethod
    def of(q, k, v, attn_mask, seed, dropout_p, pattern, is_causal, scale) -> "Call":
        (B, H, Sq, _), (_, key_heads, Sk, _), target = q.shape, k.shape, target_of(q)
        threshold = round(dropout_p * 65536)
        length = span_length(dropout_p, Sk) if pattern == "span" else 0
        index = rank = None
        if length > 0 or (pattern == "column" and threshold > 0):
            index = q.new_empty((B * H, Sk), dtype=torch.int32)
            rank = q.new_empty((B * H, Sk + 1), dtype=torch.int32)
            key_list(target, B * H, Sk, threshold, length, pattern == "span")(index, rank, seed)
        q, k, v = operand(q), operand(k), operand(v)
        mask = None
        if attn_mask is not None:
            mask = Mask(attn_mask.dtype, tuple(attn_mask.shape), steps(attn_mask, 4), _spans_wide(attn_mask))
        spec = Spec(
            target, q.dtype, (B, H, key_heads, Sq, Sk, q.shape[3], v.shape[3]), steps(q), steps(k), steps(v), mask,
            index is not None, threshold, pattern == "element" and threshold > 0, is_causal, scale, precision_of(q),
        )  # fmt: skip
        return Call(q, k, v, attn_mask, index, rank, seed, spec)

    @property
    def shared(self) -> tuple[Tensor | None, ...]:
        """The arguments named _SHARED."""
        mask = self.attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        return self.q, self.k, self.v, self.index, self.rank, self.seed if self.spec.element else None, mask


_SHARED = ("q_ptr", "k_ptr", "v_ptr", "index_ptr", "rank_ptr", "seed_ptr", "mask_ptr")
_QUERIES = ("do_ptr", "base_ptr", "delta_ptr")


def steps(tensor: Tensor, dimensions: int = 3) -> Steps:
    """The strides of the leading dimensions, 0 where there is but one place to go."""
    sizes, strides = tensor.shape, tensor.stride()
    return tuple([0 if sizes[i] == 1 else strides[i] for i in range(dimensions)])


def operand(tensor: Tensor) -> Tensor:
    """`tensor` itself where its rows suit wide loads, else a copy padded with zeros to a multiple of 8 columns.

    The JIT knows of an integer only whether it is divisible by 16; half-precision loads of one element would be slow
    and take registers that the tiles do not leave.
    """
    B, H, S, D = tensor.shape
    if D % 8 == 0 and tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0:
        b, h, s = steps(tensor)
        if b % 16 == h % 16 == s % 16 == 0:
            return tensor
    padded = tensor.new_zeros((B, S, H, ceil_div(D, 16) * 16)).transpose(1, 2)
    padded[..., :D] = tensor
    return padded[..., : ceil_div(D, 8) * 8]


def _spans_wide(mask: Tensor) -> bool:
    return sum((size - 1) * stride for size, stride in zip(mask.shape[2:], mask.stride()[2:], strict=True)) >= 2**31


def _config(spec: Spec, kernel: str) -> AttentionConfig:
    _, _, _, _, Sk, D, DV = spec.sizes
    if spec.element:
        logits = "ragged" if Sk % 8 else "masked"
    elif spec.mask is None or spec.mask.shape[2] == 1:
        logits = "listed" if spec.indexed else "plain"
    else:
        logits = "masked"
    return attention_config(spec.target, spec.dtype, max(D, DV), kernel, logits, spec.causal)


def _named(name: str, dimensions: str, values: Steps) -> dict:
    return {f"stride_{name}{dimension}": value for dimension, value in zip(dimensions, values, strict=True)}


def _fixed(spec: Spec, config: AttentionConfig) -> dict:
    """The fixed arguments that the forward, dq, dkv and mask kernels have in common."""
    (_, H, key_heads, Sq, Sk, D, DV), mask = spec.sizes, spec.mask
    additive = mask is not None and mask.additive
    return {
        "H": H, "group": H // key_heads, "Sq": Sq, "Sk": Sk, "threshold": spec.threshold, "scale": spec.scale, "D": D,
        "DV": DV, "INDEXED": spec.indexed, "MASK": "none" if mask is None else "additive" if additive else "bool",
        "MASK_ROWS": mask is not None and mask.shape[2] > 1, "MASK_WIDE": mask is not None and mask.wide,
        "MASK_FLOOR": torch.finfo(mask.dtype).min / 2 if additive else 0.0, "CAUSAL": spec.causal,
        "ELEMENT": spec.element, "ALIGNED": Sk % 8 == 0, "BASE_2": spec.dtype != torch.float32,
        "PRECISION": spec.precision, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_D": pad_head_dim(D),
        "BLOCK_DV": pad_head_dim(DV), **_named("q", "bhm", spec.q_steps), **_named("k", "bhn", spec.k_steps),
        **_named("v", "bhn", spec.v_steps), **_named("m", "bhmn", (0, 0, 0, 0) if mask is None else mask.steps),
    }  # fmt: skip


@per_shape
def key_list(target: tuning.Target, lists: int, Sk: int, threshold: int, length: int, span: bool) -> Launch:
    """(index, rank, seed): the kept keys of `lists` (batch, head)s; length: of the span that is dropped."""
    arguments = {
        "Sk": Sk, "threshold": threshold, "length": length, "SPAN": span, "ALIGNED": Sk % 8 == 0,
        "BLOCK": 32 if target.arch == 0 else 1024,
    }  # fmt: skip
    free = ("index_ptr", "rank_ptr", "seed_ptr")
    return Launch(_dropkey_attention_index_kernel, (lists,), arguments, free, num_warps=4, num_stages=1)


@per_shape
def forward(spec: Spec, out_dv: int, o_steps: Steps) -> Launch:
    """(shared, o, lse)"""
    config, (B, H, _, Sq, *_) = _config(spec, "forward"), spec.sizes
    arguments = _fixed(spec, config) | {"OUT_DV": out_dv, "RISING": spec.scale > 0} | _named("o", "bhm", o_steps)
    grid, free = (ceil_div(Sq, config.block_m) * B * H,), (*_SHARED, "o_ptr", "lse_ptr")
    return Launch(_dropkey_attention_fwd_kernel, grid, arguments, free, config.num_warps, config.num_stages)


@per_shape
def delta(spec: Spec, out_dv: int, do_steps: Steps, o_steps: Steps) -> tuple[Launch, int]:
    """(do, o, lse, delta, base), and the rows of delta and base: whole blocks of every backward kernel's."""
    B, H, _, Sq, *_ = spec.sizes
    tallest = max(_config(spec, kernel).block_m for kernel in ("delta", "dq", "dkv", "mask"))
    rows, config = ceil_div(Sq, tallest) * tallest, _config(spec, "delta")
    arguments = {
        "H": H, "Sq": Sq, "rows": rows, "DV": out_dv, "BASE_2": spec.dtype != torch.float32, "BLOCK_M": config.block_m,
        "BLOCK_DV": pad_head_dim(out_dv), **_named("do", "bhm", do_steps), **_named("o", "bhm", o_steps),
    }  # fmt: skip
    grid, free = (rows // config.block_m * B * H,), ("do_ptr", "o_ptr", "lse_ptr", "delta_ptr", "base_ptr")
    return Launch(_dropkey_attention_delta_kernel, grid, arguments, free, config.num_warps, config.num_stages), rows


@per_shape
def dq(spec: Spec, out_d: int, do_steps: Steps, dq_steps: Steps, rows: int) -> Launch:
    """(shared, queries, dq)"""
    config, (B, H, _, Sq, *_) = _config(spec, "dq"), spec.sizes
    arguments = _fixed(spec, config) | {"rows": rows, "OUT_D": out_d}
    arguments |= _named("do", "bhm", do_steps) | _named("dq", "bhm", dq_steps)
    grid, free = (ceil_div(Sq, config.block_m) * B * H,), (*_SHARED, *_QUERIES, "dq_ptr")
    return Launch(_dropkey_attention_bwd_dq_kernel, grid, arguments, free, config.num_warps, config.num_stages)


@per_shape
def share_of_heads(spec: Spec) -> tuple[bool, int]:
    """(whether the query heads of a key head leave partials of dk and dv, query heads of one program)."""
    B, H, key_heads, _, Sk, *_ = spec.sizes
    tiles, group = ceil_div(Sk, _config(spec, "dkv").block_n), H // key_heads
    split = group > 1 and (spec.indexed or tiles * B * key_heads < spec.target.sm_count)
    return split, 1 if split or spec.indexed else group


@per_shape
def dkv(
    spec: Spec, out_d: int, out_dv: int, do_steps: Steps, dk_steps: Steps, dv_steps: Steps, rows: int
) -> Launch:  # fmt: skip
    """(shared, queries, dk, dv)"""
    config, (B, H, _, _, Sk, *_), (_, heads) = _config(spec, "dkv"), spec.sizes, share_of_heads(spec)
    arguments = _fixed(spec, config) | {
        "rows": rows, "heads": heads, "GROUPED": heads > 1, "OUT_D": out_d, "OUT_DV": out_dv,
        **_named("do", "bhm", do_steps), **_named("dk", "bhn", dk_steps), **_named("dv", "bhn", dv_steps),
    }  # fmt: skip
    grid = (ceil_div(Sk, config.block_n) * B * (H // heads),)
    free = (*_SHARED, *_QUERIES, "dk_ptr", "dv_ptr")
    return Launch(_dropkey_attention_bwd_dkv_kernel, grid, arguments, free, config.num_warps, config.num_stages)


@per_shape
def dmask(spec: Spec, do_steps: Steps, rows: int) -> tuple[Launch, int]:
    """(shared but for index, queries, partials), and how many partials there are."""
    config, (B, H, _, Sq, Sk, *_), shape = _config(spec, "mask"), spec.sizes, spec.mask.shape
    full = B, H, ceil_div(Sq, config.block_m), ceil_div(Sk, config.block_n)
    tiles = [count if size > 1 else 1 for count, size in zip(full, shape, strict=True)]
    reps = [count // tile for count, tile in zip(full, tiles, strict=True)]
    programs, items = tiles[0] * tiles[1] * tiles[2] * tiles[3], reps[0] * reps[1] * reps[2] * reps[3]
    split = ceil_div(items, min(items, ceil_div(2 * spec.target.sm_count, programs)))
    parts = ceil_div(items, split)
    arguments = _fixed(spec, config) | {
        "rows": rows, "MASK_KEYS": shape[3] > 1, "tiles_h": tiles[1], "tiles_m": tiles[2], "tiles_n": tiles[3],
        "reps_h": reps[1], "reps_m": reps[2], "reps_n": reps[3], "items": items, "split": split,
        **_named("do", "bhm", do_steps),
    }  # fmt: skip
    del arguments["MASK"]
    shared = tuple(name for name in _SHARED if name != "index_ptr")
    grid, free = (programs, parts), (*shared, *_QUERIES, "part_ptr")
    launch = Launch(_dropkey_attention_bwd_mask_kernel, grid, arguments, free, config.num_warps, config.num_stages)
    return launch, parts
