"""The plots that README shows, drawn from their csv by the code that draws them after a run."""

import csv
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from lorasp.bench import hiddenkey, hiddenkey_report, model_memory, model_memory_report, models, models_report


def rows_of(path: Path, kind: type) -> list:
    """The csv's lines as instances of a dataclass, its fields by their annotations."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    hints = typing.get_type_hints(kind)
    return [kind(**{one.name: _value(line[one.name], hints[one.name]) for one in fields(kind)}) for line in lines]


def _value(text: str, hint):
    if isinstance(hint, types.UnionType):
        return None if text == "" else _value(text, typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        return tuple(map(int, text.split("x")))
    return text == "True" if hint is bool else hint(text)


def _environment(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return next(csv.DictReader(file))


def _draw_models(path: Path) -> None:
    one = _environment(path)
    models_report.plot(path.with_suffix(".png"), rows_of(path, models.Row), one["device"], one)


def _draw_memory(path: Path) -> None:
    one = _environment(path)
    model_memory_report.plot(path.with_suffix(".png"), rows_of(path, model_memory.Row), one["device"], one)


def _draw_attention(path: Path) -> None:
    one, rows = _environment(path), rows_of(path, hiddenkey.Row)
    contests = {}
    for row in rows:
        made = hiddenkey.Contest(row.op, row.sizes, getattr(torch, row.dtype), row.causal)
        contests.setdefault((row.sizes, row.causal), made).rows.append(row)
    hiddenkey_report.plot(path.with_suffix(".png"), list(contests.values()), one["device"], one)


@dataclass(frozen=True)
class Plot:
    """kind: the csv's name without its date; alt: the picture in words; draw: writes the .png beside the csv."""

    kind: str
    alt: str
    draw: Callable[[Path], None]


PLOTS = {
    "models-plot": Plot("model-toy-llama-amd-epyc-2-threads-bfloat16-dropout0.05", "whole models", _draw_models),
    "memory-plot": Plot(
        "memory-llama-7b-roberta-large-t5-large-computed-for-cuda-bfloat16-dropout0.05",
        "computed memory of one step at published sizes", _draw_memory,
    ),
    "attention-plot": Plot(
        "dropkey_attention-intel-xeon-processor-2-30ghz-2-threads-bfloat16", "time against drop rate", _draw_attention
    ),
}  # fmt: skip
