"""What a benchmark measures: shapes, providers, the tensors of one layer, and the formulas of its work.

FLOPs of one layer, M tokens, K in, N out, rank R (a multiply-add is two):

    frozen nn.Linear   forward 2MKN               backward 2MKN (dx)
    trainable weight                              backward 2MKN more (dW)
    LoRA               forward 2MR(K + N) more    backward 2MR(K + 2N) more (g, gA, dB), 2MRK more (dA) if A trains

Bytes that must move at least once, e bytes per element: forward e(MK + NK + MN), backward e(MN + NK + MK); LoRA adds
e(RK + NR + MR) to forward and e(RK + 2NR + MR) to backward, e(MK + RK) more (x, dA) if A trains.
Saved for backward beyond weights: e(MR) for LoRA-FA, e(MK + MR) if A trains, 8 bytes of seed with dropout.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

MODES = ("forward+backward", "forward")
BASE = "linear"


@dataclass(frozen=True)
class Shape:
    """M tokens, K features in, N features out, rank R; whether the layer has a bias."""

    M: int
    K: int
    N: int
    R: int
    name: str = ""
    bias: bool = False

    def __post_init__(self):
        if min(self.M, self.K, self.N, self.R) < 1:
            raise ValueError(f"Shape: M, K, N, R must be >= 1, got {self.M}, {self.K}, {self.N}, {self.R}")

    @property
    def label(self) -> str:
        sizes = f"{self.M}×{self.K}×{self.N} r{self.R}"
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
}


@dataclass(frozen=True)
class Provider:
    """What is timed: a kind, for lorasp a backend and a plan, and flags.

    Written `kind[:backend[:plan]][+fa][+masters][+prepack]`: peft-half+fa, lorasp, lorasp:cpp+fa+prepack,
    lorasp:triton:fused. fa: A is frozen (LoRA-FA); masters: A and B in fp32 under half-precision x; prepack: the frozen
    weight also in the CPU kernels' own layout.
    """

    kind: str
    backend: str = "auto"
    plan: str = "auto"
    freeze_A: bool = False
    masters: bool = False
    prepack: bool = False

    KINDS: ClassVar = {
        "linear": "nn.Linear, weight frozen",
        "linear-train": "nn.Linear, weight trains",
        "peft": "PEFT, default (fp32 adapters)",
        "peft-half": "PEFT, adapters in x's dtype",
        "peft-half-compile": "torch.compile of peft-half",
        "lorasp": "lorasp",
    }

    @classmethod
    def parse(cls, text: str) -> "Provider":
        """Raises ValueError for anything that is not `kind[:backend[:plan]][+fa][+masters][+prepack]`."""
        name, *flags = text.split("+")
        kind, *rest = name.split(":")
        if kind not in cls.KINDS:
            raise ValueError(f"Provider: kind must be one of {', '.join(cls.KINDS)}, got {kind!r}")
        if len(rest) > 2 or (rest and kind != "lorasp"):
            raise ValueError(f"Provider: only lorasp takes :backend:plan, got {text!r}")
        takes = {"linear": (), "linear-train": (), "lorasp": ("fa", "masters", "prepack")}.get(kind, ("fa",))
        for flag in flags:
            if flag not in takes:
                raise ValueError(f"Provider: flags of {kind} are {', '.join(takes) or 'none'}, got {text!r}")
        return cls(kind, *rest, freeze_A="fa" in flags, masters="masters" in flags, prepack="prepack" in flags)

    @property
    def name(self) -> str:
        parts = [self.kind, self.backend, self.plan]
        while parts[-1] == "auto":
            parts.pop()
        flags = "+fa" * self.freeze_A + "+masters" * self.masters + "+prepack" * self.prepack
        return ":".join(parts) + flags

    @property
    def adapts(self) -> bool:
        return not self.kind.startswith("linear")


class Unavailable(Exception):
    """A provider cannot run here; the message says why."""


@dataclass
class Workload:
    """One layer's tensors. x requires grad; dy (M, N) is the gradient that arrives."""

    shape: Shape
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    dy: Tensor
    scale: float
    dropout_p: float
    references: dict[tuple, dict[str, Tensor]] = field(default_factory=dict)


@dataclass
class Candidate:
    """A provider built for a workload. `inputs` are what gradients are taken of, `names` their names."""

    provider: Provider
    workload: Workload
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    layer: nn.Module
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.workload.dy)

    def weight_copies(self) -> tuple[Tensor, ...]:
        """The packed copies of the frozen weight: weights, not activations."""
        packed = getattr(self.layer, "_packed", None)
        return () if packed is None else tuple(packed.weight)


def with_tokens(shapes: Sequence[Shape], tokens: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, M=tokens) for shape in shapes)


def flops(shape: Shape, provider: Provider, mode: str) -> int:
    """Floating-point operations the provider's mathematics needs; the module docstring has the formulas."""
    m, k, n, r = shape.M, shape.K, shape.N, shape.R
    total = 2 * m * k * n + (2 * m * r * (k + n) if provider.adapts else 0)
    if mode == "forward+backward":
        total += 2 * m * k * n * (2 if provider.kind == "linear-train" else 1)
        if provider.adapts:
            total += 2 * m * r * (k + 2 * n) + (0 if provider.freeze_A else 2 * m * r * k)
    return total


def min_bytes(shape: Shape, provider: Provider, mode: str, element: int) -> int:
    """Bytes that must move between memory and the cores at least once, `element` bytes per element."""
    m, k, n, r = shape.M, shape.K, shape.N, shape.R
    count = m * k + n * k + m * n + (r * k + n * r + m * r if provider.adapts else 0)
    if mode == "forward+backward":
        count += m * n + n * k + m * k + (m * k + n * k if provider.kind == "linear-train" else 0)
        if provider.adapts:
            count += r * k + 2 * n * r + m * r + (0 if provider.freeze_A else m * k + r * k)
    return count * element


def contract_bytes(shape: Shape, provider: Provider, element: int, dropout_p: float) -> int:
    """What lorasp's memory contract lets backward keep beyond weights."""
    if not provider.adapts:
        return shape.M * shape.K * element if provider.kind == "linear-train" else 0
    kept = shape.M * shape.R + (0 if provider.freeze_A else shape.M * shape.K)
    return kept * element + (8 if dropout_p else 0)


def floor(shape: Shape, provider: Provider, mode: str = MODES[0]) -> float:
    """FLOPs over the frozen nn.Linear's: the ratio of a kernel that runs every product at the frozen one's speed."""
    return flops(shape, provider, mode) / flops(shape, Provider(BASE), mode)
