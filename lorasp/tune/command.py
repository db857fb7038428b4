"""`lorasp tune`: jobs from the command line, outcomes to screen and to the device's plan table."""

import argparse
import datetime
import itertools
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from lorasp import console
from lorasp.console import UsageError
from lorasp.ops import registry
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.gemm_candidates import shared_bytes
from lorasp.tune.search import Bench, DeviceLost, Job, Outcome, candidates, describe, search
from lorasp.tune.table import PlanFile

# (K, N): LLaMA 8B's q and o, gate and up, down, k and v; RoBERTa-large's up, down and attention.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024), (1024, 4096), (1024, 1024))
RANKS = (16, 8, 64)
# Far apart first: where the time ends early, the nearest row is still not far.
TOKENS = (8192, 1, 512, 32768, 32, 2048, 8, 128)
DTYPES = (torch.bfloat16,)
DIRECTIONS = ("forward", "backward")
DROPOUT = {"off": (False,), "on": (True,), "both": (False, True)}
# What --dry-run assumes, on no evidence but a compilation's typical length.
_COMPILE_SECONDS = 3.0
_CHECK_SECONDS = 0.05


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Every job of the options: all M of one layer together, the first dtype, shape and rank first."""
    return [
        Job(direction, dtype, dropout, N, K, R, M)
        for dtype, dropout, (K, N), R, direction, M in itertools.product(
            options.dtypes or DTYPES, DROPOUT[options.dropout], options.shapes or SHAPES, options.ranks or RANKS,
            DIRECTIONS, options.tokens or TOKENS,
        )
    ]  # fmt: skip


def _plans(options: argparse.Namespace) -> Sequence[str]:
    return ("addmm", *options.plans) if options.plans else tuning.PLANS[1:]


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if a plan on its own tiles is wrong or the device is lost. Raises UsageError where nothing can be
    measured."""
    jobs = make_jobs(options)
    if options.dry_run:
        _print_candidates(jobs, _target(options), options)
        return 0
    if options.target is not None:
        raise UsageError("--target goes with --dry-run: what is measured is the GPU at hand")
    bench, provenance = _device_bench(options)
    provenance |= {"date": f"{datetime.date.today():%Y-%m-%d}", "command": _command_line(options.arguments)}
    return tune(jobs, bench, provenance, options)


def _command_line(arguments: Sequence[str]) -> str:
    """The command without --out: a folder of this machine is nobody else's business."""
    kept, after_out = [], False
    for argument in arguments:
        if not after_out and argument.split("=")[0] != "--out":
            kept.append(argument)
        after_out = argument == "--out"
    return shlex.join(["lorasp", *kept])


def tune(jobs: Sequence[Job], bench: Bench, provenance: dict[str, str], options: argparse.Namespace) -> int:
    """Search on `bench`, write every winner at once, show what came out; returns the exit code."""
    folder = options.out or Path(tuning.__file__).parent / "configs"
    console.make_folder(folder)
    try:
        file = PlanFile(folder, bench.target.name, provenance, fresh=options.fresh)
    except ValueError as error:
        raise UsageError(f"{error}; --fresh starts a new one") from error
    pending = file.pending(jobs)
    print(f"{bench.target.name}: {len(pending)} of {len(jobs)} calls to measure, {options.budget:g} s at most")
    if len(file) and not file.comparable:
        print(f"{file.path.name} was measured with other versions: its rows stay until they are measured again")
    measured, wrong = [], False
    outcomes = search(
        pending, bench, plans=_plans(options), seconds=options.seconds, budget=options.budget,
        progress=_progress,
    )  # fmt: skip
    try:
        for _, group in itertools.groupby(outcomes, key=lambda outcome: outcome.job.group):
            shown = []
            for outcome in group:
                if outcome.winner is not None:
                    file.add(outcome.job, outcome.winner)
                measured.append(outcome)
                shown.append(outcome)
                wrong = wrong or any(plan.gemm is None for plan in outcome.wrong)
            _progress("")
            print_outcomes(shown)
    except OSError as error:
        raise UsageError(f"{file.path}: {error}; --out takes another folder") from error
    except DeviceLost as error:
        _progress("")
        print(f"lorasp tune: the device failed: {error}", file=sys.stderr)
        _print_written(file, measured)
        return 1
    if len(measured) < len(pending):
        print(f"the time is over: {len(pending) - len(measured)} calls are not measured; the same command goes on")
    _print_written(file, measured)
    return 1 if wrong else 0


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


def _print_written(file: PlanFile, measured: Sequence[Outcome]) -> None:
    if any(outcome.winner is not None for outcome in measured):
        print(f"wrote {file.path} ({len(file)} rows)")
    else:
        print("nothing written: nothing was measured")


def _device_bench(options: argparse.Namespace) -> tuple[Bench, dict[str, str]]:
    missing = registry.available_backends()["triton"]
    if missing is not None:
        raise UsageError(
            f"measures on a GPU, through Triton: {missing}; --dry-run --target sm_90 shows what it would do"
        )
    from lorasp.triton_kernels.launch import INTERPRETED
    from lorasp.tune import device as devices

    device = options.device or torch.device("cpu" if INTERPRETED else "cuda")
    if INTERPRETED and device.type != "cpu":
        raise UsageError(f"--device must be cpu under TRITON_INTERPRET=1, got {device}")
    for dtype in options.dtypes or DTYPES:
        if reason := registry.unsupported("triton", device.type, dtype):
            raise UsageError(reason)
    if device.type == "cpu" and options.out is None:
        raise UsageError(
            "times of Triton's interpreter mean nothing to a plan table: --out must name a folder for them"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bench = devices.DeviceBench(device)
    return bench, devices.provenance(bench)


def _target(options: argparse.Namespace) -> tuning.Target:
    if options.target is not None:
        return tuning.target_of_arch(options.target)
    if not torch.cuda.is_available():
        raise UsageError("--dry-run needs --target (sm_80, sm_90, sm_100, sm_120, ...) where there is no GPU")
    return tuning.target_of_device(options.device or torch.device("cuda", torch.cuda.current_device()))


def _print_candidates(jobs: Sequence[Job], target: tuning.Target, options: argparse.Namespace) -> None:
    """Per layer and set of candidates: each of them with the shared memory its pipeline needs; then the totals."""
    plans = _plans(options)
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
        rows = [
            [
                describe(plan),
                "" if plan.gemm is None else _kib(target, plan, dtype, R),
                *_tile_counts(target, plan, members),
            ]
            for plan in found
        ]
        drop = "dropout" if dropout else "no dropout"
        name = str(dtype).removeprefix("torch.")
        console.print_table(
            f"{direction} r{R}, {name}, {drop}\nK×N = {layers}\nM = {tokens}",
            ["candidate", "shared KiB", "tiles, largest call", "waves"],
            rows,
        )
    seconds = len(compiled) * _COMPILE_SECONDS + measurements * _CHECK_SECONDS + len(jobs) * options.seconds
    print(f"{target.name}: at most {target.shared_memory / 1024:.0f} KiB of shared memory per block")
    print(f"{len(jobs)} calls, {measurements} measurements, about {len(compiled)} compilations")
    print(
        f"about {seconds / 60:.0f} min (--budget is {options.budget / 60:.0f} min) if a compilation takes "
        f"{_COMPILE_SECONDS:g} s, a candidate's check and trial {_CHECK_SECONDS:g} s, a call's rounds {options.seconds:g} s"
    )


def _kib(target: tuning.Target, plan: tuning.Plan, dtype: torch.dtype, R: int) -> str:
    extra_rank = tuning.pad_rank(R, tuning.ONEPASS_MAX_RANK) if plan.name == "onepass" else 0
    return f"{shared_bytes(target, plan.gemm, dtype, extra_rank) / 1024:.0f}"


def _tile_counts(target: tuning.Target, plan: tuning.Plan, jobs: Iterable[Job]) -> list[str]:
    """How many output tiles the largest call has, and how often they fill the device."""
    if plan.gemm is None:
        return ["", ""]
    job = max(jobs, key=lambda job: (job.M, job.N * job.K))
    columns = job.N if job.direction == "forward" else job.K
    tiles = -(-job.M // plan.gemm.block_m) * -(-columns // plan.gemm.block_c)
    return [str(tiles), f"{tiles / target.sm_count:.1f}"]


def _progress(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces; nothing where stderr is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:150]}", end="", file=sys.stderr, flush=True)
