"""Micro-benchmark harness: one adapted layer against the frozen nn.Linear of the same run.

Rules (benchmarks/README.md has the reasons): correctness is asserted before anything is timed; the frozen nn.Linear
runs before and after every provider and a sample counts as time / mean(base before, base after); medians and quartiles
over interleaved rounds; x requires grad everywhere, as inside a model; gradients are returned, not accumulated.

FLOPs of one layer, M tokens, K in, N out, rank R (a multiply-add is two):

    frozen nn.Linear   forward 2MKN               backward 2MKN (dx)
    trainable weight                              backward 2MKN more (dW)
    LoRA               forward 2MR(K + N) more    backward 2MR(K + 2N) more (g, gA, dB), 2MRK more (dA) if A trains

Bytes that must move at least once, e bytes per element: forward e(MK + NK + MN), backward e(MN + NK + MK); LoRA adds
e(RK + NR + MR) to forward and e(RK + 2NR + MR) to backward, e(MK + RK) more (x, dA) if A trains.
Saved for backward beyond weights: e(MR) for LoRA-FA, e(MK + MR) if A trains, 8 bytes of seed with dropout.
"""

import contextlib
import ctypes
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

MODES = ("forward+backward", "forward")
BASE = "linear"
_ROUNDS = (5, 41)
_SAMPLE_SECONDS = 0.004
_MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """M tokens, K features in, N features out, rank R."""

    M: int
    K: int
    N: int
    R: int
    name: str = ""

    def __post_init__(self):
        if min(self.M, self.K, self.N, self.R) < 1:
            raise ValueError(f"Shape: M, K, N, R must be >= 1, got {self.M}, {self.K}, {self.N}, {self.R}")

    @property
    def label(self) -> str:
        sizes = f"{self.M}×{self.K}×{self.N} r{self.R}"
        return f"{self.name} {sizes}" if self.name else sizes


def _layers(tokens: int, rank: int, **layers: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple(Shape(tokens, k, n, rank, name) for name, (k, n) in layers.items())


# The distinct nn.Linear shapes of each model; M is the tokens of one GPU micro-batch.
SHAPES: dict[str, tuple[Shape, ...]] = {
    "llama3-8b": _layers(8192, 16, q_o=(4096, 4096), k_v=(4096, 1024), gate_up=(4096, 14336), down=(14336, 4096)),
    "roberta-large": _layers(4096, 16, attention=(1024, 1024), up=(1024, 4096), down=(4096, 1024)),
    "t5-base": _layers(4096, 16, attention=(768, 768), wi=(768, 3072), wo=(3072, 768)),
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
    forward: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]
    dy: Tensor
    layer: nn.Module
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def step(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.inputs, self.dy)


@dataclass(frozen=True)
class Measurement:
    """Milliseconds and ratios to the frozen nn.Linear of the same run: medians, and quartiles as their spread."""

    shape: Shape
    provider: Provider
    mode: str
    dtype: str
    dropout_p: float
    rounds: int
    ms: float
    ms_q1: float
    ms_q3: float
    ratio: float
    ratio_q1: float
    ratio_q3: float
    saved_bytes: int
    peak_bytes: int | None
    flops: int
    min_bytes: int


@dataclass
class ShapeResult:
    shape: Shape
    measurements: list[Measurement] = field(default_factory=list)
    unavailable: dict[Provider, str] = field(default_factory=dict)


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


def pin_malloc() -> str:
    """Keep glibc from returning and re-faulting large temporaries, for every variant alike; says what was done.

    Default trimming costs temporaries of several MB thousands of page faults per step in one variant and none in
    another. Thresholds already set in the environment are left alone.
    """
    names = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
    if all(name in os.environ for name in names):
        return "malloc thresholds: as set in the environment"
    if not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"):
        return "malloc thresholds: not pinned (no glibc): large temporaries may cost page faults"
    mallopt, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
    # Before 2.35 glibc refuses mmap thresholds above half a heap.
    accepted = next((size for size in (2**31 - 1, 32 * _MIB) if mallopt(m_mmap_threshold, size)), 0)
    if not accepted or not mallopt(m_trim_threshold, 2**31 - 1):
        return "malloc thresholds: not pinned (refused): large temporaries may cost page faults"
    return f"malloc thresholds: mmap {accepted // _MIB} MiB, trim 2047 MiB, pinned for every variant"


class WallClock:
    """Seconds per call on a device that computes synchronously."""

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls


class CudaClock:
    """Seconds per call between CUDA events, with L2 overwritten before every call.

    The events are read after one synchronize per sample, so the host may run ahead, as it does in training; where a
    call's host work takes longer than its kernels, the difference is in the figure, as it is in training.
    """

    def __init__(self, device: torch.device):
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * max(cache, 64 * _MIB), dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            self.flush.zero_()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in events) / calls / 1e3


Clock = Callable[[Callable[[], object], int], float]


def interleave(
    base: Callable[[], object],
    functions: Sequence[Callable[[], object]],
    clock: Clock,
    rounds: int | None = None,
    seconds: float = 20.0,
) -> list[list[tuple[float, float]]]:
    """Per function, (seconds per call, ratio) of every round: base, f0, base, f1, base, …

    ratio = time / mean(base before, base after). Without `rounds` as many as fit into `seconds`, 5 to 41. A sample
    repeats a short function until it lasts about 4 ms.
    """
    estimates = []
    for function in (base, *functions):
        clock(function, 1)
        estimates.append(clock(function, 1))
    calls = [max(1, min(10_000, math.ceil(_SAMPLE_SECONDS / max(estimate, 1e-9)))) for estimate in estimates]
    if rounds is None:
        costs = [estimate * repeat for estimate, repeat in zip(estimates, calls, strict=True)]
        round_cost = costs[0] * len(functions) + sum(costs[1:])
        rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(seconds / round_cost)))
    samples: list[list[tuple[float, float]]] = [[] for _ in functions]
    before = clock(base, calls[0])
    for _ in range(rounds):
        for i, function in enumerate(functions):
            took = clock(function, calls[1 + i])
            after = clock(base, calls[0])
            samples[i].append((took, took / ((before + after) / 2)))
            before = after
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; one value stands for all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """The most the CUDA allocator held during the call beyond what it held before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def with_tokens(shapes: Sequence[Shape], tokens: int) -> tuple[Shape, ...]:
    return tuple(replace(shape, M=tokens) for shape in shapes)


def run(
    shapes: Sequence[Shape],
    providers: Sequence[Provider],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    dropout_p: float = 0.0,
    rounds: int | None = None,
    seconds: float = 20.0,
    modes: Sequence[str] = MODES,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[ShapeResult]:
    """Build, verify and time every provider on every shape; yields one ShapeResult per shape.

    seconds: the time budget per shape and mode where `rounds` is not given. A provider that cannot run here is listed
    in ShapeResult.unavailable with the reason. Raises AssertionError if a provider computes something else than the
    fp64 reference within lorasp.testing's tolerance.
    """
    from lorasp import bench_providers

    device = torch.device(device)
    clock = CudaClock(device) if device.type == "cuda" else WallClock()
    base = Provider(BASE)
    for shape in shapes:
        result = ShapeResult(shape)
        workload = bench_providers.make_workload(shape, dtype, device, dropout_p)
        candidates = []
        for provider in (base, *(p for p in providers if p != base)):
            progress(f"{shape.label}: checking {provider.name}")
            try:
                candidate = bench_providers.build(provider, workload)
                bench_providers.verify(candidate, workload)
                candidates.append(candidate)
            except Unavailable as reason:
                result.unavailable[provider] = str(reason)
        kept = [_kept(candidate, device) for candidate in candidates]
        workload.references.clear()
        for mode in modes:
            progress(f"{shape.label}: timing {mode}")
            calls = {(c.step if mode == MODES[0] else c.forward): c for c in candidates}

            def timed(function, repeats, calls=calls):
                with calls[function].context():
                    return clock(function, repeats)

            functions = list(calls)
            samples = interleave(functions[0], functions, timed, rounds, seconds)
            for candidate, sample, (saved, peak) in zip(candidates, samples, kept, strict=True):
                ms = quartiles([1e3 * took for took, _ in sample])
                ratio = quartiles([value for _, value in sample])
                result.measurements.append(
                    Measurement(
                        shape,
                        candidate.provider,
                        mode,
                        str(dtype).removeprefix("torch."),
                        dropout_p,
                        len(sample),
                        ms[1],
                        ms[0],
                        ms[2],
                        ratio[1],
                        ratio[0],
                        ratio[2],
                        saved,
                        peak,
                        flops(shape, candidate.provider, mode),
                        min_bytes(shape, candidate.provider, mode, dtype.itemsize),
                    )
                )
        yield result


def _kept(candidate: Candidate, device: torch.device) -> tuple[int, int | None]:
    from lorasp.memory import saved_bytes

    with candidate.context():
        saved = saved_bytes(candidate.forward, exclude=candidate.layer)
        return saved, peak_bytes(candidate.step, device)
