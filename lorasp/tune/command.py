"""`lorasp tune`: jobs from the command line, outcomes to screen and to the device's plan table."""

import argparse
import datetime
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lorasp import console
from lorasp.console import UsageError
from lorasp.ops import registry
from lorasp.triton_kernels import tuning
from lorasp.tune import report, search
from lorasp.tune.jobs import dropkey_attention, lora_linear, lora_linear_skinny
from lorasp.tune.search import Bench, DeviceLost, Job, Outcome
from lorasp.tune.table import PlanFile

JOBS = {"lora_linear": lora_linear, "dropkey_attention": dropkey_attention, "lora_linear_skinny": lora_linear_skinny}
OPTIONS = {
    "--op lora_linear": ("shapes", "ranks", "tokens", "dropout", "plans"),
    "--op dropkey_attention": ("sizes",),
    "--op lora_linear_skinny": ("shapes", "ranks", "tokens", "dropout"),
}


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Every job of the options. Raises UsageError for options of another operator."""
    console.refuse_foreign(options, f"--op {options.op}", OPTIONS)
    for sizes in options.sizes or ():
        if len(sizes) != 4 or sizes[3] > 256:
            raise UsageError(f"--sizes must be B,H,S,D with D up to 256, got {','.join(map(str, sizes))}")
    return JOBS[options.op].make_jobs(options)


def _plans(options: argparse.Namespace) -> Sequence[str]:
    return ("addmm", *options.plans) if options.plans else tuning.PLANS[1:]


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if what runs on the architecture's own tiles is wrong or the device is lost.

    Raises UsageError where nothing can be measured.
    """
    jobs = make_jobs(options)
    if options.dry_run:
        report.print_work(jobs, _target(options), _plans(options), options.seconds, options.budget)
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
        fresh = {job.section for job in jobs} if options.fresh else ()
        file = PlanFile(folder, bench.target.name, provenance, fresh=fresh)
    except ValueError as error:
        raise UsageError(f"{error}; --fresh starts a new one") from error
    pending = file.pending(jobs)
    print(f"{bench.target.name}: {len(pending)} of {len(jobs)} calls to measure, {options.budget:g} s at most")
    if len(file) and not file.comparable:
        print(f"{file.path.name} was measured with other versions: its rows stay until they are measured again")
    measured, wrong = [], False
    outcomes = search.run(
        pending, bench, plans=_plans(options), seconds=options.seconds, budget=options.budget,
        progress=console.progress,
    )  # fmt: skip
    try:
        for _, group in itertools.groupby(outcomes, key=lambda outcome: outcome.job.group):
            shown = []
            for outcome in group:
                if outcome.winner is not None:
                    file.add(outcome.job, outcome.winner)
                measured.append(outcome)
                shown.append(outcome)
                wrong = wrong or any(plan.own for plan in outcome.wrong)
            console.progress("")
            report.print_outcomes(shown)
    except OSError as error:
        raise UsageError(f"{file.path}: {error}; --out takes another folder") from error
    except DeviceLost as error:
        console.progress("")
        print(f"lorasp tune: the device failed: {error}", file=sys.stderr)
        _print_written(file, measured)
        return 1
    if len(measured) < len(pending):
        print(f"the time is over: {len(pending) - len(measured)} calls are not measured; the same command goes on")
    _print_written(file, measured)
    return 1 if wrong else 0


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
    for dtype in options.dtypes:
        if reason := registry.unsupported("triton", device.type, dtype):
            raise UsageError(reason)
    if device.type == "cpu" and options.out is None:
        raise UsageError(
            "times of Triton's interpreter mean nothing to a plan table: --out must name a folder for them"
        )
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    bench = devices.DeviceBench(device)
    return bench, devices.provenance(bench)


def _target(options: argparse.Namespace) -> tuning.Target:
    if options.target is not None:
        return tuning.target_of_arch(options.target)
    if not torch.cuda.is_available():
        raise UsageError("--dry-run needs --target (sm_80, sm_90, sm_100, sm_120, ...) where there is no GPU")
    return tuning.target_of_device(options.device or torch.device("cuda", torch.cuda.current_device()))
