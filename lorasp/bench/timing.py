"""How a benchmark measures: malloc pinned, clocks, interleaved samples, quartiles, memory of the GPU."""

import ctypes
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

_ROUNDS = (5, 41)
_SAMPLE_SECONDS = 0.004
_MIB = 2**20


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


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else WallClock()


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


def spread(
    sample: Sequence[tuple[float, float]], peft: Sequence[tuple[float, float]] | None = None
) -> dict[str, float]:
    """Medians over one function's rounds of ms, ratio and, given PEFT's rounds, to_peft; with _q1 and _q3, quartiles.

    to_peft is taken round by round, between two ratios to the base.
    """
    values = {"ms": [1e3 * took for took, _ in sample], "ratio": [ratio for _, ratio in sample]}
    if peft is not None:
        values["to_peft"] = [ratio / other for (_, ratio), (_, other) in zip(sample, peft, strict=True)]
    return {
        f"{what}{end}": value
        for what, of_rounds in values.items()
        for end, value in zip(("_q1", "", "_q3"), quartiles(of_rounds), strict=True)
    }


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


def give_back(device: torch.device) -> None:
    """Give the GPU what torch's allocator keeps of tensors that are gone, which is taken for every other process.

    Reference cycles first: a process's first forward of a model leaves some that hold its weights.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
