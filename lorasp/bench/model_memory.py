"""What `lorasp bench --model … --memory` finds: the peak of one training step of each variant, and what it consists of.

Measured: a process of its own per variant takes a few steps; the peak of a further one is the high-water mark of the
CUDA allocator (on a CPU: the most the process had resident). Computed: the same step on tensors without data, as
lorasp.bench.account counts it, which needs no GPU and knows nothing of what operators allocate inside. A row says which
of the two its peak is. The parts of the peak come from the account in both.
"""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import torch

from lorasp import console
from lorasp.bench import child
from lorasp.bench.account import PARTS, Account, account, as_on
from lorasp.bench.model_variants import BASE, MODELS, PEFT
from lorasp.bench.models import Candidate, Workload, verify_operators
from lorasp.bench.timing import give_back, interleave, make_clock, pin_malloc, quartiles, spread
from lorasp.memory import saved_bytes

COMPUTED, MEASURED = "computed", "measured"
METHODS = (MEASURED, COMPUTED)
_WARM_STEPS = 3  # the optimizer's state exists from the first one on
_ALONE = 5  # steps timed in a variant's own process
TOGETHER, APART = "interleaved", "each in a process of its own"


@dataclass(frozen=True)
class Row:
    """One variant: the peak of a training step in bytes, its parts, and the time of a step where it was measured.

    method: "measured" or "computed", of peak_bytes. reserved_bytes: what the CUDA allocator had taken from the device,
    measured rows only. accounted_bytes: the account's own peak, the sum of the parts: weights (the frozen model),
    adapters, optimizer (its state), gradients (of parameters), saved (for backward), other; peak_bytes less
    accounted_bytes is what operators allocate inside. saved_bytes: saved_bytes() of forward to the logits;
    saved_over_frozen: of these, what the frozen model does not save. ms, to_peft: see models.Row; timing:
    "interleaved", or "each in a process of its own" where the variants do not fit into the memory together, or empty.
    """

    model: str
    variant: str
    method: str
    dtype: str
    dropout_p: float
    checkpointing: bool
    batch: int
    tokens: int
    rank: int
    peak_bytes: int
    reserved_bytes: int | None
    accounted_bytes: int
    weights: int
    adapters: int
    optimizer: int
    gradients: int
    saved: int
    other: int
    saved_bytes: int
    saved_over_frozen: int | None
    trainable: int
    timing: str = ""
    ms: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    to_peft: float | None = None
    to_peft_q1: float | None = None
    to_peft_q3: float | None = None


@dataclass
class MemoryResult:
    """The variants of one model, and why others have no row."""

    rows: list[Row] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What is the same for all variants of a run."""

    model: str
    dtype: torch.dtype
    dropout_p: float
    checkpointing: bool = False

    def workload(self, device: torch.device) -> Workload:
        return Workload.of(self.model, self.dtype, device, self.dropout_p, self.checkpointing)

    def ask(self, variant: str, device: torch.device) -> dict:
        """measure() in a process of its own."""
        return child.ask(self.model, variant, self.dtype, device, self.dropout_p, self.checkpointing)


def run(
    setting: Setting,
    variants: Sequence[str],
    method: str,
    *,
    device: torch.device,
    rounds: int | None = None,
    seconds: float = 20.0,
    progress: Callable[[str], None] = lambda text: None,
) -> MemoryResult:
    """Measure on `device`, or compute for it; the frozen model and PEFT as it comes are always among the variants.

    Measured variants are timed too on CUDA: step by step in turn, or each for itself where they do not fit together.
    Raises AssertionError, before anything is measured, if an operator at the model's widths does not meet
    lorasp.testing's tolerance.
    """
    variants = list(dict.fromkeys((BASE, PEFT, *variants)))
    if method == MEASURED:
        progress(f"{setting.model}: checking operators")
        verify_operators(setting.workload(torch.device("meta")), device)
        give_back(device)  # the children need what this, and timing the model before, has taken
    result, found = MemoryResult(), {}
    for variant in variants:
        progress(f"{setting.model}: memory of {variant}")
        facts = compute(setting, variant, device.type) if method == COMPUTED else setting.ask(variant, device)
        if "unavailable" in facts:
            result.unavailable[variant] = facts["unavailable"]
        else:
            found[variant] = facts
    if method == MEASURED and device.type == "cuda":
        progress(f"{setting.model}: timing {len(found)} variants")
        together = time_together(setting, list(found), device, rounds, seconds)
        for variant, facts in found.items():
            facts |= together[variant] if together else {"timing": APART}
    result.rows = [_row(setting, variant, method, facts, found.get(BASE)) for variant, facts in found.items()]
    return result


def _row(setting: Setting, variant: str, method: str, facts: dict, frozen: dict | None) -> Row:
    case = MODELS[setting.model]
    return Row(
        model=setting.model, variant=variant, method=method, dtype=str(setting.dtype).removeprefix("torch."),
        dropout_p=setting.dropout_p, checkpointing=setting.checkpointing, batch=case.batch, tokens=case.tokens,
        rank=case.rank, saved_over_frozen=facts["saved_bytes"] - frozen["saved_bytes"] if frozen else None, **facts,
    )  # fmt: skip


def _watch(candidate: Candidate, workload: Workload) -> contextlib.AbstractContextManager[Account]:
    base = workload.base
    return account(
        candidate.model, (*base.parameters(), *base.buffers()), candidate.inputs.values(), candidate.optimizer
    )


def _facts(watch: Account, candidate: Candidate, kept: int) -> dict:
    parts = {part: watch.at_peak[part] for part in PARTS}
    return {"accounted_bytes": watch.peak, **parts, "saved_bytes": kept, "trainable": candidate.trainable}


def compute(setting: Setting, variant: str, device_type: str) -> dict:
    """A Row's fields from the account of a step on tensors without data that takes `device_type`'s operators.

    {"unavailable": reason} for a variant that cannot be built around the model.
    """
    workload = setting.workload(torch.device("meta"))
    try:
        candidate = workload.build(variant)
    except ValueError as reason:
        return {"unavailable": str(reason)}
    if candidate.optimizer is not None and device_type == "cuda":
        candidate.optimizer.param_groups[0]["foreach"] = True  # what it chooses itself on CUDA
    with as_on(device_type):
        kept = saved_bytes(candidate.logits, exclude=candidate.model)
        candidate.step()
        with _watch(candidate, workload) as watch:
            candidate.step()
    facts = _facts(watch, candidate, kept)
    return {"peak_bytes": watch.peak, "reserved_bytes": None, **facts}


def measure(setting: Setting, variant: str, device: torch.device) -> dict:
    """A Row's fields, measured in this process, which should do nothing else.

    {"unavailable": reason} for a variant that cannot be built around the model or does not fit into the memory.
    """
    if device.type == "cpu":
        pin_malloc()
    with console.quiet_imports():
        importlib.import_module("peft")  # for every variant: it is no part of what training keeps
    try:
        return _measured(setting.workload(device), variant, device)
    except torch.OutOfMemoryError as error:
        return {"unavailable": str(error).splitlines()[0]}


def _measured(workload: Workload, variant: str, device: torch.device) -> dict:
    try:
        candidate = workload.build(variant)
    except ValueError as reason:
        return {"unavailable": str(reason)}
    for _ in range(_WARM_STEPS):
        candidate.step()
    peak, reserved = _peak_of_a_step(candidate, device)
    with _watch(candidate, workload) as watch:
        candidate.step()
    kept = saved_bytes(candidate.logits, exclude=candidate.model)
    timed = _time_alone(candidate, device) if device.type == "cuda" else {}
    return {"peak_bytes": peak, "reserved_bytes": reserved, **_facts(watch, candidate, kept), **timed}


def _peak_of_a_step(candidate: Candidate, device: torch.device) -> tuple[int, int | None]:
    if device.type == "cpu":
        candidate.step()
        return child.peak_resident(), None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    candidate.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _time_alone(candidate: Candidate, device: torch.device) -> dict:
    clock = make_clock(device)
    q1, median, q3 = quartiles([1e3 * clock(candidate.step, 1) for _ in range(_ALONE)])
    return {"ms_q1": q1, "ms": median, "ms_q3": q3}


def time_together(
    setting: Setting, variants: Sequence[str], device: torch.device, rounds: int | None, seconds: float
) -> dict[str, dict]:
    """Each variant's time, steps of all taken in turn around one set of weights; empty where they do not fit together.

    The first variant is the base of the interleaving; ratios to PEFT's are taken round by round, as in models.run.
    """
    try:
        workload = setting.workload(device)
        steps = [workload.build(variant).step for variant in variants]
        samples = interleave(steps[0], steps, make_clock(device), rounds, seconds)
    except torch.OutOfMemoryError:
        return {}
    peft = samples[variants.index(PEFT)] if PEFT in variants else None
    timed = {variant: spread(sample, peft) for variant, sample in zip(variants, samples, strict=True)}
    columns = {one.name for one in fields(Row)}
    return {
        variant: {"timing": TOGETHER} | {name: value for name, value in values.items() if name in columns}
        for variant, values in timed.items()
    }
