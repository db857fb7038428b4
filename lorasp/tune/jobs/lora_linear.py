"""lora_linear's plans: jobs for forward and backward of layers, timed against the frozen nn.Linear."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorasp.triton_kernels.gemm_candidates import own_tiles, plan_candidates, shared_bytes
from lorasp.triton_kernels.tuning import ONEPASS_MAX_RANK, PLANS, GemmConfig, Plan, Target
from lorasp.tune.jobs.dtype import NamedDtype

# (K, N): LLaMA 8B's q and o, gate and up, down, k and v; RoBERTa-large's up, down and attention.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (1024, 4096), (1024, 1024))
RANKS = (16, 8, 64)
# Far apart first: where the time ends early, the nearest row is still not far.
TOKENS = (8192, 1, 512, 32768, 32, 2048, 8, 128)
DIRECTIONS = ("forward", "backward")
DROPOUT = {"off": (False,), "on": (True,), "both": (False, True)}


@dataclass(frozen=True)
class Job(NamedDtype):
    """The calls that one row of a plan table speaks for, by the names of the row."""

    direction: str
    dtype: torch.dtype
    dropout: bool
    N: int
    K: int
    R: int
    M: int

    operator: ClassVar[str] = "lora_linear"
    section: ClassVar[str] = "rows"
    base: ClassVar[str] = "nn.Linear"
    safe: ClassVar[Plan] = Plan("addmm")
    names: ClassVar[Sequence[str]] = PLANS[1:]
    heads: ClassVar[Sequence[str]] = ("shared KiB", "tiles, largest call", "waves")
    varies: ClassVar[str] = "M"

    def __str__(self) -> str:
        return f"{self.direction} {self.M}×{self.K}×{self.N} r{self.R} {self.dtype_name}, {self._drop}"

    @property
    def _drop(self) -> str:
        return "dropout" if self.dropout else "no dropout"

    @property
    def group(self) -> "Job":
        """The job of the same layer that stands for its every M."""
        return replace(self, M=0)

    @property
    def title(self) -> str:
        return f"{self.direction} {self.K}×{self.N} r{self.R}, {self.dtype_name}, {self._drop}"

    @property
    def label(self) -> str:
        return str(self.M)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind whose candidates are the same are one table of --dry-run, and one set of compilations."""
        return self.direction, self.dtype, self.dropout, self.R

    def kind_title(self, members: "Sequence[Job]") -> str:
        layers = ", ".join(dict.fromkeys(f"{job.K}×{job.N}" for job in members))
        tokens = ", ".join(map(str, sorted({job.M for job in members})))
        return f"{self.direction} r{self.R}, {self.dtype_name}, {self._drop}\nK×N = {layers}\nM = {tokens}"

    @property
    def size(self) -> tuple[int, int]:
        return self.M, self.N * self.K

    def candidates(self, target: Target, plans: Sequence[str] = PLANS) -> list[Plan]:
        """What the search tries, addmm first, limited to the plans named (addmm is always among them)."""
        found = plan_candidates(target, self.direction, self.dtype, self.dropout, self.M, self.N, self.K, self.R)
        return [plan for plan in found if plan.name == "addmm" or plan.name in plans]

    def neighbour(self, plan: Plan) -> "Job":
        """A small call with a tail in every dimension and twice the rank: a row serves calls up to a factor of two
        away."""
        most = ONEPASS_MAX_RANK if plan.name == "onepass" else 2 * self.R
        # Odd multiples of 8: no tile divides them, and tensor descriptors still take them.
        return replace(self, M=min(203, self.M + 3), N=41 * 8, K=33 * 8, R=min(2 * self.R, most))

    def footprint(self, target: Target, plan: Plan) -> list[str]:
        """KiB of shared memory the pipeline needs, the output's number of tiles, how often they fill the device."""
        if plan.name == "addmm":
            return ["", "", ""]
        call = (self.direction, self.dtype, self.dropout, self.M, self.N, self.K, self.R)
        gemm = plan.gemm or own_tiles(target, plan.name, *call)
        tiles = -(-self.M // gemm.block_m) * -(-(self.N if self.direction == "forward" else self.K) // gemm.block_c)
        kib = shared_bytes(target, gemm, self.dtype, plan.name, self.R) / 1024
        return [f"{kib:.0f}", str(tiles), f"{tiles / target.sm_count:.1f}"]

    def row(self, plan: Plan) -> dict:
        row = {
            "direction": self.direction, "dtype": self.dtype_name, "dropout": self.dropout, "N": self.N, "K": self.K,
            "R": self.R, "M": self.M, "plan": plan.name,
        }  # fmt: skip
        return row if plan.gemm is None else row | {"gemm": _changed_fields(plan.gemm)}


def _changed_fields(gemm: GemmConfig) -> dict:
    """Without the fields that are at their defaults."""
    least = vars(GemmConfig(gemm.block_m, gemm.block_c, gemm.block_d, gemm.num_warps, gemm.num_stages))
    required = ("block_m", "block_c", "block_d", "num_warps", "num_stages")
    return {name: value for name, value in vars(gemm).items() if name in required or value != least[name]}


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Every job of the options: all M of one layer together, the first dtype, shape and rank first."""
    return [
        Job(direction, dtype, dropout, N, K, R, M)
        for dtype, dropout, (K, N), R, direction, M in itertools.product(
            options.dtypes, DROPOUT[options.dropout], options.shapes or SHAPES,
            options.ranks or RANKS, DIRECTIONS, options.tokens or TOKENS,
        )
    ]  # fmt: skip
