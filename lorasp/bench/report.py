"""What `lorasp bench` shows: a table per shape, one csv and one plot."""

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lorasp import bench, console
from lorasp.bench import Measurement, Provider, Shape, ShapeResult

_MIB = 2**20
# The base against itself: quartiles on a quiet machine lie about 0.04 apart.
_NOISY = 0.15
_SHORT = {"forward+backward": "fwd+bwd", "forward": "fwd"}


def title(shape: Shape, dtype: str, dropout_p: float) -> str:
    return f"{shape.label} (M×K×N), {dtype}, " + (f"dropout {dropout_p:g}" if dropout_p else "no dropout")


def print_result(result: ShapeResult) -> None:
    """One row per provider: milliseconds, ratio to the frozen nn.Linear with its quartiles, FLOP floor, bytes."""
    by_mode: dict[str, dict[Provider, Measurement]] = {}
    for m in result.measurements:
        by_mode.setdefault(m.mode, {})[m.provider] = m
    with_peak = any(m.peak_bytes is not None for m in result.measurements)
    columns = ["provider"]
    for mode in by_mode:
        columns += [f"{_SHORT[mode]} ms", "ratio (q1–q3)"]
    columns += ["floor", "saved MiB"] + ["peak MiB"] * with_peak
    rows = []
    for provider, one in next(iter(by_mode.values())).items():
        row = [provider.name]
        for measurements in by_mode.values():
            m = measurements[provider]
            row += [_ms(m.ms), _spread(m)]
        row += [f"{bench.floor(result.shape, provider):.3f}", _mib(one.saved_bytes)]
        rows.append(row + [_mib(one.peak_bytes)] * with_peak)
    any_one = result.measurements[0]
    console.print_table(title(result.shape, any_one.dtype, any_one.dropout_p), columns, rows)
    noise = max(m.ratio_q3 - m.ratio_q1 for m in result.measurements if m.provider.kind == bench.BASE)
    warn_of_noise("the frozen nn.Linear", noise)
    for provider, reason in result.unavailable.items():
        print(f"  not measured: {provider.name}: {reason}")


def warn_of_noise(base: str, spread: float) -> None:
    """Say so where the base against itself varies more than on a quiet machine."""
    if spread > _NOISY:
        print(f"  noisy: half of {base}'s own ratios lie {spread:.2f} or more apart; is the machine busy?")


def _spread(m: Measurement) -> str:
    digits = 2 if m.ratio_q3 < 10 else 1
    return f"{m.ratio:.{digits}f} ({m.ratio_q1:.{digits}f}–{m.ratio_q3:.{digits}f})"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / _MIB:.2f}"


def csv_row(m: Measurement) -> dict[str, object]:
    """A line of the csv: shape and provider spread out, five digits of every float."""
    values = asdict(m)
    shape, provider = values.pop("shape"), values.pop("provider")
    head = {"op": "lora_linear", "layer": shape.pop("name"), **shape, "provider": m.provider.name, **provider}
    for key, value in values.items():
        head[key] = f"{value:.5g}" if isinstance(value, float) and key != "dropout_p" else value
    head["peak_bytes"] = "" if m.peak_bytes is None else m.peak_bytes
    return {**head, "floor_flops": f"{bench.floor(m.shape, m.provider, m.mode):.4f}"}


def stem(
    sets: Sequence[str], device: str, dtype: str, dropout_p: float, members: int = 1, op: str = "lora_linear"
) -> str:
    """File name without suffix: operator, shape sets, device, dtype, dropout, layers per x and today's date."""
    words = "".join(c if c.isalnum() else " " for c in device.replace("(R)", "").replace("(TM)", "")).split()
    drop = f"-dropout{dropout_p:g}" if dropout_p else ""
    drop += f"-members{members}" if members > 1 else ""
    return f"{op}-{'-'.join([*sets, *words])}-{dtype}{drop}-{datetime.date.today():%Y%m%d}".lower()


_COLOURS = {
    "linear": "#9aa0a6", "linear-train": "#5f6368", "peft": "#f4b183", "peft-half": "#e07b39",
    "peft-half-compile": "#a64d12", "aten": "#c9a227",
}  # fmt: skip
_LORASP_COLOURS = ("#1f77b4", "#17a2b8", "#2ca02c", "#7fbf3f", "#6a51a3", "#9e9ac8", "#084594", "#00695c")


def plot(path: Path, results: Sequence[ShapeResult], machine: str, subtitle: str) -> None:
    """Grouped bars per shape: ratio to the frozen nn.Linear with quartiles, and bytes saved for backward.

    Raises ImportError where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(m.mode for result in results for m in result.measurements))
    providers = list(
        dict.fromkeys(m.provider for result in results for m in result.measurements if m.provider.kind != bench.BASE)
    )
    colours = _colour_map(providers)
    width = max(9.0, 1.8 + len(results) * (0.9 + 0.26 * len(providers)))
    figure, axes = pyplot.subplots(len(modes) + 1, 1, figsize=(width, 3.1 * (len(modes) + 1)), sharex=True)
    for axis, mode in zip(axes, modes, strict=False):
        _bars(axis, results, providers, colours, mode)
        axis.axhline(1.0, color="#202124", linewidth=1, zorder=3)
        axis.set_ylabel("time ÷ frozen nn.Linear")
        axis.set_title(f"{mode}: median ratio over interleaved rounds, whiskers are quartiles", fontsize=10)
    _saved_bars(axes[-1], results, providers, colours)
    axes[-1].set_xticks(range(len(results)), [result.shape.label for result in results])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=min(5, len(labels)), fontsize=8, frameon=False)
    figure.suptitle(f"lora_linear on {machine}\n{subtitle}", fontsize=11)
    rows = -(-len(labels) // 5)
    figure.tight_layout(rect=(0, 0.012 + 0.022 * rows, 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _colour_map(providers: Sequence[Provider]) -> dict[Provider, str]:
    def variant(p: Provider) -> tuple:
        return p.backend, p.plan, p.prepack, p.partial, p.shared

    variants = list(dict.fromkeys(variant(p) for p in providers if p.kind == "lorasp"))
    return {
        p: _LORASP_COLOURS[variants.index(variant(p)) % len(_LORASP_COLOURS)]
        if p.kind == "lorasp"
        else _COLOURS[p.kind]
        for p in providers
    }


def _positions(count: int) -> tuple[float, list[float]]:
    bar = 0.84 / count
    return bar, [(i - (count - 1) / 2) * bar for i in range(count)]


def _bars(axis, results, providers, colours, mode) -> None:
    bar, offsets = _positions(len(providers))
    for provider, offset in zip(providers, offsets, strict=True):
        found = [
            (i, m)
            for i, result in enumerate(results)
            for m in result.measurements
            if m.provider == provider and m.mode == mode
        ]
        heights = [m.ratio for _, m in found]
        spread = [[m.ratio - m.ratio_q1 for _, m in found], [m.ratio_q3 - m.ratio for _, m in found]]
        at = [i + offset for i, _ in found]
        axis.bar(
            at, heights, bar * 0.92, label=provider.name, color=colours[provider], yerr=spread,
            hatch="///" if provider.freeze_A else None, edgecolor="white", linewidth=0,
            error_kw={"elinewidth": 0.8, "ecolor": "#202124"},
        )  # fmt: skip
        for x, (_, m) in zip(at, found, strict=True):
            _annotate(axis, x, m.ratio_q3, f"{m.ratio:.2f}")
    axis.margins(y=0.16)
    axis.spines[["top", "right"]].set_visible(False)


def _annotate(axis, x: float, top: float, text: str) -> None:
    style = {"ha": "center", "va": "bottom", "fontsize": 6.5, "rotation": 90}
    axis.annotate(text, (x, top), (0, 3), textcoords="offset points", **style)


def _saved_bars(axis, results, providers, colours) -> None:
    bar, offsets = _positions(len(providers))
    for provider, offset in zip(providers, offsets, strict=True):
        for i, result in enumerate(results):
            saved = {m.provider: m.saved_bytes / _MIB for m in result.measurements}
            if provider in saved:
                axis.bar(
                    i + offset, saved[provider], bar * 0.92, color=colours[provider], edgecolor="white", linewidth=0,
                    hatch="///" if provider.freeze_A else None,
                )  # fmt: skip
                _annotate(axis, i + offset, saved[provider], f"{saved[provider]:.3g}")
    axis.set_ylabel("MiB")
    axis.set_title("saved for backward beyond weights (hatched: A frozen, LoRA-FA)", fontsize=10)
    axis.margins(y=0.22)
    axis.spines[["top", "right"]].set_visible(False)
