"""What `lorasp tune` shows: a table per group of jobs, and with --dry-run the work ahead."""

from collections.abc import Sequence

from lorasp import console
from lorasp.triton_kernels.tuning import Target
from lorasp.tune.search import Job, Outcome

# What the estimate of --dry-run assumes; it says so.
_COMPILE_SECONDS = 3.0
_CHECK_SECONDS = 0.05


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """One group: a row per job, every name's best ratio to the base, what was chosen, what was rejected."""
    if not outcomes:
        return
    job = outcomes[0].job
    if job.label.isdecimal():
        outcomes = sorted(outcomes, key=lambda outcome: int(outcome.job.label))
    names = [name for name in job.names if any(outcome.best(name) for outcome in outcomes)]
    rows = []
    for outcome in outcomes:
        ratios = [outcome.best(name) for name in names]
        rows.append([
            outcome.job.label, "not measured" if outcome.winner is None else str(outcome.winner),
            f"{outcome.base_ms:.3g}", *("" if t is None else f"{t.ratio:.3f}" for t in ratios),
            f"{outcome.noise:.3f}",
        ])  # fmt: skip
    columns = [job.varies, "chosen", f"{job.base} ms", *(f"{name} ÷" for name in names), "noise"]
    console.print_table(job.title, columns, rows, left=2)
    for outcome in outcomes:
        for plan, reason in outcome.rejected.items():
            print(f"  {job.varies}={outcome.job.label}: rejected {plan}: {reason}")


def print_work(jobs: Sequence[Job], target: Target, plans: Sequence[str], seconds: float, budget: float) -> None:
    """What a search would try: candidates of each kind of call with the shared memory they need; then the totals."""
    sets: dict[tuple, list[Job]] = {}
    compiled, measurements = set(), 0
    for job in jobs:
        found = tuple(job.candidates(target, plans))
        sets.setdefault((job.kind, found), []).append(job)
        measurements += len(found)
        compiled |= {(job.kind, choice) for choice in found}
    for (_, found), members in sets.items():
        largest = max(members, key=lambda job: job.size)
        rows = [[str(choice), *largest.footprint(target, choice)] for choice in found]
        console.print_table(largest.kind_title(members), ["candidate", *largest.heads], rows)
    total = len(compiled) * _COMPILE_SECONDS + measurements * _CHECK_SECONDS + len(jobs) * seconds
    print(f"{target.name}: at most {target.shared_memory / 1024:.0f} KiB of shared memory per block")
    print(f"{len(jobs)} calls, {measurements} measurements, about {len(compiled)} compilations")
    print(
        f"about {total / 60:.0f} min of the {budget / 60:.0f} min of --budget, if a compilation takes "
        f"{_COMPILE_SECONDS:g} s, a candidate's check and trial {_CHECK_SECONDS:g} s, a call's rounds {seconds:g} s"
    )
