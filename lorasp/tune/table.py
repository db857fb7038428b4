"""Plan-table files as `lorasp tune` writes them: merged with what was measured before, one row a line, never half."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.tuning import GemmConfig, Plan
from lorasp.tune.search import Job

# Rows measured earlier are kept as they are while these stay the same; a commit may change without the kernels.
COMPARED = ("device", "driver", "cuda", "torch", "triton", "kernels")
_SEPARATOR = "; "


class PlanFile:
    """The table of one device: read if it is there, merged with new rows, written whole beside the file and renamed.

    provenance: of this run. Raises ValueError, which names the file, for one that tuning.read_table does not take, or
    one of another device.
    """

    def __init__(self, folder: Path, device: str, provenance: dict[str, str], *, fresh: bool = False):
        self.path = folder / tuning.table_file(device)
        self.device, self.provenance = device, provenance
        self._old_provenance: dict[str, str] = {}
        self._old: dict[tuple, dict] = {}
        self._new: dict[tuple, dict] = {}
        self.default = dict.fromkeys(("forward", "backward"), "addmm")
        if self.path.exists() and not fresh:
            table = tuning.read_table(self.path)
            if table["device"] != device:
                raise ValueError(f"{self.path.name}: device must be {device!r}, got {table['device']!r}")
            self._old_provenance, self.default = table["provenance"], table["default"]
            self._old = {_key(row): row for row in table["rows"]}

    @property
    def comparable(self) -> bool:
        """Whether the rows that the file held were measured with this run's versions."""
        return all(self._old_provenance.get(name) == self.provenance.get(name) for name in COMPARED)

    def __len__(self) -> int:
        return len(self._old | self._new)

    def pending(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs whose rows are missing, or were measured with other versions."""
        done = self._old if self.comparable else {}
        return [job for job in jobs if _key(_row(job, Plan("addmm"))) not in done]

    def add(self, job: Job, plan: Plan) -> None:
        """The winner of a job, in the file at once."""
        row = _row(job, plan)
        self._new[_key(row)] = row
        self._write()

    def _write(self) -> None:
        rows = sorted((self._old | self._new).values(), key=_order)
        head = {
            "device": self.device, "measured": True, "provenance": self._merged_provenance(), "default": self.default,
        }  # fmt: skip
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
        _replace(self.path, f'{text},\n  "rows": [\n{lines}\n  ]\n}}\n')
        # What is written is what this process chooses by from here on.
        tuning.load_table.cache_clear()
        tuning.select_plan.cache_clear()

    def _merged_provenance(self) -> dict[str, str]:
        """This run's; where rows of earlier runs remain, every value that holds for any of the rows."""
        if self._old.keys() <= self._new.keys():
            return self.provenance
        merged = {}
        for name in dict.fromkeys((*self._old_provenance, *self.provenance)):
            values = self._old_provenance.get(name, "").split(_SEPARATOR)
            values.append(self.provenance.get(name, ""))
            merged[name] = _SEPARATOR.join(dict.fromkeys(value for value in values if value))
        return merged


def _row(job: Job, plan: Plan) -> dict:
    row = {
        "direction": job.direction, "dtype": job.dtype_name, "dropout": job.dropout, "N": job.N, "K": job.K, "R": job.R,
        "M": job.M, "plan": plan.name,
    }  # fmt: skip
    return row if plan.gemm is None else row | {"gemm": _changed_fields(plan.gemm)}


def _changed_fields(gemm: GemmConfig) -> dict:
    """Without the fields that are at their defaults."""
    least = vars(GemmConfig(gemm.block_m, gemm.block_c, gemm.block_d, gemm.num_warps, gemm.num_stages))
    required = ("block_m", "block_c", "block_d", "num_warps", "num_stages")
    return {name: value for name, value in vars(gemm).items() if name in required or value != least[name]}


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in tuning.ROW_KEY)


def _order(row: dict) -> tuple:
    return (("forward", "backward").index(row["direction"]), *_key(row)[1:])


def _replace(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader finds the old file or the new one, whenever this is killed."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
