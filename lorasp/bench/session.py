"""What every run of `lorasp bench` begins and ends with: the device, a head that names it, a csv and a plot."""

import argparse
import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lorasp import console, info
from lorasp.bench.timing import pin_malloc


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(options: argparse.Namespace) -> torch.device:
    """--device, or the GPU where there is one; sets --threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return options.device or default_device()


def names_gpu(device: str) -> bool:
    """Of a csv's column `device`: a CPU is named with its threads, and what was computed says so (memory)."""
    return not re.search(r" \(\d+ threads\)$|^computed for ", device)


def timing_rules(device: torch.device) -> str:
    """How times on this device are kept comparable; pins malloc on a CPU."""
    return pin_malloc() if device.type == "cpu" else "L2 overwritten before every call"


def made_with(versions: Mapping[str, str], *packages: str) -> str:
    """The versions that matter, of torch, these packages and lorasp, from an environment or a line of a csv."""
    named = [f"{name} {versions[name]}" for name in ("torch", *packages, "lorasp")]
    return f"{', '.join(named)} {versions['commit']}".rstrip()


def begin(folder: Path, machine: str, rules: str, *packages: str, what: str = "") -> dict[str, str]:
    """Make the folder of the results, print the head, return the columns of a csv that say where its rows come from.

    Raises UsageError if there can be no such folder.
    """
    console.make_folder(folder)
    environment = {"device": machine, **info.versions(), "rules": rules}
    print(f"{what}{machine}\n{made_with(environment, *packages)}\n{rules}")
    return environment


def finish(
    path: Path,
    rows: Sequence[Mapping[str, object]],
    environment: Mapping[str, str],
    plot: Callable[[Path], None] | None = None,
) -> None:
    """Write the csv, the environment in every line, and beside it, with matplotlib, what plot(path) draws."""
    lines = [{**row, **environment} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    print(f"wrote {path}")
    if plot is None:
        return
    picture = path.with_suffix(".png")
    try:
        plot(picture)
    except ImportError as error:
        print(f'no plot: {error}: pip install "lorasp[bench]"')
        return
    print(f"wrote {picture}")


def wrong(error: AssertionError, what: str = "timed") -> int:
    """Say what disagrees with the reference; the exit code."""
    print(f"lorasp bench: wrong result, nothing is {what}: {error}", file=sys.stderr)
    return 1


def csv_row(row: object, op: str) -> dict[str, object]:
    """A dataclass as a line of a csv: five digits of every float."""
    return {"op": op} | {
        key: f"{value:.5g}" if isinstance(value, float) else value for key, value in asdict(row).items()
    }
