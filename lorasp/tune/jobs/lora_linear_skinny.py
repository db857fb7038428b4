"""The rank-R products' tiles: a job per kernel, dtype, dropout and sizes of the large matrix they stream."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorasp.triton_kernels import lora_linear_skinny_candidates as proposals
from lorasp.triton_kernels.tuning import SkinnyConfig, Target, Tiles, architecture_rank_config
from lorasp.tune.jobs.lora_linear import DROPOUT
from lorasp.tune.jobs.tiles import TileJob

# Columns of the large matrix: K or N of the layers; ranks and rows a factor of four apart serve what lies between.
COLUMNS = (4096, 14336, 1024)
RANKS = (16, 64)
TOKENS = (8192, 512, 32)
KERNELS = ("project", "outer", "project_outer", "accumulate")


@dataclass(frozen=True)
class RankJob(TileJob):
    kernel: str
    dtype: torch.dtype
    dropout: bool
    C: int
    R: int
    M: int

    operator: ClassVar[str] = "lora_linear_skinny"
    varies: ClassVar[str] = "M"

    def __str__(self) -> str:
        drop = "dropout" if self.dropout else "no dropout"
        return f"{self.kernel} {self.M}×{self.C} r{self.R} {self.dtype_name}, {drop}"

    @property
    def group(self) -> "RankJob":
        return replace(self, M=0)

    @property
    def title(self) -> str:
        return str(self).replace(f" {self.M}×{self.C} ", f" C = {self.C} ")

    @property
    def label(self) -> str:
        return str(self.M)

    @property
    def kind(self) -> tuple:
        return self.kernel, self.dtype, self.dropout, self.R

    def kind_title(self, members: "Sequence[RankJob]") -> str:
        columns = ", ".join(dict.fromkeys(str(job.C) for job in members))
        tokens = ", ".join(map(str, sorted({job.M for job in members})))
        return f"{str(self).replace(f' {self.M}×{self.C} ', ' ')}\nC = {columns}\nM = {tokens}"

    @property
    def size(self) -> int:
        return self.M * self.C

    def neighbour(self, tiles: Tiles) -> "RankJob":
        """A small call with tails, whose rows still suit vector loads, at the highest rank that a row speaks for."""
        most = 64 if self.kernel == "project_outer" else 2 * self.R
        return replace(self, M=min(203, self.M + 3), C=33 * 16, R=min(2 * self.R, most))

    def own_config(self, target: Target) -> SkinnyConfig:
        return architecture_rank_config(self.kernel, target, self.dtype, self.M, self.R, aligned=True)

    def other_configs(self, target: Target) -> list[SkinnyConfig]:
        return proposals.candidates(target, self.kernel, self.dtype, self.M, self.R, dropout=self.dropout)

    def use_of(self, target: Target, config: SkinnyConfig) -> tuple[int, int]:
        shared = proposals.shared_bytes(config, self.dtype, self.kernel)
        return shared, proposals.accumulators(config, self.kernel, dropout=self.dropout)


def make_jobs(options: argparse.Namespace) -> list[RankJob]:
    """Every job of the options, project_outer only without dropout and with ranks that it takes."""
    columns = dict.fromkeys(size for shape in options.shapes for size in shape) if options.shapes else COLUMNS
    return [
        RankJob(kernel, dtype, dropout, C, R, M)
        for dtype, dropout, kernel, C, R, M in itertools.product(
            options.dtypes, DROPOUT[options.dropout], KERNELS, columns, options.ranks or RANKS,
            options.tokens or TOKENS,
        )
        if kernel != "project_outer" or (not dropout and R <= 64)
    ]  # fmt: skip
