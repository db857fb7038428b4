"""What `lorasp bench` shows of HiddenKey's operators: a table per shape, one csv, and time against drop rate."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lorasp import console, info
from lorasp.bench import attention, hiddenkey, report, session
from lorasp.bench.hiddenkey import Contest
from lorasp.console import UsageError

_MIB = 2**20
_STYLES = {
    "lorasp column": ("#1f77b4", "-", "o"),
    "lorasp element": ("#17a2b8", "-", "s"),
    attention.MASK: ("#5f6368", "--", "^"),
    attention.EAGER: ("#e07b39", "--", "v"),
    attention.FLASH_DROPOUT: ("#d93025", "none", "D"),
}


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if a kernel computes something wrong. Raises UsageError for options that do not fit."""
    names = hiddenkey.SIZES[options.op][0]
    for sizes in options.sizes or ():
        if len(sizes) != len(names.split(",")):
            raise UsageError(f"--sizes of {options.op} must be {names}, got {','.join(map(str, sizes))}")
    rates = tuple(options.rates or hiddenkey.RATES)
    if not all(0.0 <= rate < 1.0 for rate in rates):
        raise UsageError(f"--rates must be in [0, 1), got {list(rates)}")
    device = session.device_of(options)
    machine = info.device_name(device)
    environment = session.begin(options.out, machine, session.timing_rules(device))
    contests = []
    try:
        for contest in hiddenkey.run(
            options.op, options.sizes, dtype=options.dtype, device=device, rates=rates, causal=options.causal,
            rounds=options.rounds, seconds=options.seconds,
        ):  # fmt: skip
            print_contest(contest)
            contests.append(contest)
    except AssertionError as error:
        return session.wrong(error)
    kind = ["causal"] * options.causal
    dtype = str(options.dtype).removeprefix("torch.")
    path = options.out / f"{report.stem(kind, machine, dtype, 0.0, op=options.op)}.csv"
    rows = [
        session.csv_row(row, row.op) | {"sizes": "x".join(map(str, row.sizes))}
        for contest in contests
        for row in contest.rows
    ]
    drawn = options.op == "dropkey_attention"
    session.finish(
        path, rows, environment, (lambda picture: plot(picture, contests, machine, environment)) if drawn else None
    )
    return 0


def print_contest(contest: Contest) -> None:
    rows = [
        [
            row.name, "" if row.rate is None else f"{row.rate:g}", f"{row.ms:.3g}",
            f"{row.ratio:.3f} ({row.ratio_q1:.3f}–{row.ratio_q3:.3f})", f"{row.saved_bytes / _MIB:.1f}",
        ]
        for row in contest.rows
    ]  # fmt: skip
    console.print_table(contest.title, ["", "rate", "fwd+bwd ms", "ratio (q1–q3)", "saved MiB"], rows)
    for target in attention.targets(contest.rows):
        print(f"  {target}")
    for name, reason in contest.unavailable.items():
        print(f"  not measured: {name}: {reason}")


def plot(path: Path, contests: Sequence[Contest], machine: str, versions: dict[str, str]) -> None:
    """Ratio to SDPA without drop against the drop rate, a panel per shape. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(contests), 4)
    lines = -(-len(contests) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.4 * columns, 0.6 + 4 * lines), squeeze=False)
    for axis in axes.flat[len(contests) :]:
        axis.set_axis_off()
    for axis, contest in zip(axes.flat, contests, strict=False):
        for name, (colour, line, marker) in _STYLES.items():
            rows = [row for row in contest.rows if row.name == name]
            column = [row for row in contest.rows if row.name == "lorasp column" and not row.rate]
            rows = column * (name == "lorasp element") + rows
            if rows:
                spread = [[r.ratio - r.ratio_q1 for r in rows], [r.ratio_q3 - r.ratio for r in rows]]
                axis.errorbar(
                    [r.rate for r in rows], [r.ratio for r in rows], yerr=spread, color=colour, linestyle=line,
                    marker=marker, markersize=4, label=name, linewidth=1.6, elinewidth=0.8,
                )  # fmt: skip
        axis.axhline(1.0, color="#202124", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_xlabel("drop rate p")
        axis.set_title(contest.title.removeprefix("dropkey_attention "), fontsize=9)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for line in axes:
        line[0].set_ylabel("forward + backward ÷ SDPA without drop")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"dropkey_attention on {machine}\n{session.made_with(versions)}", fontsize=10)
    figure.tight_layout(rect=(0, 0.05 / lines, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
