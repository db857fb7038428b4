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
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from report_plots import PLOTS

from lorasp.bench import attention

ROOT = Path(__file__).resolve().parents[1]
_MIB, _GIB = 2**20, 2**30
_BLOCK = re.compile(r"(<!-- results:(?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- /results -->)", re.DOTALL)
_DATE = re.compile(r"-(\d{8})$")

Rows = list[dict[str, str]]
XEON, EPYC = "intel-xeon-processor-2-30ghz-2-threads", "amd-epyc-2-threads"

VARIANTS = {
    "frozen": "frozen, no adapter",
    "peft": "PEFT LoRA (fp32 adapters)",
    "peft-half": "PEFT, adapters in bf16",
    "peft+fa": "PEFT, A frozen",
    "accelerate": "PEFT under `lorasp.accelerate`",
    "accelerate+fa": "PEFT, A frozen, under `accelerate`",
    "lorasp": "lorasp LoRA",
    "lorasp+fa": "lorasp LoRA-FA",
    "lorasp+sp": "lorasp LoRA-SP",
    "lorasp+recompute": 'lorasp LoRA, `recompute_mlp="activation"`',
    "lorasp+fa+recompute": 'lorasp LoRA-FA, `recompute_mlp="activation"`',
    "lorasp+fa+recompute-full": 'lorasp LoRA-FA, `recompute_mlp="full"`',
}
PROVIDERS = {
    "linear-train": "nn.Linear, weight trains",
    "peft": "PEFT",
    "peft-half": "PEFT, bf16 adapters",
    "lorasp": "lorasp LoRA",
    "lorasp+fa": "LoRA-FA",
    "lorasp+sp": "LoRA-SP",
    "lorasp+prepack": "LoRA, prepacked",
    "lorasp+fa+prepack": "LoRA-FA, prepacked",
}
GROUPS = {
    "peft-half": "PEFT, bf16 adapters",
    "lorasp": "lorasp LoRA, three layers",
    "lorasp+shared": "one group",
    "lorasp+fa": "LoRA-FA, three layers",
    "lorasp+fa+shared": "one group",
    "lorasp+sp+shared": "LoRA-SP, one group",
}
ATTENTION = {
    ("lorasp column", 0.0): "p = 0",
    ("lorasp column", 0.1): "keys dropped, p = 0.1",
    ("lorasp column", 0.3): "p = 0.3",
    ("lorasp column", 0.5): "p = 0.5",
    ("lorasp element", 0.1): "logits dropped, p = 0.1",
    (attention.FLASH_DROPOUT, 0.1): "flash, dropout 0.1",
    (attention.CUDNN, None): "cuDNN, no drop",
    (attention.MASK, 0.1): "SDPA with the mask",
    (attention.EAGER, 0.1): "logits, masked_fill, softmax",
}
MODELS = {"llama-7b": "LLaMA-7B", "roberta-large": "RoBERTa-large", "t5-large": "T5-large"}
_SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


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
        """The kinds that were measured on a CUDA device: a CPU is named with its threads, a computed file says so."""
        named = {kind: self.rows(kind)[0]["device"] for kind in self.paths}
        return [k for k, device in named.items() if not re.search(r" \(\d+ threads\)$|^computed for ", device)]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in (head, *lines))
        .replace("|  |", "| |")
        .replace("\n", f"\n|{'---|' * len(head)}\n", 1)
    )


def rounded(value: str | Decimal, digits: int) -> str:
    """The csv's decimal number, halves away from zero."""
    return str(Decimal(value).quantize(Decimal(10) ** -digits, ROUND_HALF_UP)).replace("-", "−")


def mib(count: str, digits: int = 1) -> str:
    return "0" if int(count) == 0 else rounded(Decimal(count) / _MIB, digits)


ratio = functools.partial(rounded, digits=2)


def model_table(rows: Rows) -> str:
    resident = "most allocated" if _is_cuda(rows) else "most resident in a process of its own"
    head = ["", "step ÷ PEFT's", "saved for backward, MiB", "over the frozen model's", f"{resident}, MiB"]
    by_name = {row["variant"]: row for row in rows}
    lines = []
    for name, label in VARIANTS.items():
        if row := by_name.get(name):
            step = "1" if name == "peft" else ratio(row["to_peft"])
            over = mib(row["saved_over_frozen"], 2)
            lines.append([label, step, mib(row["saved_bytes"]), over, mib(row["peak_bytes"], 0)])
    return table(head, lines)


def _is_cuda(rows: Rows) -> bool:
    return not rows[0]["device"].endswith(" threads)")


def layers(rows: Rows) -> dict[str, dict[str, str]]:
    """Ratio of forward + backward by layer and provider."""
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["mode"] == "forward+backward":
            shape = f"{row['layer']} {row['M']}×{row['K']}×{row['N']} r{row['R']}".lstrip()
            shape += ", bias" * (row["bias"] == "True")
            found.setdefault(shape, {})[row["provider"]] = ratio(row["ratio"])
    return found


def layer_table(*columns: tuple[Rows, str, str]) -> str:
    """columns: rows of a csv, a provider, its heading; lines: the shapes of the first column's csv."""
    read = [(layers(rows), provider) for rows, provider, _ in columns]
    lines = [[shape, *(found.get(shape, {}).get(provider, "") for found, provider in read)] for shape in read[0][0]]
    return table(["M×K×N, rank", *(heading for _, _, heading in columns)], lines)


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


def attention_table(*files: Rows) -> str:
    lines = []
    for part in (part for rows in files for part in _by(rows, "sizes", "causal")):
        found = {(row["name"], float(row["rate"]) if row["rate"] else None): ratio(row["ratio"]) for row in part}
        causal = " causal" * (part[0]["causal"] == "True")
        label = f"{_SHORT[part[0]['dtype']]}{causal}, {part[0]['sizes'].replace('x', '×')}"
        lines.append([label, *(found.get(key, "") for key in ATTENTION)])
    columns = zip(["dtype, B×H×S×D", *ATTENTION.values()], *lines, strict=True)
    head, *lines = zip(*(column for column in columns if any(column[1:])), strict=True)
    return table(head, lines)


def memory_table(rows: Rows) -> str:
    """Per model: GiB at the peak, of these saved for backward, MiB saved over the frozen model's; and time on CUDA."""
    by_model: dict[str, dict[str, dict]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["variant"]] = row
    timed = any(row["ms"] for row in rows)
    head, lines = [""], []
    for model in by_model:
        head += [f"{MODELS.get(model, model)}: peak, GiB", "saved, GiB", "over frozen, MiB", *["step, ms"] * timed]
    for name, label in VARIANTS.items():
        found = [rows_of.get(name) for rows_of in by_model.values()]
        if any(found):
            line = [label]
            for row in found:
                line += _memory_cells(row, timed) if row else [""] * (3 + timed)
            lines.append(line)
    return table(head, lines)


def _memory_cells(row: dict[str, str], timed: bool) -> list[str]:
    peak, saved = (rounded(Decimal(row[name]) / _GIB, 1) for name in ("peak_bytes", "saved_bytes"))
    over = mib(row["saved_over_frozen"], 0) if row["saved_over_frozen"] else ""
    step = rounded(row["ms"], 0) if row["ms"] else ""
    return [peak, saved, over, *[step] * timed]


_PUBLISHED = "memory-llama-7b-roberta-large-t5-large-computed-for-cuda"


def memory_otherwise(results: Results) -> str:
    """GiB at the peak, as in memory_table, without dropout and with activation checkpointing."""
    files = {
        "no dropout": results.rows(f"{_PUBLISHED}-bfloat16"),
        "checkpointing": results.rows(f"{_PUBLISHED}-checkpointing-bfloat16-dropout0.05"),
    }
    head, columns = [""], []
    for words, rows in files.items():
        for i, part in enumerate(_by(rows, "model")):
            head.append(f"{words}: " * (i == 0) + MODELS[part[0]["model"]])
            columns.append({row["variant"]: rounded(Decimal(row["peak_bytes"]) / _GIB, 1) for row in part})
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
    cut = [row for dtype in _SHORT for row in _rows_if_any(results, f"hidden_cut-{XEON}-{dtype}")]
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
        for part in _by(rows, "model") if rows[0]["op"] == "model" else [rows]:
            text += f"{_caption(part)}\n\n{_gpu_table(part)}\n"
    return text


def _by(rows: Rows, *columns: str) -> list[Rows]:
    """The rows of equal values in these columns together, in the order of their first."""
    parts: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        parts.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(parts.values())


def _caption(rows: Rows) -> str:
    one = rows[0]
    dropout = f", dropout {one['dropout_p']}" if float(one.get("dropout_p") or 0) else ""
    words = {
        "model": "one training step of {model}, {batch}×{tokens} tokens, r = {rank}",
        "memory": "memory of one training step, one process per variant",
        "lora_linear": "forward + backward of one layer ÷ the frozen `nn.Linear`",
        "dropkey_attention": "attention, forward + backward ÷ `scaled_dot_product_attention` without any drop",
    }.get(one["op"], "`{op}`, forward + backward ÷ PyTorch's")
    if one["op"] == "lora_linear" and int(one["members"]) > 1:
        words = "{members} layers that read one input ÷ as many frozen `nn.Linear`, forward + backward"
    if one["op"] == "memory":
        times = ", ".join(dict.fromkeys(row["timing"] for row in rows if row["timing"]))
        words += ", activation checkpointing" * (one["checkpointing"] == "True")
        words += f"; steps timed: {times}" if times else ""
    return (
        f"**{one['device']}**: {words.format(**one)}; {_SHORT[one['dtype']]}{dropout}; torch {one['torch']}, "
        f"peft {one['peft']}, lorasp {one['lorasp']} {one['commit']}:"
    )


def _gpu_table(rows: Rows) -> str:
    op = rows[0]["op"]
    if op == "lora_linear":
        names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "linear"]
        return layer_table(*((rows, name, PROVIDERS.get(name, f"`{name}`")) for name in names))
    if op in ("model", "memory", "dropkey_attention"):
        return {"model": model_table, "memory": memory_table, "dropkey_attention": attention_table}[op](rows)
    lines = [[row["sizes"].replace("x", "×"), row["name"], row["rate"], ratio(row["ratio"])] for row in rows]
    return table(["sizes", "", "rate", "ratio"], lines)


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
