"""README's result tables and plots, made from benchmarks/results/*.csv: no figure in them is typed by hand.

    python benchmarks/report.py          # write README.md between its markers, draw plots that are not there
    python benchmarks/report.py --check  # change nothing; exit code 1 and the names where README and csv disagree

A block of README stands between `<!-- results:NAME -->` and `<!-- /results -->`; NAME is one of BLOCKS. Of several runs
of one kind on one device the newest counts. A block none of whose csv is there keeps its text. Files of a CUDA device
need no entry: their tables come first, in block `gpu`, and block `no-gpu` becomes empty.
"""

import argparse
import csv
import functools
import re
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

from report_plots import PLOTS
from report_tables import (
    DTYPES,
    GIB,
    GROUPS,
    MODELS,
    PROVIDERS,
    VARIANTS,
    Rows,
    attention_table,
    by,
    caption,
    gpu_table,
    layer_table,
    memory_table,
    model_table,
    ratio,
    rounded,
    table,
)

from lorasp.bench import session

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)
_DATE = re.compile(r"-(\d{8})$")

XEON, EPYC = "intel-xeon-processor-2-30ghz-2-threads", "amd-epyc-2-threads"


class Missing(Exception):
    """A csv that a block needs is not there."""


class Results:
    """The newest csv of every kind in a folder, by file name without date."""

    def __init__(self, folder: Path):
        self.paths: dict[str, Path] = {}
        for path in sorted(folder.glob("*.csv"), key=lambda path: (_DATE.search(path.stem) or [""])[0]):
            self.paths[_DATE.sub("", path.stem)] = path

    def path(self, kind: str) -> Path:
        if kind not in self.paths:
            raise Missing(f"{kind}-<date>.csv")
        return self.paths[kind]

    def rows(self, kind: str) -> Rows:
        with self.path(kind).open(newline="") as file:
            return list(csv.DictReader(file))

    def on_cuda(self) -> list[str]:
        """The kinds that were measured on a CUDA device."""
        return [kind for kind in self.paths if session.names_gpu(self.rows(kind)[0]["device"])]


def of_providers(results: Results, kind: str, names: dict[str, str], only: Sequence[str] = ()) -> str:
    rows = results.rows(kind)
    return layer_table(*((rows, name, names[name]) for name in only or names))


def amd_layers(results: Results) -> str:
    """How long its frozen layer takes over the Xeon's; then the table."""
    bf16, dropout, fp32 = (results.rows(f"lora_linear-own-{EPYC}-{end}") for end in
                           ("bfloat16", "bfloat16-dropout0.1", "float32"))  # fmt: skip
    short = ("peft", "lorasp", "lorasp+fa")
    columns = [(bf16, name, PROVIDERS[name]) for name in ("peft", "peft-half", "lorasp", "lorasp+fa", "lorasp+sp")]
    for words, rows in (("dropout 0.1: ", dropout), ("fp32: ", fp32)):
        columns += [(rows, name, words * (name == "peft") + PROVIDERS[name]) for name in short]
    here, xeon = _frozen_ms(bf16), _frozen_ms(results.rows(f"{_OWN}-bfloat16"))
    slower = [ms / xeon[size] for size, ms in here.items() if size in xeon]
    return (
        f"The same on the AMD EPYC of the first table, whose frozen `nn.Linear` takes {rounded(min(slower), 1)} to "
        f"{rounded(max(slower), 1)} times as long as the Xeon's, which has AMX; bf16,\nwith dropout 0.1, fp32:\n\n"
        f"{layer_table(*columns)}"
    )


def _frozen_ms(rows: Rows) -> dict[tuple[str, ...], Decimal]:
    frozen = [row for row in rows if (row["provider"], row["mode"]) == ("linear", "forward+backward")]
    return {tuple(row[name] for name in "MKNR"): Decimal(row["ms"]) for row in frozen}


def few_rows(results: Results) -> str:
    """A group on the fewest rows of its csv over the same layers one by one."""
    rows = [row for row in results.rows(f"lora_linear-own-{EPYC}-bfloat16-members3") if row["mode"] != "forward"]
    least = min(rows, key=lambda row: int(row["M"]))
    found = {row["provider"]: Decimal(row["ratio"]) for row in rows if row["M"] == least["M"]}
    return (
        f"A group of tiny calls costs more Python than it saves: at {least['M']}×{least['K']}×{least['N']} "
        f"r{least['R']} on the EPYC it takes {ratio(found['lorasp+shared'] / found['lorasp'])} times as\n"
        "long as three layers.\n"
    )


_PUBLISHED = "memory-llama-7b-roberta-large-t5-large-computed-for-cuda"


def memory_otherwise(results: Results) -> str:
    """GiB at the peak, as in memory_table, without dropout and with activation checkpointing."""
    files = {
        "no dropout": results.rows(f"{_PUBLISHED}-bfloat16"),
        "checkpointing": results.rows(f"{_PUBLISHED}-checkpointing-bfloat16-dropout0.05"),
    }
    head, columns = [""], []
    for words, rows in files.items():
        for i, part in enumerate(by(rows, "model")):
            head.append(f"{words}: " * (i == 0) + MODELS[part[0]["model"]])
            columns.append({row["variant"]: rounded(Decimal(row["peak_bytes"]) / GIB, 1) for row in part})
    lines = [[VARIANTS[name], *(column[name] for column in columns)] for name in columns[0]]
    return table(head, lines)


def other_models(results: Results) -> str:
    rows = results.rows(f"model-toy-roberta-toy-gpt2-toy-t5-{EPYC}-bfloat16-dropout0.05")
    found = {(row["model"], row["variant"]): ratio(row["to_peft"]) for row in rows}
    names = {"toy-roberta": "RoBERTa", "toy-gpt2": "GPT-2", "toy-t5": "T5"}
    steps = ", ".join(f"{name} {found[model, 'accelerate']}" for model, name in names.items())
    frozen = ", ".join(found[model, "frozen"] for model in names)
    return f"A step under `accelerate` over PEFT's, other toy models: {steps} (frozen: {frozen}).\n"


def small_operators(results: Results) -> str:
    cut = [row for dtype in DTYPES for row in _rows_if_any(results, f"hidden_cut-{XEON}-{dtype}")]
    ratios = [Decimal(row["ratio"]) for row in cut if row["name"].startswith("lorasp")]
    found = []
    for dtype, word in (("bfloat16", "bf16"), ("float32", "fp32")):
        (row,) = (r for r in results.rows(f"consistency-{XEON}-{dtype}") if r["name"] == "lorasp")
        found.append(f"{ratio(row['ratio'])} ({word})")
    least, most = ratio(min(ratios)), ratio(max(ratios))
    return (
        f"`hidden_cut` with its residual takes {least} to {most} of `nn.Dropout` and an add, "
        f"`consistency_loss` at 2048×32000 with both gradients {' to '.join(found)} of the\nformula in PyTorch.\n"
    )


def host_time(results: Results) -> str:
    """CPU time of one layer's forward + backward over PEFT's with bf16 adapters, on a device that computes nothing."""
    names = ("linear", "peft-half+fa", "aten", "lorasp", "lorasp+fa", "lorasp+sp", "lorasp:triton")
    heads = ("nn.Linear", "PEFT, A frozen", "ATen by hand", "lorasp LoRA", "LoRA-FA", "LoRA-SP", "LoRA, Triton forced")
    found = {
        (row["dropout_p"], row["provider"]): rounded(row["to_peft_half"], 2)
        for row in results.rows("host_time-idle-gpu-computes-nothing-amd-epyc-bfloat16")
        if row["members"] == "1" and row["mode"] == "forward+backward"
    }
    lines = [
        [title, *(found[p, name] for name in names)] for p, title in (("0.0", "no dropout"), ("0.1", "dropout 0.1"))
    ]
    return table(["", *heads], lines)


def _rows_if_any(results: Results, kind: str) -> Rows:
    return results.rows(kind) if kind in results.paths else []


def picture(results: Results, name: str) -> str:
    plot = PLOTS[name]
    return f"![{plot.alt}](benchmarks/results/{results.path(plot.kind).with_suffix('.png').name})\n"


NO_GPU = "**No GPU figure stands here because none was measured yet**; on hardware the kernels have not run.\n"


def no_gpu(results: Results) -> str:
    return "" if results.on_cuda() else NO_GPU


def gpu(results: Results) -> str:
    """A caption and a table for every file of a CUDA device, devices and operators in alphabetical order."""
    text = ""
    for kind in sorted(results.on_cuda(), key=lambda kind: (results.rows(kind)[0]["device"], kind)):
        rows = results.rows(kind)
        for part in by(rows, "model") if rows[0]["op"] == "model" else [rows]:
            text += f"{caption(part)}\n\n{gpu_table(part)}\n"
    return text


_OWN = f"lora_linear-own-{XEON}"
BLOCKS: dict[str, Callable[[Results], str]] = {
    "gpu": gpu,
    "no-gpu": no_gpu,
    "models": lambda results: model_table(results.rows(f"model-toy-llama-{EPYC}-bfloat16-dropout0.05")),
    "other-models": other_models,
    "memory-computed": lambda results: memory_table(results.rows(f"{_PUBLISHED}-bfloat16-dropout0.05")),
    "memory-otherwise": memory_otherwise,
    "layer": functools.partial(of_providers, kind=f"{_OWN}-bfloat16", names=PROVIDERS),
    "layer-amd": amd_layers,
    "layer-dropout": functools.partial(of_providers, kind=f"{_OWN}-bfloat16-dropout0.1", names=PROVIDERS),
    "layer-fp32": functools.partial(
        of_providers, kind=f"{_OWN}-float32", names=PROVIDERS, only=("peft", "lorasp", "lorasp+fa", "lorasp+sp")
    ),
    "group": functools.partial(of_providers, kind=f"{_OWN}-bfloat16-members3", names=GROUPS),
    "group-few-rows": few_rows,
    "attention": lambda results: attention_table(
        *(results.rows(f"dropkey_attention{end}") for end in (f"-{XEON}-bfloat16", f"-causal-{XEON}-bfloat16",
                                                              f"-{XEON}-float32"))
    ),
    "small-operators": small_operators,
    "host-time": host_time,
    **{name: functools.partial(picture, name=name) for name in PLOTS},
}  # fmt: skip


def filled(text: str, results: Results, say: Callable[[str], None] = lambda text: None) -> str:
    """`text` with every block made anew. Raises KeyError for a block that is not in BLOCKS."""

    def fill(block: re.Match) -> str:
        name = block["name"]
        if name not in BLOCKS:
            raise KeyError(f"README: no block is named {name!r}: {', '.join(BLOCKS)}")
        try:
            return f"{block[1]}{BLOCKS[name](results)}{block[4]}"
        except Missing as missing:
            say(f"{name}: left as it is, there is no {missing}")
            return block[0]

    return _BLOCK.sub(fill, text)


def disagreeing(text: str, results: Results) -> list[str]:
    """The names of the blocks of `text` that its csv would not make."""
    old, new = ({block["name"]: block["text"] for block in _BLOCK.finditer(t)} for t in (text, filled(text, results)))
    return [name for name in old if old[name] != new[name]]


def shown_plots(text: str) -> list[str]:
    return [block["name"] for block in _BLOCK.finditer(text) if block["name"] in PLOTS]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--plots", action="store_true", help="draw every plot that README shows anew")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    text, results = options.readme.read_text(), Results(options.results)
    wrong = disagreeing(text, results)
    pictures = {name: results.path(PLOTS[name].kind) for name in shown_plots(text) if PLOTS[name].kind in results.paths}
    undrawn = [name for name, path in pictures.items() if not path.with_suffix(".png").exists()]
    if options.check:
        for name in wrong:
            print(f"README and benchmarks/results disagree: {name}; run python benchmarks/report.py", file=sys.stderr)
        for name in undrawn:
            print(f"no plot for {name}: run python benchmarks/report.py", file=sys.stderr)
        return 1 if wrong or undrawn else 0
    options.readme.write_text(filled(text, results, print))
    for name in pictures if options.plots else undrawn:
        PLOTS[name].draw(pictures[name])
    print(f"{options.readme.name}: {', '.join(wrong) or 'nothing'} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
