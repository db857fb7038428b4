"""What `lorasp tune` shows: a table per layer and direction, and with --dry-run the work ahead."""

from collections.abc import Sequence

from lorasp import console
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.gemm_candidates import own_tiles, shared_bytes
from lorasp.triton_kernels.tuning import Plan, Target
from lorasp.tune.search import Job, Outcome, candidates, describe

# What the estimate of --dry-run assumes; it says so.
_COMPILE_SECONDS = 3.0
_CHECK_SECONDS = 0.05


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """One layer: a row per M, every plan's best ratio to the frozen nn.Linear, what was chosen, what was rejected."""
    if not outcomes:
        return
    outcomes = sorted(outcomes, key=lambda outcome: outcome.job.M)
    job = outcomes[0].job
    names = [name for name in tuning.PLANS[1:] if any(outcome.best(name) for outcome in outcomes)]
    rows = []
    for outcome in outcomes:
        ratios = [outcome.best(name) for name in names]
        rows.append([
            str(outcome.job.M), "not measured" if outcome.winner is None else describe(outcome.winner),
            f"{outcome.frozen_ms:.3g}", *("" if t is None else f"{t.ratio:.3f}" for t in ratios),
            f"{outcome.noise:.3f}",
        ])  # fmt: skip
    drop = "dropout" if job.dropout else "no dropout"
    title = f"{job.direction} {job.K}×{job.N} r{job.R}, {job.dtype_name}, {drop}"
    console.print_table(title, ["M", "chosen", "nn.Linear ms", *(f"{name} ÷" for name in names), "noise"], rows, left=2)
    for outcome in outcomes:
        for plan, reason in outcome.rejected.items():
            print(f"  M={outcome.job.M}: rejected {describe(plan)}: {reason}")


def print_work(jobs: Sequence[Job], target: Target, plans: Sequence[str], seconds: float, budget: float) -> None:
    """What a search would try: candidates of each kind of call with the shared memory they need; then the totals."""
    sets: dict[tuple, list[Job]] = {}
    compiled, measurements = set(), 0
    for job in jobs:
        found = tuple(candidates(target, job, plans))
        sets.setdefault((job.direction, job.dtype, job.dropout, job.R, found), []).append(job)
        measurements += len(found)
        compiled |= {(job.direction, job.dtype, job.dropout, job.R, plan) for plan in found}
    for (direction, dtype, dropout, R, found), members in sets.items():
        layers = ", ".join(dict.fromkeys(f"{job.K}×{job.N}" for job in members))
        tokens = ", ".join(map(str, sorted({job.M for job in members})))
        largest = max(members, key=lambda job: (job.M, job.N * job.K))
        rows = [[describe(plan), *_footprint(target, plan, largest)] for plan in found]
        drop = "dropout" if dropout else "no dropout"
        name = str(dtype).removeprefix("torch.")
        console.print_table(
            f"{direction} r{R}, {name}, {drop}\nK×N = {layers}\nM = {tokens}",
            ["candidate", "shared KiB", "tiles, largest call", "waves"],
            rows,
        )
    total = len(compiled) * _COMPILE_SECONDS + measurements * _CHECK_SECONDS + len(jobs) * seconds
    print(f"{target.name}: at most {target.shared_memory / 1024:.0f} KiB of shared memory per block")
    print(f"{len(jobs)} calls, {measurements} measurements, about {len(compiled)} compilations")
    print(
        f"about {total / 60:.0f} min of the {budget / 60:.0f} min of --budget, if a compilation takes "
        f"{_COMPILE_SECONDS:g} s, a candidate's check and trial {_CHECK_SECONDS:g} s, a call's rounds {seconds:g} s"
    )


def _footprint(target: Target, plan: Plan, job: Job) -> list[str]:
    """KiB of shared memory the pipeline needs, the output's number of tiles, how often they fill the device."""
    if plan.name == "addmm":
        return ["", "", ""]
    call = (job.direction, job.dtype, job.dropout, job.M, job.N, job.K, job.R)
    gemm = plan.gemm or own_tiles(target, plan.name, *call)
    tiles = -(-job.M // gemm.block_m) * -(-(job.N if job.direction == "forward" else job.K) // gemm.block_c)
    kib = shared_bytes(target, gemm, job.dtype, plan.name, job.R) / 1024
    return [f"{kib:.0f}", str(tiles), f"{tiles / target.sm_count:.1f}"]
