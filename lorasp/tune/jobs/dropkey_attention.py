"""dropkey_attention's tiles: a job per kernel, dtype, head dimension, kind of logits, causal or not."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lorasp.triton_kernels import dropkey_attention_candidates as proposals
from lorasp.triton_kernels.dropkey_attention_tiles import AttentionConfig, architecture_config, head_dim_bucket
from lorasp.triton_kernels.tuning import Target, Tiles
from lorasp.tune.jobs.tiles import TileJob

# (B, H, S, D): 16384 tokens of a model 2048 wide.
SIZES = ((4, 16, 4096, 128), (4, 32, 4096, 64))
# What every call of the operator runs first. Masked: the element pattern, which takes the most registers.
LOGITS = ("listed", "plain", "masked")
KERNELS = ("forward", "dq", "dkv")


@dataclass(frozen=True)
class AttentionJob(TileJob):
    kernel: str
    dtype: torch.dtype
    logits: str
    causal: bool
    B: int
    H: int
    S: int
    head_dim: int

    operator: ClassVar[str] = "dropkey_attention"
    varies: ClassVar[str] = "kernel"

    def __str__(self) -> str:
        return f"{self.kernel} {self._call}"

    @property
    def _call(self) -> str:
        sizes = "×".join(map(str, (self.B, self.H, self.S, self.head_dim)))
        return f"{sizes}, {self.dtype_name}, {self.logits}" + ", causal" * self.causal

    @property
    def group(self) -> "AttentionJob":
        return replace(self, kernel="")

    @property
    def title(self) -> str:
        return f"attention {self._call}"

    @property
    def label(self) -> str:
        return self.kernel

    @property
    def kind(self) -> tuple:
        return self.kernel, self.dtype, self.logits, self.causal, self.head_dim

    def kind_title(self, members: "Sequence[AttentionJob]") -> str:
        return f"{self.kernel} D = {self.head_dim}, {self.dtype_name}, {self.logits}" + ", causal" * self.causal

    @property
    def size(self) -> int:
        return self.B * self.H * self.S

    def neighbour(self, tiles: Tiles) -> "AttentionJob":
        """A small call with tails, and every head of it compared; an odd multiple of 8 keeps the compiled kernels."""
        return replace(self, B=2, H=3, S=min(41 * 8, self.S + 8))

    def own_config(self, target: Target) -> AttentionConfig:
        return architecture_config(target, self.dtype, self.head_dim, self.kernel, self.logits)

    def other_configs(self, target: Target) -> list[AttentionConfig]:
        return proposals.candidates(target, self.dtype, self.head_dim, self.kernel, self.logits)

    def use_of(self, target: Target, config: AttentionConfig) -> tuple[int, int]:
        call = config, self.dtype, self.head_dim, self.kernel, self.logits
        return proposals.shared_bytes(target, *call), proposals.accumulators(config, self.head_dim, self.kernel)

    def row(self, tiles: Tiles) -> dict:
        return super().row(tiles) | {"head_dim": head_dim_bucket(self.head_dim)}


def make_jobs(options: argparse.Namespace) -> list[AttentionJob]:
    """Every job of the options: the kernels of one call together, key lists first."""
    return [
        AttentionJob(kernel, dtype, logits, causal, *sizes)
        for dtype, logits, sizes, causal, kernel in itertools.product(
            options.dtypes, LOGITS, options.sizes or SIZES, (True, False), KERNELS
        )
    ]
