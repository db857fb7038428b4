"""Which plan and which tiles a call runs with: architecture defaults plus measured tables, one file per device.

plan_table.py says what a table holds. A row speaks for calls of its direction, dtype and dropout whose N, K and R lie
within a factor of two of its own. Among the rows that speak, the nearest in (log N + log K, log R) and then in log M
decides. Where none speaks, "default" does, and the tiles are the architecture's. A device that nobody measured runs
`addmm`: cuBLAS keeps the frozen product at its own speed there.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from .plan_table import PLANS, TILE_SECTIONS, GemmConfig, Plan, Tiles, read_table, table_file

ONEPASS_MAX_RANK = 64
_CONFIG_DIR = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Target:
    """The hardware of a launch. arch: 10·major + minor, 0 for the interpreter; shared_memory: bytes per block."""

    name: str
    arch: int
    sm_count: int
    shared_memory: int


@dataclass(frozen=True)
class SkinnyConfig:
    """Tiles of a rank-R product: (block_m, block_c) of the large matrix, block_r columns of the small one."""

    block_m: int
    block_c: int
    block_r: int
    num_warps: int
    num_stages: int


# Opt-in shared memory per block in bytes (CUDA programming guide, "Technical Specifications per Compute Capability").
_SHARED_MEMORY = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 110: 232448}
_SMALLEST_SHARED_MEMORY = 101376
_TYPICAL_SM_COUNT = {80: 108, 90: 132, 100: 148, 120: 170}
INTERPRETER = Target("interpreter", arch=0, sm_count=4, shared_memory=_SMALLEST_SHARED_MEMORY)


def target_of_arch(arch: int) -> Target:
    """The target that stands for an architecture where no device is at hand."""
    return Target(
        f"sm_{arch}", arch, _TYPICAL_SM_COUNT.get(arch, 64), _SHARED_MEMORY.get(arch, _SMALLEST_SHARED_MEMORY)
    )


@lru_cache
def target_of_device(device: torch.device) -> Target:
    """The target of a tensor's device. CPU tensors are the interpreter's."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    arch = 10 * properties.major + properties.minor
    limit = getattr(properties, "shared_memory_per_block_optin", target_of_arch(arch).shared_memory)
    return Target(properties.name, arch, properties.multi_processor_count, limit)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pad_rank(R: int, most: int) -> int:
    """BLOCK_R: a power of two, at least tl.dot's 16, at most `most` (the rest is looped over)."""
    return min(max(next_power_of_two(R), 16), most)


def _fit_stages(target: Target, stage_bytes: int, fixed_bytes: int, most: int) -> int:
    return max(1, min(most, (target.shared_memory - fixed_bytes) // stage_bytes))


def gemm_config(
    target: Target,
    dtype: torch.dtype,
    M: int,
    *,
    tma: bool,
    aligned: bool,
    dropout: bool = False,
    extra_rank: int = 0,
) -> GemmConfig:
    """The architecture's default tiles for a fused GEMM: no variant spills, none exceeds its shared memory.

    tma: the operands suit tensor descriptors; aligned: their rows suit vector loads; dropout: a mask is formed in the
    tile, which one pipeline across tiles does not allow; extra_rank: BLOCK_R of onepass's second accumulator.
    """
    if target.arch == 0:
        return GemmConfig(32, 32, 32, num_warps=4, num_stages=2, group_m=2, tma=tma)
    wide_rank = extra_rank > 32
    if dtype.itemsize == 4:
        return GemmConfig(32, 32 if wide_rank and not aligned else 64, 32, num_warps=8, num_stages=2)
    height = min(128, next_power_of_two(max(M, 16)))
    if not tma and not aligned:
        return GemmConfig(min(height, 64), 64, 32, num_warps=8 if wide_rank else 4, num_stages=2)
    if height < 128:
        stages = _fit_stages(target, 128 * (height + 128), 16384, 4)
        return GemmConfig(height, 128, 64, num_warps=8 if wide_rank else 4, num_stages=stages)
    if tma and 90 <= target.arch < 120:
        if dropout or wide_rank:
            return GemmConfig(128, 128, 64, num_warps=8, num_stages=4, tma=True, subtiles=2)
        return GemmConfig(128, 256, 64, num_warps=8, num_stages=3, tma=True, flatten=target.arch == 90, subtiles=2)
    if tma and target.arch >= 120:
        return GemmConfig(128, 128, 32, num_warps=8, num_stages=3, tma=True, subtiles=2)
    depth = 64 if target.shared_memory >= _SHARED_MEMORY[80] else 32
    return GemmConfig(64 if dropout or wide_rank else 128, 128, depth, num_warps=8, num_stages=3)


def skinny_config(target: Target, dtype: torch.dtype, M: int, R: int, *, aligned: bool) -> SkinnyConfig:
    """Tiles for the products that stream one (M, C) matrix past a rank-R one."""
    if target.arch == 0:
        return SkinnyConfig(32, 32, pad_rank(R, 32), num_warps=4, num_stages=2)
    height = min(64, next_power_of_two(max(M, 16)))
    if dtype.itemsize == 4 or not aligned:
        block_c, block_r = (64, pad_rank(R, 32)) if aligned or dtype.itemsize == 2 else (32, pad_rank(R, 16))
        return SkinnyConfig(min(height, 32), block_c, block_r, num_warps=8, num_stages=2)
    block_r = pad_rank(R, 128)
    # Twice as wide at rank 64 only where wgmma reads its operands from shared memory: mma.sync spills there.
    block_c = 128 if block_r <= (64 if 90 <= target.arch < 120 else 32) else 64
    stage_bytes = 2 * (height * block_c + max(height, block_c) * block_r)
    num_warps = 4 if target.arch == 90 else 8
    return SkinnyConfig(height, block_c, block_r, num_warps, _fit_stages(target, stage_bytes, 32768, 4))


def one_pass_config(target: Target, dtype: torch.dtype, M: int, R: int, *, aligned: bool) -> SkinnyConfig:
    """Tiles of the pass over dy that forms g and dB: tall, because each block_m rows cost one set of dB's partials."""
    if target.arch == 0:
        return skinny_config(target, dtype, M, R, aligned=aligned)
    height = min(128 if dtype.itemsize == 2 and aligned else 64, next_power_of_two(max(M, 16)))
    return SkinnyConfig(height, 64, pad_rank(R, 64), num_warps=8, num_stages=3 if dtype.itemsize == 2 else 2)


def group_config(
    target: Target, dtype: torch.dtype, M: int, ranks: list[int], *, aligned: bool, gather: bool, dropout: bool
) -> SkinnyConfig:
    """Tiles of the pass over x for several members: one accumulator of block_r columns per member.

    gather: x[:, J] is stored beside them; dropout: a mask per member is formed in the tile.
    """
    block_r = pad_rank(max(ranks), 32 if dtype.itemsize == 2 else 16)
    config = skinny_config(target, dtype, M, len(ranks) * block_r, aligned=aligned)
    num_warps = 8 if gather or dropout else config.num_warps
    return replace(config, block_c=min(config.block_c, 64), block_r=block_r, num_warps=num_warps)


def columns_config(target: Target, dtype: torch.dtype, M: int, R: int, *, aligned: bool) -> SkinnyConfig:
    """Tiles of dA from gathered columns under dropout: low, because single features take a Philox call per element."""
    config = skinny_config(target, dtype, M, R, aligned=aligned)
    return replace(
        config, block_m=min(config.block_m, 32), block_c=min(config.block_c, 64), block_r=min(config.block_r, 64)
    )


def accumulate_config(
    target: Target, dtype: torch.dtype, M: int, R: int, *, aligned: bool, members: int = 1
) -> SkinnyConfig:
    """Tiles of the in-place rank-R update; members: how many products, each with a mask of its own, are summed."""
    if target.arch == 0:
        return skinny_config(target, dtype, M, R, aligned=aligned)
    wide = dtype.itemsize == 2 and aligned
    height, width = min(64 if wide and members == 1 else 32, next_power_of_two(max(M, 16))), 128 if wide else 64
    return SkinnyConfig(height, width, pad_rank(R, 32 if wide else 16), num_warps=8, num_stages=1)


def split(target: Target, programs: int, blocks: int, stream_bytes: int, partial_bytes: int) -> int:
    """How many programs share one sum: enough for two waves of the device, while partials stay cheap.

    programs: without a split; blocks: steps of the sum, an upper bound; stream_bytes: what the kernel reads once;
    partial_bytes: one set of partials. Written and read once, they may add a quarter to the kernel's bytes.
    """
    wanted = ceil_div(2 * target.sm_count, programs)
    affordable = stream_bytes // max(1, 8 * partial_bytes)
    return max(1, min(wanted, blocks, affordable))


def one_pass_over_dy(M: int, N: int, R: int, itemsize: int, block_m: int) -> bool:
    """Whether g and dB from one pass over dy move fewer bytes than two kernels that each read dy.

    One pass saves M·N·itemsize and writes, then reads, cdiv(M, block_m)·N·R partials of dB in fp32.
    """
    partials = 4 * ceil_div(M, block_m) * N * R
    return R <= 64 and 2 * partials < M * N * itemsize


def rank_config(
    kernel: str, target: Target, dtype: torch.dtype, M: int, C: int, R: int, *, aligned: bool, dropout: bool = False
) -> SkinnyConfig:
    """Tiles of kernel project, outer, project_outer or accumulate of lora_linear_skinny.py; the large matrix is (M, C).

    aligned: its rows suit vector loads, as those of measured calls do; the others run on the architecture's tiles.
    """
    own = architecture_rank_config(kernel, target, dtype, M, R, aligned=aligned)
    call = {"dtype": str(dtype).removeprefix("torch."), "dropout": dropout, "C": C, "R": R, "M": max(M, 1)}
    return chosen_tiles(target, "lora_linear_skinny", kernel, own, **call) if aligned else own


def architecture_rank_config(
    kernel: str, target: Target, dtype: torch.dtype, M: int, R: int, *, aligned: bool
) -> SkinnyConfig:
    """What rank_config says of a device that nobody measured."""
    choose = {"project_outer": one_pass_config, "accumulate": accumulate_config}.get(kernel, skinny_config)
    return choose(target, dtype, M, R, aligned=aligned)


_forced: dict[tuple[str, str], Tiles] = {}
_tables_read = 0  # how often the tables were forgotten


@contextlib.contextmanager
def forced_tiles(operator: str, kernel: str, tiles: Tiles) -> Iterator[None]:
    """Inside the block that kernel runs on these tiles, whatever a table says: how `lorasp tune` tries them."""
    global _forced
    before, _forced = _forced, _forced | {(operator, kernel): tiles}
    try:
        yield
    finally:
        _forced = before


def tiles_in_force() -> tuple:
    """What chosen_tiles depends on beside its arguments: a key for who keeps what it chose."""
    return _tables_read, *_forced.items()


def chosen_tiles(target: Target, operator: str, kernel: str, own, **call):
    """The config of one launch: `own`, with what forced_tiles or else the device's table says of such a call.

    call: the other fields of the operator's TILE_SECTIONS. A table's row speaks for calls whose sizes lie within a
    factor of four of its own, up to twice where `doubled` says so, and whose other fields are the same; the nearest one
    decides.
    """
    tiles = _forced.get((operator, kernel))
    if tiles is None:
        tiles = _measured_tiles(target, operator, (("kernel", kernel), *call.items()))
    return replace(own, **dict(tiles.fields))


@lru_cache(maxsize=4096)
def _measured_tiles(target: Target, operator: str, call: tuple[tuple[str, object], ...]) -> Tiles:
    section = TILE_SECTIONS[operator]
    key = section.key
    same = {name: value for name, value in call if key[name] is not int}
    sizes = {name: value for name, value in call if key[name] is int}
    rows = [
        row
        for row in load_table(target.name).get(operator, ())
        if all(row[name] == value for name, value in same.items())
        and all(_apart(row, **{name: value}) <= 2 for name, value in sizes.items())
        and all(sizes[name] <= 2 * row[name] for name in section.doubled)
    ]
    row = min(rows, key=lambda row: _apart(row, **sizes), default={})
    return Tiles(tuple(row.get("tiles", {}).items()))


def _apart(row: dict, **sizes: int) -> float:
    """How many doublings lie between a row's sizes and these."""
    return sum(abs(math.log2(row[name] / size)) for name, size in sizes.items())


def forget_tables() -> None:
    """Read the files again: for who has written one."""
    global _tables_read
    _tables_read += 1
    load_table.cache_clear()
    select_plan.cache_clear()
    _measured_tiles.cache_clear()


@lru_cache
def load_table(name: str) -> dict:
    """The table of a device name, configs/default.json where it has none. Raises ValueError for a malformed file."""
    path = _CONFIG_DIR / table_file(name)
    path = path if path.exists() else _CONFIG_DIR / "default.json"
    return read_table(path) | {"file": path.name}


@lru_cache(maxsize=4096)
def select_plan(
    plan: str | Plan,
    direction: str,
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    dropout: bool,
    target: Target,
    operator: str = "lora_linear",
) -> Plan:
    """The plan of one call: `plan` itself where it is forced, else the table's choice, on any device.

    plan: a name, or a Plan to run with these very tiles. direction: "forward" or "backward", whose dx has no one-pass
    form: onepass means fused there. Raises ValueError for an unknown plan.
    """
    if isinstance(plan, Plan):
        return replace(plan, name="fused") if direction == "backward" and plan.name == "onepass" else plan
    if plan not in PLANS:
        raise ValueError(f"{operator}: plan must be one of {', '.join(PLANS)}, got {plan!r}")
    table = load_table(target.name)
    dtype_name = str(dtype).removeprefix("torch.")

    rows = [
        row
        for row in table["rows"]
        if (row["direction"], row["dtype"], row["dropout"]) == (direction, dtype_name, dropout)
        and (row["plan"] == plan or (plan == "auto" and (row["plan"] != "onepass" or R <= ONEPASS_MAX_RANK)))
        and max(_apart(row, N=N), _apart(row, K=K), _apart(row, R=R)) <= 1
    ]
    row = min(rows, key=lambda row: (_apart(row, N=N, K=K), _apart(row, R=R), _apart(row, M=max(M, 1))), default=None)
    if row is None:
        chosen = Plan(table["default"][direction] if plan == "auto" else plan)
    else:
        chosen = Plan(row["plan"], GemmConfig(**row["gemm"]) if "gemm" in row else None)
    return replace(chosen, name="fused") if direction == "backward" and chosen.name == "onepass" else chosen


def plan_table(device: torch.device | None = None) -> dict:
    """The table in use on `device` (default: the current CUDA device), its "file" named; `lorasp info` shows it."""
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return load_table(target_of_device(device).name)
