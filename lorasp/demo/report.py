"""What `lorasp demo` shows: what it is about to do, a progress bar, one table, one sentence, one picture."""

import textwrap
from pathlib import Path

import torch
from torch import nn

from lorasp import console, info
from lorasp.demo import ALPHA, HIDDENKEY, RANK, Corpus, Method

_MIB = 2**20
_LEGEND = (
    "loss: nats per byte on held-out text; the LoRA methods share one learning rate and start from one A and B. "
    "ms per step: median of forward, backward and optimizer, the methods taking turns. "
    "saved for backward: what autograd keeps from forward to backward, weights aside. "
    "lorasp's layers that read one input run as one. "
    f"HiddenKey: LoRA that drops keys (p = {HIDDENKEY.attention_p:g}) and FFN outputs (p = {HIDDENKEY.hidden_p:g}) "
    "in the latter half of the layers and runs every batch twice, to keep the two predictions close."
)
_COLOURS = ("#5f6368", "#e07b39", "#1f77b4", "#2ca02c", "#17a2b8", "#9467bd")


def print_start(
    model: nn.Module, size: str, dtype: torch.dtype, device: torch.device, english: Corpus, python: Corpus
) -> None:
    count = sum(p.numel() for p in model.parameters())
    print(f"Model    Llama-style decoder over bytes, {count / 1e6:.1f} M parameters ({size}), {_name(dtype)}")
    print(f"Machine  {info.device_name(device)}")
    print(f"First    it learns {english.name}, {len(english.train) / 1e6:.1f} MB, from nothing: the base model")
    print(f"Then     it learns {python.name}, {len(python.train) / 1e6:.1f} MB, six ways, each from the base model,")
    print(f"         on the same batches; LoRA has rank {RANK} and alpha {ALPHA} in every linear layer but the head")
    print(flush=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def progress():
    """rich's progress bar; where the output is a file, only the finished bars are written."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<26}"), BarColumn(bar_width=36), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), console=console.rich_console(),
    )  # fmt: skip


def print_end(methods: list[Method], path: Path, seconds: float) -> None:
    columns = ["", "loss before", "after", "ms per step", "saved for backward", "trainable", "optimizer"]
    rows = [
        [
            method.name, f"{method.held_out[0][1]:.3f}", f"{method.held_out[-1][1]:.3f}", f"{method.median_ms:.0f}",
            f"{method.saved / _MIB:.1f} MiB", f"{method.trainable:,}", f"{method.optimizer_bytes / _MIB:.1f} MiB",
        ]
        for method in methods
    ]  # fmt: skip
    console.print_table("Learning Python source", columns, rows)
    print(textwrap.fill(_LEGEND, console.WIDTH))
    print()
    print(textwrap.fill(headline(methods), console.WIDTH))
    print(f"\nwrote {path} ({seconds:.0f} s in all)")


def headline(methods: list[Method]) -> str:
    """Two sentences, computed from what was measured."""
    by_name = {method.name: method for method in methods}
    names = ("PEFT LoRA", "lorasp LoRA", "lorasp LoRA-FA", "lorasp LoRA-SP", "lorasp HiddenKey")
    peft, lora, fa, sp, hiddenkey = (by_name[name] for name in names)

    def loss(method: Method) -> str:
        return f"{method.held_out[-1][1]:.3f}"

    return (
        f"In this run a step of lorasp LoRA took {lora.median_ms / peft.median_ms:.2f} times as long as PEFT's and "
        f"kept {lora.saved / _MIB:.0f} MiB for backward instead of {peft.saved / _MIB:.0f}, "
        f"ending at loss {loss(lora)} against {loss(peft)}; "
        f"LoRA-FA took {fa.median_ms / peft.median_ms:.2f} times as long and kept {fa.saved / _MIB:.0f} MiB, "
        f"ending at {loss(fa)}. LoRA-SP, half of A and B frozen, took {sp.median_ms / peft.median_ms:.2f} times as "
        f"long and kept {sp.saved / _MIB:.0f} MiB, ending at {loss(sp)}. A step of HiddenKey took "
        f"{hiddenkey.median_ms / lora.median_ms:.2f} times as long as lorasp LoRA's, ending at {loss(hiddenkey)}."
    )


def plot(path: Path, methods: list[Method], machine: str, dtype: torch.dtype) -> None:
    """Held-out loss by step on the left; time, saved bytes and optimizer bytes as bars on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(11, 5.2))
    grid = figure.add_gridspec(3, 2, width_ratios=(1.25, 1), hspace=0.75, wspace=0.42)
    curves = figure.add_subplot(grid[:, 0])
    styles = ("-", "-", "--", "-", "-", "-")
    for method, colour, style in zip(methods, _COLOURS, styles, strict=True):
        steps, losses = zip(*method.held_out, strict=True)
        curves.plot(steps, losses, style, color=colour, label=method.name, marker="o", markersize=4, linewidth=2)
    curves.set_xlabel("step")
    curves.set_ylabel("held-out loss, nats per byte")
    curves.set_title("learning Python source from the same base model", fontsize=10)
    curves.legend(frameon=False)
    curves.grid(alpha=0.25)
    bars = (
        ("ms per step (median)", [m.median_ms for m in methods]),
        ("MiB saved for backward", [m.saved / _MIB for m in methods]),
        ("MiB of optimizer state", [m.optimizer_bytes / _MIB for m in methods]),
    )
    for row, (name, values) in enumerate(bars):
        axis = figure.add_subplot(grid[row, 1])
        drawn = axis.barh([m.name for m in methods], values, color=_COLOURS, height=0.72)
        axis.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.14)
        axis.spines[["top", "right"]].set_visible(False)
    curves.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"lorasp demo: {_name(dtype)} on {machine}, torch {torch.__version__}", fontsize=11)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
