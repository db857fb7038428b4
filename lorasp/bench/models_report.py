"""What `lorasp bench --model` shows: a table per model, the targets beside what was measured, one csv and one plot."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorasp import console, info
from lorasp.bench import models, report, session
from lorasp.bench.model_variants import BASE, MODELS, PEFT, VARIANTS
from lorasp.bench.models import ModelResult, Row
from lorasp.bench.targets import Target
from lorasp.console import UsageError

_MIB = 2**20

# Of toy-llama in bf16 at lora_dropout 0.05.
_STEP, _OVER_FROZEN, _ALL = (
    "time of a step over PEFT's",
    "bytes saved beyond the frozen model's, over PEFT's",
    "all bytes saved, over the frozen model's",
)
_BOUNDS = (
    ("lorasp", _STEP, 0.85),
    ("lorasp+fa", _STEP, 0.85),
    ("lorasp", _OVER_FROZEN, 0.15),
    ("lorasp+fa", _OVER_FROZEN, 0.01),
    ("accelerate", _STEP, 0.85),
    ("accelerate+fa", _STEP, 0.85),
    ("accelerate", _OVER_FROZEN, 0.15),
    ("accelerate+fa", _OVER_FROZEN, 0.01),
    ("lorasp+fa+recompute", _ALL, 0.86),
    ("lorasp+fa+recompute-full", _ALL, 0.62),
)


def targets(rows: Sequence[Row]) -> list[Target]:
    """The targets these rows speak about; none for another model, dtype or rate of dropout."""
    by_name = {row.variant: row for row in rows}
    base, peft = by_name[BASE], by_name[PEFT]
    if (base.model, base.dtype, base.dropout_p) != ("toy-llama", "bfloat16", 0.05):
        return []
    values = {
        _STEP: lambda row: row.to_peft,
        _OVER_FROZEN: lambda row: row.saved_over_frozen / peft.saved_over_frozen,
        _ALL: lambda row: row.saved_bytes / base.saved_bytes,
    }
    return [Target(name, what, values[what](by_name[name]), bound) for name, what, bound in _BOUNDS if name in by_name]


def variants_asked_for(options: argparse.Namespace) -> list[str]:
    """Names of variants, all without --variants. Raises UsageError for options of --model that do not fit."""
    if not 0.0 <= options.dropout < 1.0:
        raise UsageError(f"--dropout must be in [0, 1), got {options.dropout}")
    for name in options.model:
        if name not in MODELS:
            raise UsageError(f"--model must be among {', '.join(MODELS)}, got {name!r}")
    variants = options.variants or list(VARIANTS)
    for name in (*variants, *[options.child] * (options.child is not None)):
        if name not in VARIANTS:
            raise UsageError(f"--variants must be among {', '.join(VARIANTS)}, got {name!r}")
    return variants


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if a variant computes something wrong; 2 if one asked for by name cannot be built around a model.

    Raises UsageError for options that do not fit.
    """
    variants = variants_asked_for(options)
    device = session.device_of(options)
    machine = info.device_name(device)
    environment = session.begin(options.out, machine, session.timing_rules(device), "peft")
    results: list[ModelResult] = []
    try:
        for name in options.model:
            result = models.run(
                name, variants, dtype=options.dtype, device=device, dropout_p=options.dropout, rounds=options.rounds,
                seconds=options.seconds, progress=console.progress,
            )  # fmt: skip
            console.progress("")
            print_result(result)
            results.append(result)
    except AssertionError as error:
        return session.wrong(error)
    rows = [row for result in results for row in result.rows]
    stem = report.stem(options.model, machine, rows[0].dtype, options.dropout, op="model")
    path = options.out / f"{stem}.csv"
    session.finish(
        path, [session.csv_row(row, "model") for row in rows], environment,
        lambda picture: plot(picture, rows, machine, environment),
    )  # fmt: skip
    return 2 if options.variants and any(result.unavailable for result in results) else 0


def title(row: Row) -> str:
    drop = f"lora_dropout {row.dropout_p:g}" if row.dropout_p else "no dropout"
    return f"{row.model}, {row.batch}×{row.tokens} tokens, r = {row.rank}, {row.dtype}, {drop}"


def print_result(result: ModelResult) -> None:
    """One line per variant, then the targets that these rows speak about."""
    rows = result.rows
    columns = ["variant", "step ms", "÷ frozen", "÷ peft (q1–q3)", "saved MiB", "over frozen", "peak MiB"]
    lines = [
        [
            row.variant, f"{row.ms:.4g}", f"{row.ratio:.2f}",
            f"{row.to_peft:.2f} ({row.to_peft_q1:.2f}–{row.to_peft_q3:.2f})", f"{row.saved_bytes / _MIB:.2f}",
            f"{row.saved_over_frozen / _MIB:.3f}", "" if row.peak_bytes is None else f"{row.peak_bytes / _MIB:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    console.print_table(title(rows[0]), columns, lines)
    report.warn_of_noise("the frozen model", rows[0].ratio_q3 - rows[0].ratio_q1)
    for target in targets(rows):
        print(f"  {target}")
    for variant, reason in result.unavailable.items():
        print(f"  not measured: {variant}: {reason}")


def plot(path: Path, rows: Sequence[Row], machine: str, versions: dict[str, str]) -> None:
    """Per model a row of panels: time of a step, bytes saved, peak memory. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    what = "allocated" if session.names_gpu(machine) else "resident"
    names = list(dict.fromkeys(row.model for row in rows))
    most = max(sum(row.model == name for row in rows) for name in names)
    figure, axes = pyplot.subplots(
        len(names), 3, figsize=(13, len(names) * (1.4 + 0.3 * most)), sharey="row", squeeze=False
    )
    for line, name in zip(axes, names, strict=True):
        found = [row for row in rows if row.model == name]
        spread = [[row.to_peft - row.to_peft_q1 for row in found], [row.to_peft_q3 - row.to_peft for row in found]]
        _bars(line[0], found, [row.to_peft for row in found], "{:.2f}", xerr=spread)
        line[0].axvline(1.0, color="#202124", linewidth=1, zorder=0)
        line[0].set_title("time of a training step ÷ PEFT default's", fontsize=9)
        _bars(line[1], found, [row.saved_bytes / _MIB for row in found], "{:.1f}")
        line[1].axvline(found[0].saved_bytes / _MIB, color="#202124", linewidth=1, zorder=0)
        line[1].set_title("MiB saved for backward, weights aside", fontsize=9)
        _bars(line[2], found, [(row.peak_bytes or 0) / _MIB for row in found], "{:.0f}")
        line[2].set_title(f"MiB {what} at most, in a process of its own", fontsize=9)
        line[0].set_ylabel(title(found[0]).replace(", ", "\n"), fontsize=8)
    figure.suptitle(f"training steps on {machine}\n{session.made_with(versions, 'peft')}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _bars(axis, rows: Sequence[Row], values: Sequence[float], form: str, **style) -> None:
    """Hatched: A frozen, as in the layers' plot."""
    drawn = axis.barh(
        [row.variant for row in rows], values, color=[_colour(row.variant) for row in rows], height=0.72,
        hatch=["///" if "+fa" in row.variant else "" for row in rows], edgecolor="white", linewidth=0,
        error_kw={"elinewidth": 0.8, "ecolor": "#202124"}, **style,
    )  # fmt: skip
    axis.bar_label(drawn, [form.format(value) for value in values], padding=3, fontsize=8)
    if not axis.yaxis_inverted():
        axis.invert_yaxis()
    axis.tick_params(labelsize=8)
    axis.margins(x=0.16)
    axis.spines[["top", "right"]].set_visible(False)


def _colour(variant: str) -> str:
    kind = variant.partition("+")[0]
    return {BASE: "#9aa0a6", PEFT: "#f4b183", "peft-half": "#e07b39", "lorasp": "#1f77b4"}.get(kind, "#2ca02c")


def choices() -> str:
    """The models and variants, for --help."""
    variants = "\n".join(f"  {name:<20}{variant.what}" for name, variant in VARIANTS.items())
    trained = ", ".join(name for name, case in MODELS.items() if not case.published)
    published = ", ".join(name for name, case in MODELS.items() if case.published)
    return f"whole models (--model): {trained}\npublished sizes, for their memory: {published}\nvariants:\n{variants}"
