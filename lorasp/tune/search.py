"""The search behind `lorasp tune`: which plan, on which tiles, serves a call best on one device.

For every job all plans and candidate tiles are checked, then timed briefly; the fastest, every plan on the
architecture's own tiles, addmm and the frozen nn.Linear then run in interleaved rounds. The result is addmm unless
another plan is faster by more than the noise, which is how far the frozen nn.Linear's ratios to itself lie apart.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from lorasp.bench.timing import quartiles
from lorasp.triton_kernels.gemm_candidates import plan_candidates
from lorasp.triton_kernels.tuning import ONEPASS_MAX_RANK, PLANS, Plan, Target

_BRIEF_ROUNDS = 3
_FINALISTS = 3  # beside addmm and every plan on the architecture's own tiles


@dataclass(frozen=True)
class Job:
    """The calls that one row of a plan table speaks for, by the names of the row."""

    direction: str
    dtype: torch.dtype
    dropout: bool
    N: int
    K: int
    R: int
    M: int

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        drop = "dropout" if self.dropout else "no dropout"
        return f"{self.direction} {self.M}×{self.K}×{self.N} r{self.R} {self.dtype_name}, {drop}"

    @property
    def group(self) -> "Job":
        """The job of the same layer that stands for its every M."""
        return replace(self, M=0)


class Rejected(Exception):
    """A plan cannot run here: it does not compile, or asks for more than the device has. The message says why."""


class DeviceLost(Exception):
    """A plan took the device's context with it: nothing more can be measured in this process."""


class Bench(Protocol):
    """What the search needs of a device."""

    target: Target

    def verify(self, job: Job, plan: Plan) -> None:
        """Run once and compare with the fp64 reference. Raises Rejected, AssertionError for wrong values."""

    def samples(
        self, job: Job, plans: Sequence[Plan | None], rounds: int | None, seconds: float
    ) -> list[list[tuple[float, float]]]:
        """Per plan, (seconds, ratio to the frozen nn.Linear) of every interleaved round; None is that nn.Linear.

        Raises Rejected where the device refuses what verify let pass.
        """


@dataclass(frozen=True)
class Timing:
    """Ratio to the frozen nn.Linear of the same rounds: median and quartiles."""

    plan: Plan
    q1: float
    ratio: float
    q3: float


@dataclass
class Outcome:
    """What one job came to: winner is None where not even addmm could run."""

    job: Job
    winner: Plan | None = None
    timings: list[Timing] = field(default_factory=list)
    noise: float = 0.0
    frozen_ms: float = 0.0
    rejected: dict[Plan, str] = field(default_factory=dict)
    wrong: set[Plan] = field(default_factory=set)

    def best(self, name: str) -> Timing | None:
        """The fastest of the timed candidates of one plan."""
        return min((t for t in self.timings if t.plan.name == name), key=lambda t: t.ratio, default=None)


def describe(plan: Plan) -> str:
    """`fused 128×256×64 8 warps 3 stages, tma`, or the name alone on the architecture's own tiles."""
    g = plan.gemm
    if g is None:
        return plan.name
    flags = "".join(f", {name}" for name in ("tma", "flatten") if getattr(g, name))
    return f"{plan.name} {g.block_m}×{g.block_c}×{g.block_d} {g.num_warps} warps {g.num_stages} stages{flags}"


def candidates(target: Target, job: Job, plans: Sequence[str] = PLANS) -> list[Plan]:
    """What the search tries for a job, addmm first, limited to the plans named (addmm is always among them)."""
    found = plan_candidates(target, job.direction, job.dtype, job.dropout, job.M, job.N, job.K, job.R)
    return [plan for plan in found if plan.name == "addmm" or plan.name in plans]


def neighbour(job: Job, plan: Plan) -> Job:
    """A small call with a tail in every dimension and twice the rank: a row serves calls up to a factor of two away."""
    most = ONEPASS_MAX_RANK if plan.name == "onepass" else 2 * job.R
    # Odd multiples of 8: no tile divides them, and tensor descriptors still take them.
    return replace(job, M=min(203, job.M + 3), N=41 * 8, K=33 * 8, R=min(2 * job.R, most))


def decide(timings: Sequence[Timing], noise: float) -> Plan:
    """addmm, unless others are faster than it by more than the noise: then the simplest within the noise of the best.

    timings: addmm first; noise: relative. fused is simpler than onepass, and the architecture's own tiles than others.
    """
    safe, *others = timings
    faster = [timing for timing in others if timing.ratio * (1 + noise) < safe.ratio]
    if not faster:
        return safe.plan
    best = min(timing.ratio for timing in faster)
    equal = [timing for timing in faster if timing.ratio <= best * (1 + noise)]
    return min(equal, key=lambda t: (PLANS.index(t.plan.name), t.plan.gemm is not None, t.ratio)).plan


def run(
    jobs: Iterable[Job],
    bench: Bench,
    *,
    plans: Sequence[str] = PLANS,
    seconds: float = 2.0,
    budget: float = 3600.0,
    now: Callable[[], float] = time.monotonic,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """The outcomes of `jobs`, one by one, until `budget` seconds are over; a job they interrupt has no outcome.

    seconds: for the last, interleaved rounds of one job. Raises DeviceLost where a plan crashes the device.
    """
    end = now() + budget
    tried: dict[tuple[Job, Plan], str | None] = {}
    for job in jobs:
        outcome = Outcome(job)
        right = []
        for plan in candidates(bench.target, job, plans):
            if now() >= end:
                return
            progress(f"{job}: checking {describe(plan)}")
            if _passes(bench, job, plan, outcome):
                right.append(plan)
            elif plan.name == "addmm":
                break
        try:
            if right and not _measure(job, bench, right, outcome, tried, seconds, lambda: now() >= end, progress):
                return
        except Rejected as reason:
            outcome.rejected[right[0]] = f"not timed: {reason}"
        yield outcome


def _measure(job, bench, right, outcome, tried, seconds, over, progress) -> bool:
    """Fills in timings, noise and winner; False if the time is over before that."""
    finalists = _shortlist(job, bench, right, progress)
    for plan in finalists[1:]:
        if over():
            return False
        near = neighbour(job, plan)
        if (near, plan) not in tried:
            progress(f"{job}: checking {describe(plan)} on {near}")
            _passes(bench, near, plan, outcome)
            tried[near, plan] = outcome.rejected.get(plan)
        elif tried[near, plan] is not None:
            outcome.rejected[plan] = tried[near, plan]
    finalists = [plan for plan in finalists if plan not in outcome.rejected]
    progress(f"{job}: timing {len(finalists)} plans")
    base, *samples = bench.samples(job, [None, *finalists], None, seconds)
    q1, _, q3 = quartiles([ratio for _, ratio in base])
    outcome.noise = q3 - q1
    outcome.frozen_ms = quartiles([1e3 * took for took, _ in base])[1]
    outcome.timings = [
        Timing(plan, *quartiles([ratio for _, ratio in sample]))
        for plan, sample in zip(finalists, samples, strict=True)
    ]
    outcome.winner = decide(outcome.timings, outcome.noise)
    return True


def _shortlist(job: Job, bench: Bench, right: list[Plan], progress: Callable[[str], None]) -> list[Plan]:
    """addmm, plans on the architecture's own tiles, and the fastest of the others in a few rounds; in their order."""
    tuned = [plan for plan in right if plan.gemm is not None]
    if len(tuned) > _FINALISTS:
        progress(f"{job}: timing {len(tuned)} candidates briefly")
        samples = bench.samples(job, tuned, _BRIEF_ROUNDS, 0.0)
        medians = [quartiles([ratio for _, ratio in sample])[1] for sample in samples]
        fastest = sorted(range(len(tuned)), key=medians.__getitem__)[:_FINALISTS]
        tuned = [tuned[i] for i in fastest]
    return [plan for plan in right if plan.gemm is None or plan in tuned]


def _passes(bench: Bench, job: Job, plan: Plan, outcome: Outcome) -> bool:
    """Whether a plan runs and is right; where not, the outcome says why."""
    try:
        bench.verify(job, plan)
    except Rejected as reason:
        outcome.rejected[plan] = str(reason)
    except AssertionError as error:
        outcome.rejected[plan] = f"wrong: {error}"
        outcome.wrong.add(plan)
    return plan not in outcome.rejected
