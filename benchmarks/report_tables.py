"""README's tables, from the rows of a csv: the words for its names, its numbers rounded."""

import functools
from collections.abc import Iterable, Sequence
from decimal import ROUND_HALF_UP, Decimal

from lorasp.bench import attention, session

_MIB, GIB = 2**20, 2**30

Rows = list[dict[str, str]]

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
DTYPES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


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
    return count if count in ("", "0") else rounded(Decimal(count) / _MIB, digits)


ratio = functools.partial(rounded, digits=2)


def model_table(rows: Rows) -> str:
    resident = "most allocated" if session.names_gpu(rows[0]["device"]) else "most resident in a process of its own"
    head = ["", "step ÷ PEFT's", "saved for backward, MiB", "over the frozen model's", f"{resident}, MiB"]
    by_name = {row["variant"]: row for row in rows}
    lines = []
    for name, label in VARIANTS.items():
        if row := by_name.get(name):
            step = "1" if name == "peft" else ratio(row["to_peft"])
            over = mib(row["saved_over_frozen"], 2)
            lines.append([label, step, mib(row["saved_bytes"]), over, mib(row["peak_bytes"], 0)])
    return table(head, lines)


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


def attention_table(*files: Rows) -> str:
    lines = []
    for part in (part for rows in files for part in by(rows, "sizes", "causal")):
        found = {(row["name"], float(row["rate"]) if row["rate"] else None): ratio(row["ratio"]) for row in part}
        causal = " causal" * (part[0]["causal"] == "True")
        label = f"{DTYPES[part[0]['dtype']]}{causal}, {part[0]['sizes'].replace('x', '×')}"
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
    peak, saved = (rounded(Decimal(row[name]) / GIB, 1) for name in ("peak_bytes", "saved_bytes"))
    over = mib(row["saved_over_frozen"], 0) if row["saved_over_frozen"] else ""
    step = rounded(row["ms"], 0) if row["ms"] else ""
    return [peak, saved, over, *[step] * timed]


def by(rows: Rows, *columns: str) -> list[Rows]:
    """The rows of equal values in these columns together, in the order of their first."""
    parts: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        parts.setdefault(tuple(row[column] for column in columns), []).append(row)
    return list(parts.values())


def caption(rows: Rows) -> str:
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
        f"**{one['device']}**: {words.format(**one)}; {DTYPES[one['dtype']]}{dropout}; torch {one['torch']}, "
        f"peft {one['peft']}, lorasp {one['lorasp']} {one['commit']}:"
    )


def gpu_table(rows: Rows) -> str:
    op = rows[0]["op"]
    if op == "lora_linear":
        names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "linear"]
        return layer_table(*((rows, name, PROVIDERS.get(name, f"`{name}`")) for name in names))
    if op in ("model", "memory", "dropkey_attention"):
        return {"model": model_table, "memory": memory_table, "dropkey_attention": attention_table}[op](rows)
    lines = [[row["sizes"].replace("x", "×"), row["name"], row["rate"], ratio(row["ratio"])] for row in rows]
    return table(["sizes", "", "rate", "ratio"], lines)
