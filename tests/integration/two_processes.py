"""Run the checks of modules in two processes on gloo: python two_processes.py <folder> <module>...

A check is a function of a scratch folder that both processes call, in turn after one start: the parent imports what
they need and forks. Each process appends a JSON line per check, its name and what went wrong, to <folder>/<rank>.
"""

import datetime
import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist

WORLD = 2
HANGS = datetime.timedelta(seconds=20)


def run(rank: int, checks: dict, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD,
                            timeout=HANGS)  # fmt: skip
    with open(folder / str(rank), "w") as results:
        for name, check in checks.items():
            scratch = folder / name.replace(" ", "_")
            scratch.mkdir(exist_ok=True)
            try:
                check(scratch)
                wrong = ""
            except (Exception, pytest.fail.Exception):
                wrong = traceback.format_exc()
            print(json.dumps([name, wrong]), file=results, flush=True)
            dist.barrier()
    dist.destroy_process_group()


def main(folder: str, *modules: str) -> int:
    faulthandler.enable()
    checks = {name: check for module in modules for name, check in importlib.import_module(module).CHECKS.items()}
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            try:
                run(rank, checks, Path(folder))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(f"exit statuses by rank: {statuses}", flush=True)
    return int(any(statuses))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
