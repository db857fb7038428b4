"""Plan-table files as `lorasp tune` writes them: merged with what was measured before, one row a line, never half."""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.plan_table import ROW_KEY, TILE_SECTIONS, read_table, table_file
from lorasp.tune.search import Choice, Job

# Rows measured earlier are kept as they are while these stay the same; a commit may change without the kernels.
COMPARED = ("device", "driver", "cuda", "torch", "triton", "kernels")
_SEPARATOR = "; "
_KEYS = {"rows": ROW_KEY} | {name: tuple(section.key) for name, section in TILE_SECTIONS.items()}
# Rows stand in this order of their values, not in that of the alphabet.
_RANKED = ("forward", "backward", "dq", "dkv", "project", "outer", "project_outer", "accumulate")


class PlanFile:
    """The table of one device: read if it is there, merged with new rows, written whole beside the file and renamed.

    provenance: of this run; fresh: the sections whose rows are dropped. Raises ValueError, which names the file, for
    one that read_table does not take, or one of another device, unless fresh: a new one then takes its place.
    """

    def __init__(self, folder: Path, device: str, provenance: dict[str, str], *, fresh: Collection[str] = ()):
        self.path = folder / table_file(device)
        self.device, self.provenance = device, provenance
        self._old_provenance: dict[str, str] = {}
        self._old: dict[tuple, dict] = {}
        self._new: dict[tuple, dict] = {}
        self.default = dict.fromkeys(("forward", "backward"), "addmm")
        if not self.path.exists():
            return
        try:
            table = read_table(self.path)
            if table["device"] != device:
                raise ValueError(f"{self.path.name}: device must be {device!r}, got {table['device']!r}")
        except ValueError:
            if fresh:
                return
            raise
        self.default = table["default"]
        self._old = {_key(name, row): row for name in _KEYS if name not in fresh for row in table.get(name, ())}
        if self._old or not fresh:
            self._old_provenance = table["provenance"]

    @property
    def comparable(self) -> bool:
        """Whether the rows that the file held were measured with this run's versions."""
        return all(self._old_provenance.get(name) == self.provenance.get(name) for name in COMPARED)

    def __len__(self) -> int:
        return len(self._old | self._new)

    def pending(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs whose rows are missing, or were measured with other versions."""
        done = self._old if self.comparable else {}
        return [job for job in jobs if _key(job.section, job.row(job.safe)) not in done]

    def add(self, job: Job, choice: Choice) -> None:
        """The winner of a job, in the file at once."""
        row = job.row(choice)
        self._new[_key(job.section, row)] = row
        self._write()

    def _write(self) -> None:
        rows = self._old | self._new
        head = {
            "device": self.device, "measured": True, "provenance": self._merged_provenance(), "default": self.default,
        }  # fmt: skip
        text = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
        for section in _KEYS:
            keys = sorted((key for key in rows if key[0] == section), key=_order)
            lines = ",\n".join(f"    {json.dumps(rows[key])}" for key in keys)
            if keys or section == "rows":
                text += f',\n  "{section}": [\n{lines}\n  ]' if keys else f',\n  "{section}": []'
        _replace(self.path, f"{text}\n}}\n")
        tuning.forget_tables()  # what is written is what this process chooses by from here on

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


def _key(section: str, row: dict) -> tuple:
    return (section, *(row[name] for name in _KEYS[section]))


def _order(key: tuple) -> tuple:
    return tuple(_RANKED.index(value) if value in _RANKED else value for value in key)


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
