"""The tiles worth timing for dropkey_attention's kernels: what `python -m lorasp tune --op dropkey_attention` tries.

A list here is a proposal, cut to what the shared memory and the registers of the architecture can hold at all.
"""

import torch

from .dropkey_attention_tiles import AttentionConfig, architecture_config, pad_head_dim
from .tuning import Target

# (block_m, block_n, num_warps, num_stages), half precision.
_HALF = {
    "forward": (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 3),
        (128, 64, 4, 3), (128, 32, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 32, 4, 4),
    ),
    "dq": (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 128, 4, 2),
        (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
    ),
    "dkv": (
        (128, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (16, 128, 8, 3),
        (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2),
    ),
}  # fmt: skip
_SINGLE = {
    "forward": ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (16, 32, 8, 1)),
    "dq": ((32, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2), (16, 32, 8, 1)),
    "dkv": ((32, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (32, 32, 4, 1)),
}
_INTERPRETER = ((16, 32, 4, 1), (32, 16, 4, 1))
# Of 255 registers a thread needs 60 to 90 for addresses, operands on their way and the statistics of its rows: compiled
# for sm_90, tiles of 192 accumulators spill.
_MOST_ACCUMULATORS = 176


def candidates(target: Target, dtype: torch.dtype, head_dim: int, kernel: str, logits: str) -> list[AttentionConfig]:
    """The tiles of kernel forward, dq or dkv beside the architecture's own that fit; D = Dv = head_dim."""
    own = architecture_config(target, dtype, head_dim, kernel, logits)
    tiles = _INTERPRETER if target.arch == 0 else (_HALF if dtype.itemsize == 2 else _SINGLE)[kernel]
    return [
        config
        for config in (AttentionConfig(*tile) for tile in tiles)
        if config != own
        and shared_bytes(target, config, dtype, head_dim, kernel, logits) <= target.shared_memory
        and (_in_tensor_memory(target) or accumulators(config, head_dim, kernel) <= _MOST_ACCUMULATORS)
    ]


def shared_bytes(
    target: Target, config: AttentionConfig, dtype: torch.dtype, head_dim: int, kernel: str, logits: str
) -> int:
    """Shared memory that a kernel cannot do without, in bytes: a bound from below.

    Steps of the two operands that are walked past; beside them, where the tensor cores read shared memory, the operands
    of the block itself. Of what is fetched through a key list the pipeline holds two steps, however long it is; where
    operands lie in registers, it holds one less.
    """
    row = pad_head_dim(head_dim) * dtype.itemsize
    walked, kept = (config.block_m, config.block_n) if kernel == "dkv" else (config.block_n, config.block_m)
    steps, resident = config.num_stages, (1 if kernel == "forward" else 2) * kept
    if not 90 <= target.arch < 120:
        resident, steps = 0, max(1, steps - 1)
    elif logits == "listed" and kernel != "dkv":
        steps = min(steps, 2)
    return (2 * walked * steps + resident) * row


def accumulators(config: AttentionConfig, head_dim: int, kernel: str) -> int:
    """Registers per thread that hold logits, their gradients and what is summed up, all in fp32."""
    block, wide = config.block_m * config.block_n, pad_head_dim(head_dim)
    held = {
        "forward": block + config.block_m * wide,
        "dq": 2 * block + config.block_m * wide,
        "dkv": 2 * block + 2 * config.block_n * wide,
    }
    return held[kernel] // (32 * config.num_warps)


def _in_tensor_memory(target: Target) -> bool:
    """Whether accumulators lie in a memory of their own: tcgen05."""
    return 100 <= target.arch < 120
