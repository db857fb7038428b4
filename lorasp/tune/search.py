"""The search behind `lorasp tune`: what serves a call best on one device.

For every job all candidates are checked, then timed briefly; the fastest, every plan on the architecture's own tiles,
the safe choice and the base then run in interleaved rounds. The result is the safe choice (addmm, or a kernel's own
tiles) unless another is faster by more than the noise, which is how far the base's ratios to itself lie apart.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lorasp.bench.timing import quartiles
from lorasp.triton_kernels.tuning import PLANS, Target

_BRIEF_ROUNDS = 3
_FINALISTS = 3  # beside the safe choice and every plan on the architecture's own tiles


class Choice(Protocol):
    """Something a job can run with: a Plan, or the Tiles of one kernel."""

    name: str
    own: bool  # on the architecture's own tiles


class Job(Protocol):
    """Calls that one row of a table speaks for; jobs/ holds one kind per operator, hashable and with a str()."""

    section: str  # of the table
    base: str  # what everything is timed against
    safe: Choice  # what stays unless something else is faster
    group: "Job"  # stands for all jobs that are shown together
    names: Sequence[str]  # of choices, from simple to intricate

    def candidates(self, target: Target, plans: Sequence[str]) -> list[Choice]:
        """What the search tries, the safe choice first."""

    def row(self, choice: Choice) -> dict:
        """The table's row where `choice` won."""

    def neighbour(self, choice: Choice) -> "Job":
        """A small call with tails, whose check stands for calls that the row serves beside the job's own."""


class Rejected(Exception):
    """A choice cannot run here: it does not compile, or asks for more than the device has. The message says why."""


class DeviceLost(Exception):
    """A choice took the device's context with it: nothing more can be measured in this process."""


class Bench(Protocol):
    """What the search needs of a device."""

    target: Target

    def prepare(self, job: Job, choices: Sequence[Choice]) -> None:
        """Compile for all of them at once. Raises Rejected where the job's tensors cannot be made."""

    def verify(self, job: Job, choice: Choice) -> None:
        """Run once and compare with the fp64 reference. Raises Rejected, AssertionError for wrong values."""

    def samples(
        self, job: Job, choices: Sequence[Choice | None], rounds: int | None, seconds: float
    ) -> list[list[tuple[float, float]]]:
        """Per choice, (seconds, ratio to the job's base) of every interleaved round; None is that base.

        Raises Rejected where the device refuses what verify let pass.
        """


@dataclass(frozen=True)
class Timing:
    """Ratio to the base of the same rounds: median and quartiles."""

    plan: Choice
    q1: float
    ratio: float
    q3: float


@dataclass
class Outcome:
    """What one job came to: winner is None where not even the safe choice could run."""

    job: Job
    winner: Choice | None = None
    timings: list[Timing] = field(default_factory=list)
    noise: float = 0.0
    base_ms: float = 0.0
    rejected: dict[Choice, str] = field(default_factory=dict)
    wrong: set[Choice] = field(default_factory=set)

    def best(self, name: str) -> Timing | None:
        """The fastest of the timed candidates of one name."""
        return min((t for t in self.timings if t.plan.name == name), key=lambda t: t.ratio, default=None)


def decide(timings: Sequence[Timing], noise: float, names: Sequence[str]) -> Choice:
    """The safe choice, unless others are faster by more than the noise: then the simplest within the noise of the best.

    timings: the safe one first; noise: relative; names: of choices, from simple to intricate. Simpler is an earlier
    name, then the architecture's own tiles.
    """
    safe, *others = timings
    faster = [timing for timing in others if timing.ratio * (1 + noise) < safe.ratio]
    if not faster:
        return safe.plan
    best = min(timing.ratio for timing in faster)
    equal = [timing for timing in faster if timing.ratio <= best * (1 + noise)]
    return min(equal, key=lambda t: (names.index(t.plan.name), not t.plan.own, t.ratio)).plan


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
    tried: dict[tuple[Job, Choice], str | None] = {}
    for job in jobs:
        outcome = Outcome(job)
        right, options = [], job.candidates(bench.target, plans)
        if now() < end:
            progress(f"{job}: compiling {len(options)} candidates")
            with contextlib.suppress(Rejected):  # verify says it of the candidate that it befalls
                bench.prepare(job, options)
        for plan in options:
            if now() >= end:
                return
            progress(f"{job}: checking {plan}")
            if _passes(bench, job, plan, outcome):
                right.append(plan)
            elif plan == job.safe:
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
        near = job.neighbour(plan)
        if (near, plan) not in tried:
            progress(f"{job}: checking {plan} on {near}")
            _passes(bench, near, plan, outcome)
            tried[near, plan] = outcome.rejected.get(plan)
        elif tried[near, plan] is not None:
            outcome.rejected[plan] = tried[near, plan]
    finalists = [plan for plan in finalists if plan not in outcome.rejected]
    progress(f"{job}: timing {len(finalists)} finalists")
    base, *samples = bench.samples(job, [None, *finalists], None, seconds)
    q1, _, q3 = quartiles([ratio for _, ratio in base])
    outcome.noise = q3 - q1
    outcome.base_ms = quartiles([1e3 * took for took, _ in base])[1]
    outcome.timings = [
        Timing(plan, *quartiles([ratio for _, ratio in sample]))
        for plan, sample in zip(finalists, samples, strict=True)
    ]
    outcome.winner = decide(outcome.timings, outcome.noise, job.names)
    return True


def _shortlist(job: Job, bench: Bench, right: list[Choice], progress: Callable[[str], None]) -> list[Choice]:
    """What runs on the architecture's own tiles, and the fastest of the others in a few rounds; in their order."""
    tuned = [plan for plan in right if not plan.own]
    if len(tuned) > _FINALISTS:
        progress(f"{job}: timing {len(tuned)} candidates briefly")
        samples = bench.samples(job, tuned, _BRIEF_ROUNDS, 0.0)
        medians = [quartiles([ratio for _, ratio in sample])[1] for sample in samples]
        fastest = sorted(range(len(tuned)), key=medians.__getitem__)[:_FINALISTS]
        tuned = [tuned[i] for i in fastest]
    return [plan for plan in right if plan.own or plan in tuned]


def _passes(bench: Bench, job: Job, plan: Choice, outcome: Outcome) -> bool:
    """Whether a choice runs and is right; where not, the outcome says why."""
    try:
        bench.verify(job, plan)
    except Rejected as reason:
        outcome.rejected[plan] = str(reason)
    except AssertionError as error:
        outcome.rejected[plan] = f"wrong: {error}"
        outcome.wrong.add(plan)
    return plan not in outcome.rejected
