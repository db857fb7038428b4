"""The tiles of dropkey_attention's kernels: an architecture's defaults, none of which spills, or measured ones.

Nobody has timed the defaults: they are the widest that ptxas fits into registers, with the most stages that help. Key
lists want one more than plain keys, because the list itself is fetched a step ahead.
"""

from dataclasses import dataclass

import torch

from .tuning import Target, chosen_tiles, next_power_of_two


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of an attention kernel: block_m queries by block_n keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# kernel -> head dimension up to -> tiles where logits are plain, and where they are masked one by one.
_HOPPER = {
    "forward": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dq": {
        64: ((128, 128, 8, 3), (128, 64, 8, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (32, 32, 8, 1)),
    },
    "dkv": {
        64: ((64, 128, 8, 2), (32, 128, 8, 2)),
        128: ((32, 128, 8, 2), (16, 128, 8, 2)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "mask": {128: ((128, 64, 8, 2), (128, 64, 8, 2)), 256: ((64, 64, 8, 1), (64, 64, 8, 1))},
}
# Tensor memory holds a row of logits per thread.
_BLACKWELL = _HOPPER | {
    "forward": _HOPPER["forward"] | {64: ((128, 64, 8, 3), (128, 64, 8, 3)), 256: ((64, 32, 8, 2), (64, 32, 8, 2))},
    "dq": _HOPPER["dq"] | {64: ((128, 64, 8, 2), (128, 64, 8, 2))},
    "dkv": _HOPPER["dkv"] | {256: ((32, 32, 8, 2), (16, 32, 8, 2))},
}
_AMPERE = {
    "forward": {
        64: ((128, 64, 8, 3), (128, 64, 8, 3)),
        128: ((128, 64, 8, 3), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2)),
    },
    "dq": {
        64: ((128, 64, 8, 2), (64, 32, 4, 2)),
        128: ((64, 64, 4, 2), (64, 32, 4, 2)),
        256: ((64, 32, 8, 2), (32, 32, 8, 1)),
    },
    "dkv": {
        64: ((32, 128, 8, 2), (16, 64, 4, 1)),
        128: ((32, 64, 8, 1), (32, 64, 8, 1)),
        256: ((32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "mask": {128: ((128, 64, 8, 2), (128, 64, 8, 2)), 256: ((32, 32, 8, 1), (32, 32, 8, 1))},
}
# Less shared memory, and a register allocation of its own.
_ADA = {
    "forward": _AMPERE["forward"] | {128: ((128, 32, 8, 3), (64, 32, 4, 2))},
    "dq": _AMPERE["dq"] | {256: ((64, 32, 8, 1), (32, 32, 8, 1))},
    "dkv": _AMPERE["dkv"] | {128: ((32, 64, 8, 1), (16, 64, 8, 1))},
    "mask": _AMPERE["mask"] | {64: ((128, 64, 8, 2), (128, 64, 8, 2)), 128: ((64, 64, 8, 2), (64, 64, 8, 2))},
}
# fp32 products run on the FMA units, whose operands stay in registers.
_FP32 = {
    "forward": {
        64: ((32, 64, 8, 2), (16, 32, 8, 1)),
        128: ((64, 32, 8, 2), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1)),
    },
    "dq": {
        64: ((32, 64, 8, 2), (32, 32, 8, 2)),
        128: ((32, 32, 8, 2), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1)),
    },
    "dkv": {
        64: ((32, 64, 8, 2), (32, 64, 8, 2)),
        128: ((32, 32, 8, 2), (16, 32, 8, 2)),
        256: ((16, 32, 8, 1), (16, 32, 8, 1)),
    },
    "mask": {128: ((32, 32, 8, 2), (32, 32, 8, 2)), 256: ((16, 16, 8, 1), (16, 16, 8, 1))},
}
# Before sm_90 ptxas stops at 128 registers there, and spills the rest.
_OLDER_FP32 = _FP32 | {"dkv": _FP32["dkv"] | {64: ((32, 32, 8, 2), (32, 64, 8, 2))}}


def pad_head_dim(D: int) -> int:
    """BLOCK_D: a power of two, at least tl.dot's 16."""
    return max(next_power_of_two(D), 16)


def head_dim_bucket(head_dim: int) -> int:
    """The head_dim of the tables' rows that speak for this one."""
    return next(limit for limit in (64, 128, 256) if head_dim <= limit)


def attention_config(
    target: Target, dtype: torch.dtype, head_dim: int, kernel: str, logits: str, causal: bool = False
) -> AttentionConfig:
    """The tiles of kernel forward, delta, dq, dkv or mask; head_dim is the larger of D and Dv.

    logits: plain if no value of a mask and no drop bit belongs to one logit alone, listed if beside that the keys come
    from a list, else masked; ragged if drop bits do and a row of them starts anywhere in the eight of a Philox call.
    """
    own = architecture_config(target, dtype, head_dim, kernel, logits)
    if logits == "ragged" or kernel in ("delta", "mask"):
        return own
    call = {"dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim_bucket(head_dim), "logits": logits}
    return chosen_tiles(target, "dropkey_attention", kernel, own, **call, causal=causal)


def architecture_config(target: Target, dtype: torch.dtype, head_dim: int, kernel: str, logits: str) -> AttentionConfig:
    """What attention_config says of a device that nobody measured."""
    if target.arch == 0:
        return AttentionConfig(16, 16, num_warps=4, num_stages=1)
    if kernel == "delta":
        return AttentionConfig(32, 32, num_warps=4, num_stages=1)
    if logits == "ragged":
        sides = (32, 32) if dtype.itemsize == 2 or head_dim <= 64 else (16, 16)
        return AttentionConfig(*sides, num_warps=4 if dtype.itemsize == 2 and head_dim <= 64 else 8, num_stages=1)
    if dtype.itemsize == 4:
        family = _FP32 if target.arch >= 90 else _OLDER_FP32
    elif 90 <= target.arch < 120:
        family = _HOPPER if target.arch == 90 else _BLACKWELL
    else:
        family = _AMPERE if target.arch == 80 else _ADA
    plain, masked = next(tiles for limit, tiles in sorted(family[kernel].items()) if head_dim <= limit)
    return AttentionConfig(*(masked if logits == "masked" else plain))
