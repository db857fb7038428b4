"""What `lorasp bench --model … --memory` shows: a table per model that says whether its peaks were measured or
computed, one csv and one plot.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lorasp import console, info
from lorasp.bench import model_memory, models_report, report, session
from lorasp.bench.account import PARTS
from lorasp.bench.model_memory import APART, COMPUTED, MEASURED, TOGETHER, MemoryResult, Row, Setting
from lorasp.bench.model_variants import MODELS, PEFT

_GIB, _MIB = 2**30, 2**20
_NOT_COUNTED = "not counted: what operators allocate inside, the allocator's rounding and fragmentation, CUDA's context"
_WHAT = {
    "cuda": "peak: the CUDA allocator's high-water mark during one step",
    "cpu": "peak: the most the process had resident, all imports included",
}


def wanted(options: argparse.Namespace) -> bool:
    """Whether these options ask for memory: by --memory, for another process, or by a model of a published size."""
    return (options.memory or options.child) is not None or any(
        name in MODELS and MODELS[name].published for name in options.model
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if an operator computes something wrong; 2 if a variant asked for by name has no row.

    Raises UsageError for options that do not fit.
    """
    variants = models_report.variants_asked_for(options)
    here = session.device_of(options)
    settings = [Setting(name, options.dtype, options.dropout, options.checkpointing) for name in options.model]
    if options.child is not None:
        print(json.dumps(model_memory.measure(settings[0], options.child, here)))
        return 0
    method = (
        options.memory if options.memory in model_memory.METHODS else (MEASURED if here.type == "cuda" else COMPUTED)
    )
    # A computed step takes CUDA's operators wherever it is computed.
    device = torch.device("cuda") if options.device is None and method == COMPUTED else here
    machine = machine_of(method, device)
    rules = f"computed; {_NOT_COUNTED}" if method == COMPUTED else f"measured; {_WHAT[device.type]}"
    environment = session.begin(options.out, machine, rules, "peft", what="memory of one training step, ")
    results = []
    try:
        for setting in settings:
            result = model_memory.run(
                setting, variants, method, device=device, rounds=options.rounds, seconds=options.seconds,
                progress=console.progress,
            )  # fmt: skip
            console.progress("")
            print_result(result)
            results.append(result)
    except AssertionError as error:
        return session.wrong(error, "measured")
    rows = [row for result in results for row in result.rows]
    if rows:
        words = f"{machine} checkpointing" if options.checkpointing else machine
        stem = report.stem(options.model, words, rows[0].dtype, options.dropout, op="memory")
        session.finish(
            options.out / f"{stem}.csv", [session.csv_row(row, "memory") for row in rows], environment,
            lambda picture: plot(picture, rows, machine, environment),
        )  # fmt: skip
    return 2 if options.variants and any(result.unavailable for result in results) else 0


def machine_of(method: str, device: torch.device) -> str:
    """The csv's device: the one that was measured, or that none was."""
    return f"computed for {device.type}" if method == COMPUTED else info.device_name(device)


def title(row: Row) -> str:
    drop = f"lora_dropout {row.dropout_p:g}" if row.dropout_p else "no dropout"
    again = ", checkpointing" * row.checkpointing
    return f"{row.model}, {row.batch}×{row.tokens} tokens, r = {row.rank}, {row.dtype}, {drop}{again}: {row.method}"


def print_result(result: MemoryResult) -> None:
    """One line per variant: GiB at the peak and what they are; then what was not measured and how steps were timed."""
    rows = result.rows
    measured = any(row.method == MEASURED for row in rows)
    timed = any(row.ms is not None for row in rows)
    reserved = any(row.reserved_bytes is not None for row in rows)
    columns = ["variant", "peak GiB", *["reserved"] * reserved, "weights", "adapters*", "saved", "other"]
    columns += [*["beyond"] * measured, "over frozen MiB", *["step ms", "÷ peft"] * timed]
    lines = []
    for row in rows:
        trained = row.adapters + row.optimizer + row.gradients
        line = [row.variant, _gib(row.peak_bytes), *[_gib(row.reserved_bytes)] * reserved]
        line += [_gib(value) for value in (row.weights, trained, row.saved, row.other)]
        line += [_gib(row.peak_bytes - row.accounted_bytes)] * measured
        line += ["" if row.saved_over_frozen is None else f"{row.saved_over_frozen / _MIB:.2f}"]
        line += [_number(row.ms, ".4g"), _number(row.to_peft, ".2f")] * timed
        lines.append(line)
    if rows:
        console.print_table(title(rows[0]), columns, lines)
        beyond = "; beyond: of the peak, what is in no tensor that an operator returned" * measured
        print(f"  *adapters, their gradients and optimizer state{beyond}")
    for how in dict.fromkeys(row.timing for row in rows if row.timing):
        print({TOGETHER: "  steps were timed in turn, interleaved", APART: _TIMED_APART}[how])
    for variant, reason in result.unavailable.items():
        print(f"  no row: {variant}: {reason}")


_TIMED_APART = (
    "  steps were timed each variant in a process of its own, NOT interleaved: all variants together do not fit into "
    "this device's memory; a clock that drifts is in these figures"
)


def _gib(count: int | None) -> str:
    return "" if count is None else f"{count / _GIB:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


_COLOURS = dict(zip(PARTS, ("#9aa0a6", "#1f77b4", "#6a51a3", "#17a2b8", "#e07b39", "#dadce0"), strict=True))


def plot(path: Path, rows: Sequence[Row], machine: str, versions: dict[str, str]) -> None:
    """Per model a panel of stacked bars, the parts of each variant's peak. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.model for row in rows))
    most = max(sum(row.model == name for row in rows) for name in names)
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.2 * len(names), 1.9 + 0.34 * most), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        found = [row for row in rows if row.model == name]
        labels, start = [row.variant for row in found], [0.0] * len(found)
        parts = {part: [getattr(row, part) / _GIB for row in found] for part in PARTS}
        if found[0].method == MEASURED:
            parts["inside operators"] = [max(0, row.peak_bytes - row.accounted_bytes) / _GIB for row in found]
        for part, values in parts.items():
            colour = _COLOURS.get(part, "#c5221f")
            axis.barh(labels, values, left=start, label=part, color=colour, height=0.72, edgecolor="white", linewidth=0)
            start = [a + b for a, b in zip(start, values, strict=True)]
        peft = next((row.peak_bytes for row in found if row.variant == PEFT), None)
        for y, row in enumerate(found):
            share = f" ({row.peak_bytes / peft:.2f})" if peft else ""
            axis.annotate(f"{row.peak_bytes / _GIB:.1f}{share}", (start[y], y), (3, 0), textcoords="offset points",
                          va="center", fontsize=8)  # fmt: skip
        axis.invert_yaxis()
        axis.set_title(title(found[0]).replace(", ", "\n", 1), fontsize=8)
        axis.set_xlabel("GiB at the peak (÷ PEFT default's)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.24)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    made_with = session.made_with(versions, "peft")
    figure.suptitle(f"one training step's memory, {machine}\n{made_with}", fontsize=10)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
