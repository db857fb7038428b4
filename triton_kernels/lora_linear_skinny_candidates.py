"""The tiles worth timing for the rank-R products: what `python -m lorasp tune --op lora_linear_skinny` tries.

These kernels stream one large matrix once; what is tried is how much of it is in flight. A list here is a proposal, cut
to what the shared memory and the registers of the architecture can hold at all.
"""

from dataclasses import replace

import torch

from .tuning import SkinnyConfig, Target, architecture_rank_config, next_power_of_two

# (block_m, block_c, num_warps, num_stages); block_m is cut to M. The rank's block stays the architecture's.
_HALF = {
    "project": (
        (64, 128, 4, 3), (64, 128, 8, 4), (64, 64, 4, 4), (64, 64, 4, 6), (64, 256, 4, 3), (64, 256, 8, 3),
        (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3), (32, 128, 4, 4), (32, 256, 4, 4), (16, 256, 4, 4),
    ),
    "outer": (
        (64, 128, 4, 3), (64, 128, 8, 4), (64, 64, 4, 4), (64, 256, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3),
        (32, 128, 4, 4), (32, 256, 8, 4), (32, 64, 4, 6),
    ),
    "project_outer": (
        (128, 64, 8, 4), (128, 64, 8, 2), (128, 64, 4, 3), (128, 128, 8, 3), (64, 128, 8, 3), (64, 64, 4, 4),
        (256, 64, 8, 3),
    ),
    "accumulate": (
        (64, 128, 4, 1), (64, 64, 4, 1), (32, 128, 4, 1), (32, 256, 8, 1), (32, 256, 4, 1), (128, 64, 8, 1),
        (128, 128, 8, 1), (64, 256, 8, 1), (16, 256, 4, 1),
    ),
}  # fmt: skip
_SINGLE = {
    "project": ((32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 8, 2), (16, 128, 4, 3)),
    "outer": ((32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 8, 2)),
    "project_outer": ((64, 64, 8, 3), (32, 64, 8, 2), (64, 32, 8, 2)),
    "accumulate": ((32, 64, 4, 1), (32, 128, 8, 1), (64, 64, 8, 1), (16, 128, 4, 1)),
}
_INTERPRETER = ((16, 32, 4, 1), (32, 16, 4, 1))
_MOST_ACCUMULATORS = 128


def candidates(
    target: Target, kernel: str, dtype: torch.dtype, M: int, R: int, *, dropout: bool = False
) -> list[SkinnyConfig]:
    """The tiles of one kernel beside the architecture's own that fit; the large matrix has M rows for vector loads."""
    own = architecture_rank_config(kernel, target, dtype, M, R, aligned=True)
    tiles = _INTERPRETER if target.arch == 0 else (_HALF if dtype.itemsize == 2 else _SINGLE)[kernel]
    height = next_power_of_two(max(M, 16))
    configs = [
        replace(own, block_m=min(block_m, height), block_c=block_c, num_warps=warps, num_stages=stages)
        for block_m, block_c, warps, stages in tiles
    ]
    return [
        config
        for config in dict.fromkeys(configs)
        if config != own
        and shared_bytes(config, dtype, kernel) <= target.shared_memory
        and accumulators(config, kernel, dropout=dropout) <= _MOST_ACCUMULATORS
    ]


def shared_bytes(config: SkinnyConfig, dtype: torch.dtype, kernel: str) -> int:
    """Shared memory that the pipeline of a kernel cannot do without, in bytes: a bound from below."""
    if kernel == "accumulate":
        return 0
    small = config.block_m if kernel == "outer" else config.block_c
    step = config.block_m * config.block_c + small * config.block_r
    return step * max(1, config.num_stages - 1) * dtype.itemsize


def accumulators(config: SkinnyConfig, kernel: str, *, dropout: bool = False) -> int:
    """Registers per thread that hold sums, and under dropout the random words of a tile."""
    tile = config.block_m * config.block_c
    sums = {
        "project": config.block_m * config.block_r,
        "outer": config.block_c * config.block_r,
        "project_outer": (config.block_m + config.block_c) * config.block_r,
        "accumulate": 2 * tile,
    }
    return (sums[kernel] + (tile if dropout else 0)) // (32 * config.num_warps)
