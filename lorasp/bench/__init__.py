"""Micro-benchmark harness: one adapted layer against the frozen nn.Linear of the same run.

Rules (benchmarks/README.md has the reasons): correctness is asserted before anything is timed; the frozen nn.Linear
runs before and after every provider and a sample counts as time / mean(base before, base after); medians and quartiles
over interleaved rounds; x requires grad everywhere, as inside a model; gradients are returned, not accumulated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lorasp.bench import workloads
from lorasp.bench.cases import (
    BASE,
    MODES,
    SHAPES,
    Candidate,
    Provider,
    Shape,
    Unavailable,
    contract_bytes,
    distinct,
    floor,
    flops,
    min_bytes,
    with_tokens,
)
from lorasp.bench.timing import Clock, interleave, make_clock, peak_bytes, pin_malloc, spread
from lorasp.memory import saved_bytes

__all__ = [
    "BASE",
    "MODES",
    "SHAPES",
    "Candidate",
    "Measurement",
    "Provider",
    "Shape",
    "ShapeResult",
    "Unavailable",
    "contract_bytes",
    "distinct",
    "floor",
    "flops",
    "measure",
    "min_bytes",
    "pin_malloc",
    "run",
    "with_tokens",
]


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
    device = torch.device(device)
    clock = make_clock(device)
    base = Provider(BASE)
    for shape in shapes:
        result = ShapeResult(shape)
        workload = workloads.make_workload(shape, dtype, device, dropout_p)
        candidates = []
        for provider in (base, *(p for p in providers if p != base)):
            progress(f"{shape.label}: checking {provider.name}")
            try:
                candidate = workloads.build(provider, workload)
                workloads.verify(candidate)
                candidates.append(candidate)
            except Unavailable as reason:
                result.unavailable[provider] = str(reason)
        workload.references.clear()
        for mode in modes:
            progress(f"{shape.label}: timing {mode}")
            result.measurements += measure(candidates, mode, clock, rounds, seconds)
        yield result


def measure(
    candidates: Sequence[Candidate], mode: str, clock: Clock, rounds: int | None = None, seconds: float = 20.0
) -> list[Measurement]:
    """Time candidates of one workload, interleaved with the first, which must be the frozen nn.Linear."""
    functions = [_function(candidate, mode) for candidate in candidates]
    by_function = dict(zip(functions, candidates, strict=True))

    def timed(function: Callable[[], object], calls: int) -> float:
        with by_function[function].context():
            return clock(function, calls)

    samples = interleave(functions[0], functions, timed, rounds, seconds)
    return [_measurement(candidate, mode, sample) for candidate, sample in zip(candidates, samples, strict=True)]


def _function(candidate: Candidate, mode: str) -> Callable[[], object]:
    return candidate.step if mode == MODES[0] else candidate.forward


def _measurement(candidate: Candidate, mode: str, sample: list[tuple[float, float]]) -> Measurement:
    provider, workload = candidate.provider, candidate.workload
    shape, dtype = workload.shape, workload.x.dtype
    with candidate.context():
        saved = saved_bytes(candidate.forward, exclude=candidate.layers)
        peak = peak_bytes(_function(candidate, mode), workload.x.device)
    return Measurement(
        shape=shape,
        provider=provider,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        dropout_p=workload.dropout_p,
        rounds=len(sample),
        **spread(sample),
        saved_bytes=saved,
        peak_bytes=peak,
        flops=flops(shape, provider, mode),
        min_bytes=min_bytes(shape, provider, mode, dtype.itemsize),
    )
