"""Plan-table files, configs/<device>.json: what their rows are, and reading them.

<device> is the CUDA name in lower case with "_" for all but letters and digits; configs/default.json serves every
device without a file:

    {"device": str, "measured": bool, "provenance": {str: str},
     "default": {"forward": plan, "backward": plan},
     "rows": [{"direction": "forward" | "backward", "dtype": "bfloat16" | "float16" | "float32", "dropout": bool,
               "N": int, "K": int, "R": int, "M": int, "plan": plan, "gemm": {GemmConfig fields} | absent}, …],
     "dropkey_attention": [{"kernel": …, "dtype": …, "head_dim": …, "logits": …, "causal": …,
                            "tiles": {…} | absent}, …],
     "lora_linear_skinny": [{"kernel": …, "dtype": …, "dropout": …, "C": …, "R": …, "M": …, "tiles": {…} | absent}, …]}

"rows" chooses plans. The last two, which may be absent, hold the tiles of single kernels (TILE_SECTIONS); a row without
"tiles" says that nothing measured beats the architecture's own.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

PLANS = ("auto", "addmm", "fused", "onepass")


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of a fused GEMM: out tile (block_m, block_c), steps of block_d over the dimension summed over.

    tma: persistent kernel with tensor descriptors; flatten: one pipeline across its tiles; subtiles: pieces (1 or 2)
    the output tile is stored in, to save shared memory.
    """

    block_m: int
    block_c: int
    block_d: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    tma: bool = False
    flatten: bool = False
    subtiles: int = 1


@dataclass(frozen=True)
class Plan:
    """What one GEMM runs: name is addmm, fused or onepass; gemm is None where the architecture's tiles are meant."""

    name: str
    gemm: GemmConfig | None = None

    @property
    def own(self) -> bool:
        return self.gemm is None

    def __str__(self) -> str:
        """`fused 128×256×64 8 warps 3 stages, tma`, or the name alone on the architecture's own tiles."""
        g = self.gemm
        if g is None:
            return self.name
        flags = "".join(f", {name}" for name in ("tma", "flatten") if getattr(g, name))
        return f"{self.name} {g.block_m}×{g.block_c}×{g.block_d} {g.num_warps} warps {g.num_stages} stages{flags}"


@dataclass(frozen=True)
class Tiles:
    """Tiles of one kernel: (field, value) pairs that replace the architecture's own; none of them for just those."""

    fields: tuple[tuple[str, int], ...] = ()

    @property
    def own(self) -> bool:
        return not self.fields

    @property
    def name(self) -> str:
        return "own tiles" if self.own else "tiles"

    def __str__(self) -> str:
        """`128×64 8 warps 3 stages`."""
        if self.own:
            return self.name
        *blocks, warps, stages = (value for _, value in self.fields)
        return f"{'×'.join(map(str, blocks))} {warps} warps {stages} stages"


@dataclass(frozen=True)
class TileSection:
    """The rows of one operator's kernels: key names what calls a row speaks for (int: any size), tiles what it sets.

    doubled: sizes that shared memory grows with; a row speaks for up to twice its own, where its tiles were run.
    """

    key: Mapping[str, object]
    tiles: tuple[str, ...]
    doubled: tuple[str, ...] = ()


_DTYPES = ("bfloat16", "float16", "float32")
_ROW = {
    "direction": ("forward", "backward"), "dtype": _DTYPES, "dropout": (False, True),
    "N": int, "K": int, "R": int, "M": int, "plan": PLANS[1:],
}  # fmt: skip
ROW_KEY = tuple(_ROW)[:-1]


# head_dim: the largest that the tiles serve. listed: plain logits whose keys come from a list of the kept ones.
TILE_SECTIONS = {
    "dropkey_attention": TileSection(
        {
            "kernel": ("forward", "dq", "dkv"), "dtype": _DTYPES, "head_dim": (64, 128, 256),
            "logits": ("plain", "listed", "masked"), "causal": (False, True),
        },
        ("block_m", "block_n", "num_warps", "num_stages"),
    ),
    "lora_linear_skinny": TileSection(
        {
            "kernel": ("project", "outer", "project_outer", "accumulate"), "dtype": _DTYPES, "dropout": (False, True),
            "C": int, "R": int, "M": int,
        },
        ("block_m", "block_c", "num_warps", "num_stages"),
        doubled=("R",),
    ),
}  # fmt: skip


def table_file(device: str) -> str:
    """The name of a device's file in configs/."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()) + ".json"


def read_table(path: Path) -> dict:
    """The table of one file. Raises ValueError that names the file and what in it is not as the module says."""

    def expect(right: bool, what: str, got: object) -> None:
        if not right:
            raise ValueError(f"{path.name}: {what}, got {got!r}")

    def expect_fields(where: str, have: object, needed: Iterable[str], optional: Iterable[str] = ()) -> None:
        expect(isinstance(have, dict), f"{where} must be an object", have)
        expect(set(needed) <= set(have), f"{where} must have {', '.join(needed)}", ", ".join(have))
        unknown = sorted(set(have) - {*needed, *optional})
        expect(not unknown, f"{where} must have no other fields than {', '.join([*needed, *optional])}", unknown)

    def expect_values(where: str, row: dict, allowed: Mapping[str, object]) -> None:
        for name, values in allowed.items():
            if values is int:
                expect(_is_size(row[name]), f"{where}: {name} must be a whole number above 0", row[name])
            else:
                right = any(row[name] == value and type(row[name]) is type(value) for value in values)
                expect(right, f"{where}: {name} must be one of {', '.join(map(str, values))}", row[name])

    try:
        table = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: must be JSON: {error}") from error
    expect_fields("the file", table, ("device", "measured", "provenance", "default", "rows"), TILE_SECTIONS)
    expect_fields("default", table["default"], ("forward", "backward"))
    for direction, plan in table["default"].items():
        expect(plan in PLANS[1:], f"default {direction} must be one of {', '.join(PLANS[1:])}", plan)
    expect(isinstance(table["rows"], list), "rows must be a list", table["rows"])
    flags = {field.name: type(field.default) for field in fields(GemmConfig) if field.default is not MISSING}
    sizes = [field.name for field in fields(GemmConfig) if field.default is MISSING]
    for i, row in enumerate(table["rows"]):
        expect_fields(f"row {i}", row, _ROW, ("gemm",))
        expect_values(f"row {i}", row, _ROW)
        expect_fields(f"row {i}: gemm", row.get("gemm", dict.fromkeys(sizes)), sizes, flags)
        for name, value in row.get("gemm", {}).items():
            flag = flags.get(name) is bool
            right = isinstance(value, bool) if flag else _is_size(value)
            expect(
                right, f"row {i}: gemm {name} must be {'true or false' if flag else 'a whole number above 0'}", value
            )
    for name, section in TILE_SECTIONS.items():
        rows = table.get(name, [])
        expect(isinstance(rows, list), f"{name} must be a list", rows)
        for i, row in enumerate(rows):
            where = f"{name} {i}"
            expect_fields(where, row, section.key, ("tiles",))
            expect_values(where, row, section.key)
            tiles = row.get("tiles", dict.fromkeys(section.tiles, 16))
            expect_fields(f"{where}: tiles", tiles, section.tiles)
            for field, value in tiles.items():
                least = {"num_stages": 1, "num_warps": 1}.get(field, 16)  # tl.dot takes no smaller blocks
                right = _is_size(value) and value >= least and (field == "num_stages" or value & (value - 1) == 0)
                kind = "whole number" if field == "num_stages" else "power of two"
                expect(right, f"{where}: tiles {field} must be a {kind} from {least} on", value)
    return table


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0
