"""What a benchmark measures: shapes, providers, the tensors of one layer, and the formulas of its work.

FLOPs of one layer, M tokens, K in, N out, rank R (a multiply-add is two):

    frozen nn.Linear   forward 2MKN               backward 2MKN (dx)
    trainable weight                              backward 2MKN more (dW)
    LoRA               forward 2MR(K + N) more    backward 2MR(K + 2N) more (g, gA, dB), 2MRK more (dA) if A trains

Bytes that must move at least once, e bytes per element: forward e(MK + NK + MN), backward e(MN + NK + MK); LoRA adds
e(RK + NR + MR) to forward and e(RK + 2NR + MR) to backward, e(MK + RK) more (x, dA) if A trains.
Saved for backward beyond weights: e(MR) for LoRA-FA, e(MK + MR) if A trains, 8 bytes of seed with dropout. LoRA-SP
trains A on J of the K features and B on I of the N: e(M|J| + MR) saved, 2MR|I| for dB, 2MR|J| for dA.
G layers that read one x (Shape.members): everything G times but x, its gradient, and what is kept of x.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorasp.adapter import selection
from lorasp.adapter.selection import Site
from lorasp.config import PartialConfig

MODES = ("forward+backward", "forward")
BASE = "linear"


@dataclass(frozen=True)
class Shape:
    """M tokens, K features in, N features out, rank R; whether there is a bias; how many such layers read one x."""

    M: int
    K: int
    N: int
    R: int
    name: str = ""
    bias: bool = False
    members: int = 1

    def __post_init__(self):
        if min(self.M, self.K, self.N, self.R, self.members) < 1:
            sizes = f"{self.M}, {self.K}, {self.N}, {self.R}, {self.members}"
            raise ValueError(f"Shape: M, K, N, R, members must be >= 1, got {sizes}")

    @property
    def label(self) -> str:
        sizes = f"{self.M}×{self.K}×{self.N} r{self.R}" + (f" ×{self.members}" if self.members > 1 else "")
        return f"{self.name} {sizes}" if self.name else sizes


def _layers(tokens: int, rank: int, bias: bool, **layers: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(tokens, k, n, rank, name, bias) for name, (k, n) in layers.items())


# The distinct nn.Linear shapes of each model; M is the tokens of one GPU micro-batch.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama3-8b": _layers(
        8192, 16, False, q_o=(4096, 4096), k_v=(4096, 1024), gate_up=(4096, 14336), down=(14336, 4096)
    ),
    "roberta-large": _layers(4096, 16, True, attention=(1024, 1024), up=(1024, 4096), down=(4096, 1024)),
    "t5-base": _layers(4096, 16, False, attention=(768, 768), wi=(768, 3072), wo=(3072, 768)),
    "square": (Shape(512, 1024, 1024, 8), Shape(2048, 1024, 1024, 16), Shape(2048, 2048, 2048, 16)),
    "square-large": (Shape(8192, 4096, 4096, 16), Shape(8192, 4096, 4096, 64), Shape(8192, 8192, 8192, 16)),
    "small": tuple(Shape(m, 1024, 1024, 16) for m in (1, 8, 32, 128)),
    "tokens": tuple(Shape(m, 4096, 4096, 16) for m in (1, 8, 32, 128, 512, 2048, 8192, 32768)),
}


@dataclass(frozen=True)
class Provider:
    """What is timed: a kind, for lorasp a backend and a plan, and flags.

    Written `kind[:backend[:plan]][+fa][+sp][+shared][+masters][+prepack]`: peft-half+fa, lorasp, lorasp:cpp+fa+prepack,
    lorasp:triton:fused. fa: A is frozen (LoRA-FA); sp: half of the features of A and B train (LoRA-SP); shared: the
    layers that read one x run as one group; masters: A and B in fp32 under half-precision x; prepack: the frozen weight
    also in the CPU kernels' own layout.
    """

    kind: str
    backend: str = "auto"
    plan: str = "auto"
    freeze_A: bool = False
    masters: bool = False
    prepack: bool = False
    partial: bool = False
    shared: bool = False

    KINDS: ClassVar = {
        "linear": "nn.Linear, weight frozen",
        "linear-train": "nn.Linear, weight trains",
        "peft": "PEFT, default (fp32 adapters)",
        "peft-half": "PEFT, adapters in x's dtype",
        "peft-half-compile": "torch.compile of peft-half",
        "aten": "cuBLAS (MKL, oneDNN) and addmm_, written by hand",
        "lorasp": "lorasp",
    }

    FLAGS: ClassVar = {
        "fa": "freeze_A", "sp": "partial", "shared": "shared", "masters": "masters", "prepack": "prepack",
    }  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> "Provider":
        """Raises ValueError for anything that is not `kind[:backend[:plan]][+flag]...`."""
        name, *flags = text.split("+")
        kind, *rest = name.split(":")
        if kind not in cls.KINDS:
            raise ValueError(f"Provider: kind must be one of {', '.join(cls.KINDS)}, got {kind!r}")
        if len(rest) > 2 or (rest and kind != "lorasp"):
            raise ValueError(f"Provider: only lorasp takes :backend:plan, got {text!r}")
        takes = {"linear": (), "linear-train": (), "lorasp": tuple(cls.FLAGS)}.get(kind, ("fa",))
        for flag in flags:
            if flag not in takes:
                raise ValueError(f"Provider: flags of {kind} are {', '.join(takes) or 'none'}, got {text!r}")
        return cls(kind, *rest, **{field: flag in flags for flag, field in cls.FLAGS.items()})

    @property
    def name(self) -> str:
        parts = [self.kind, self.backend, self.plan]
        while parts[-1] == "auto":
            parts.pop()
        return ":".join(parts) + "".join(f"+{flag}" for flag, field in self.FLAGS.items() if getattr(self, field))

    @property
    def adapts(self) -> bool:
        return not self.kind.startswith("linear")

    @property
    def own_masks(self) -> bool:
        """Whether its dropout draws other masks than lorasp.rng defines."""
        return self.adapts and self.kind != "lorasp"


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass
class Member:
    """The tensors of one layer; dy (M, N) is the gradient that arrives."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor


@dataclass
class Workload:
    """Layers that read one x, which requires grad."""

    shape: Shape
    x: Tensor
    members: tuple[Member, ...]
    scale: float
    dropout_p: float
    references: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def dys(self) -> tuple[Tensor, ...]:
        return tuple(member.dy for member in self.members)


@dataclass
class Candidate:
    """A provider built for a workload. `inputs` are what gradients are taken of, `names` their names."""

    provider: Provider
    workload: Workload
    layers: nn.ModuleList
    calls: tuple[Callable[[Tensor], Tensor], ...]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def forward(self) -> tuple[Tensor, ...]:
        x = self.workload.x
        return tuple(call(x) for call in self.calls)

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.workload.dys)


def with_tokens(shapes: Sequence[Shape], tokens: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, M=tokens) for shape in shapes)


def distinct(shapes: Iterable[Shape]) -> list[Shape]:
    """Every layer once, by its first name: named sets overlap."""
    first: dict[Shape, Shape] = {}
    for shape in shapes:
        first.setdefault(replace(shape, name=""), shape)
    return list(first.values())


def _trained(shape: Shape, provider: Provider) -> tuple[int, int]:
    """(features of x that A trains on, output features that B trains on)."""
    if not provider.partial:
        return shape.K, shape.N
    site = Site("", "", ("",), shape.K, shape.N, shape.R, False)
    chosen = selection.draw(PartialConfig(), site)
    return int(chosen.active_A.sum()), int(chosen.active_B.sum())


def flops(shape: Shape, provider: Provider, mode: str) -> int:
    """Floating-point operations the provider's mathematics needs; the module docstring has the formulas."""
    m, k, n, r = shape.M, shape.K, shape.N, shape.R
    columns, rows = _trained(shape, provider)
    total = 2 * m * k * n + (2 * m * r * (k + rows) if provider.adapts else 0)
    if mode == "forward+backward":
        total += 2 * m * k * n * (2 if provider.kind == "linear-train" else 1)
        if provider.adapts:
            total += 2 * m * r * (k + 2 * rows) + (0 if provider.freeze_A else 2 * m * r * columns)
    return total * shape.members


def min_bytes(shape: Shape, provider: Provider, mode: str, element: int) -> int:
    """Bytes that must move between memory and the cores at least once, `element` bytes per element."""
    m, k, n, r, members = shape.M, shape.K, shape.N, shape.R, shape.members
    columns, rows = _trained(shape, provider)
    count = m * k + members * (n * k + m * n + (r * k + rows * r + m * r if provider.adapts else 0))
    if mode == "forward+backward":
        count += m * k + members * (m * n + n * k)
        count += m * k + members * n * k if provider.kind == "linear-train" else 0
        if provider.adapts:
            count += members * (r * k + 2 * rows * r + m * r)
            count += 0 if provider.freeze_A else m * columns + members * r * columns
    return count * element


def contract_bytes(shape: Shape, provider: Provider, element: int, dropout_p: float) -> int:
    """What lorasp's memory contract lets backward keep beyond weights."""
    if not provider.adapts:
        return shape.M * shape.K * element if provider.kind == "linear-train" else 0
    copies = shape.members if provider.partial and not provider.shared else 1
    seeds = 1 if provider.shared else shape.members
    kept = shape.members * shape.M * shape.R
    kept += 0 if provider.freeze_A else shape.M * _trained(shape, provider)[0] * copies
    return kept * element + (8 * seeds if dropout_p else 0)


def floor(shape: Shape, provider: Provider, mode: str = MODES[0]) -> float:
    """FLOPs over the frozen nn.Linear's: the ratio of a kernel that runs every product at the frozen one's speed."""
    return flops(shape, provider, mode) / flops(shape, Provider(BASE), mode)
