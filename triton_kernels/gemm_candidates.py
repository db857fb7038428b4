"""The plans and tiles that are worth timing for one call, by architecture: what `python -m lorasp tune` searches.

A list here is a proposal and nothing more: what spills is slow, what asks for more than the device has does not launch,
and both are found out on the device. Only shared memory is looked at beforehand.
"""

import torch

from .tuning import ONEPASS_MAX_RANK, GemmConfig, Plan, Target, gemm_config, next_power_of_two, pad_rank

# (block_m, block_c, block_d, num_warps, num_stages). Half precision, rows that suit vector loads, M >= 128; first where
# descriptors feed a tensor core that reads shared memory, then where they feed mma.sync.
_DESCRIPTOR_TILES = (
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 128, 8, 2), (128, 64, 64, 4, 4), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4),
)  # fmt: skip
_SMALL_DESCRIPTOR_TILES = (
    (128, 128, 32, 8, 3), (128, 128, 32, 8, 4), (128, 128, 64, 8, 2), (128, 128, 64, 8, 3), (128, 64, 64, 4, 3),
    (64, 128, 64, 4, 3), (64, 64, 64, 4, 4),
)  # fmt: skip
_POINTER_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4),
    (128, 256, 32, 8, 3), (256, 128, 32, 8, 3), (128, 256, 64, 8, 3), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4),
    (128, 64, 64, 4, 3), (64, 256, 32, 8, 4), (64, 128, 64, 8, 3),
)  # fmt: skip
# The same below 128 rows, without block_m, which is M's next power of two: memory is what they wait for.
_LOW_TILES = (
    (32, 128, 4, 4), (64, 64, 4, 5), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 8, 4),
    (128, 128, 8, 3), (256, 64, 8, 3),
)  # fmt: skip
_UNALIGNED_TILES = ((64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (64, 128, 32, 8, 2), (128, 64, 32, 8, 2))
_SINGLE_TILES = (
    (32, 32, 32, 4, 2), (32, 64, 32, 4, 2), (64, 64, 32, 8, 2), (64, 64, 16, 8, 3), (128, 64, 16, 8, 2),
    (64, 128, 16, 8, 2),
)  # fmt: skip
_INTERPRETER_TILES = ((16, 32, 32, 4, 2), (32, 16, 32, 4, 2))


def plan_candidates(
    target: Target, direction: str, dtype: torch.dtype, dropout: bool, M: int, N: int, K: int, R: int
) -> list[Plan]:
    """Every plan of a call on contiguous operands: with the architecture's own tiles, then with each other that fits.

    From simple to intricate, addmm first. The backward has no one-pass form, and onepass takes R <= 64.
    """
    plans = [Plan("addmm")]
    for name in ("fused", "onepass"):
        if name == "onepass" and (direction == "backward" or R > ONEPASS_MAX_RANK):
            continue
        own = own_tiles(target, name, direction, dtype, dropout, M, N, K, R)
        tma, aligned = _layout(direction, dtype, N, K)
        flatten = target.arch == 90 and not _masked(name, direction, dropout) and R <= 64
        configs = [config for config in _configs(target, dtype, M, tma, aligned, flatten) if config != own]
        fitting = [c for c in configs if shared_bytes(target, c, dtype, name, R) <= target.shared_memory]
        plans += [Plan(name), *(Plan(name, config) for config in fitting)]
    return plans


def own_tiles(
    target: Target, plan: str, direction: str, dtype: torch.dtype, dropout: bool, M: int, N: int, K: int, R: int
) -> GemmConfig:
    """The architecture's own tiles for plan fused or onepass of a call on contiguous operands."""
    tma, aligned = _layout(direction, dtype, N, K)
    extra_rank, masked = _extra_rank(plan, R), _masked(plan, direction, dropout)
    return gemm_config(target, dtype, M, tma=tma, aligned=aligned, dropout=masked, extra_rank=extra_rank)


def shared_bytes(target: Target, config: GemmConfig, dtype: torch.dtype, plan: str, R: int) -> int:
    """Shared memory that the pipeline of a fused GEMM cannot do without, in bytes: a bound from below.

    Steps of both operands, and of lora_A under onepass: num_stages of them in descriptor kernels on tensor cores that
    read shared memory, one less elsewhere, where the step at hand lies in registers. Beside them the piece of the
    output tile that a descriptor stores from.
    """
    step = (config.block_m + config.block_c + _extra_rank(plan, R)) * config.block_d
    steps = config.num_stages if _reads_shared(target) and config.tma else max(1, config.num_stages - 1)
    store = config.block_m * config.block_c // config.subtiles if config.tma else 0
    return (step * steps + store) * dtype.itemsize


def _layout(direction: str, dtype: torch.dtype, N: int, K: int) -> tuple[bool, bool]:
    """Whether contiguous operands suit tensor descriptors, and whether their rows suit vector loads."""
    return dtype.itemsize == 2 and N % 8 == K % 8 == 0, K % 16 == 0 and (direction == "forward" or N % 16 == 0)


def _extra_rank(plan: str, R: int) -> int:
    """BLOCK_R of onepass's second accumulator."""
    return pad_rank(R, ONEPASS_MAX_RANK) if plan == "onepass" else 0


def _masked(plan: str, direction: str, dropout: bool) -> bool:
    """Whether the tile forms a mask: the forward of plan fused takes xa with the mask in it."""
    return dropout and (direction == "backward" or plan == "onepass")


def _reads_shared(target: Target) -> bool:
    """Whether the tensor cores take operands from shared memory: wgmma and tcgen05, not mma.sync."""
    return 90 <= target.arch < 120


def _configs(target: Target, dtype: torch.dtype, M: int, tma: bool, aligned: bool, flatten: bool) -> list[GemmConfig]:
    if target.arch == 0:
        return [GemmConfig(*tile, group_m=2, tma=tma) for tile in _INTERPRETER_TILES]
    if dtype.itemsize == 4:
        return [GemmConfig(*tile) for tile in _SINGLE_TILES]
    if not aligned and not (tma and target.arch >= 90):
        return [GemmConfig(*tile) for tile in _UNALIGNED_TILES]
    height = next_power_of_two(max(M, 16))
    if height < 128:
        low = [GemmConfig(height, *tile) for tile in _LOW_TILES]
        return low if aligned else []
    if not tma or target.arch < 90:
        return [GemmConfig(*tile) for tile in _POINTER_TILES]
    return [
        GemmConfig(*tile, tma=True, flatten=flat, subtiles=2)
        for tile in (_DESCRIPTOR_TILES if _reads_shared(target) else _SMALL_DESCRIPTOR_TILES)
        for flat in ((False, True) if flatten else (False,))
    ]
