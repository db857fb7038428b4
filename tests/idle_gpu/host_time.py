"""The host's time for one layer, or for several that read one x, on a device that takes no time of its own.

    python tests/idle_gpu/run.py tests/idle_gpu/host_time.py --dropout 0.1 --csv host.csv

CPU time of this process (autograd's thread included) per forward, and per forward and backward, for the providers of
lorasp.bench; beside it the launches (kernels and products of cuBLAS). Providers take turns; medians and quartiles over
rounds, as they are and over those of the frozen nn.Linear and of PEFT in the same round. A launch costs next to nothing
here: a real driver adds its own time for each. Where a GPU is faster than its host, this is what a layer costs.
"""

import argparse
import ctypes
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lorasp import bench, info
from lorasp.bench import Candidate, Provider, Shape, Unavailable, session, workloads
from lorasp.bench.timing import quartiles

PROVIDERS = (
    "linear", "peft-half", "peft-half+fa", "aten", "aten+fa", "lorasp", "lorasp+fa", "lorasp+sp", "lorasp:triton",
    "lorasp:triton:fused", "lorasp:cuda",
)  # fmt: skip
GROUPS = ("lorasp+shared", "lorasp+fa+shared", "lorasp+sp+shared", "lorasp:triton+shared", "lorasp:cuda+shared")
PEFT = Provider.parse("peft-half")
RULES = "CPU time per call on an idle GPU (tests/idle_gpu) that computes nothing: no GPU's time; interleaved medians"


def cpu_microseconds(function: Callable[[], object], calls: int) -> float:
    before = time.process_time_ns()
    for _ in range(calls):
        function()
    return (time.process_time_ns() - before) / calls / 1e3


def launches_of(function: Callable[[], object]) -> int:
    count = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}").idle_gpu_launches
    before = count()
    function()
    return count() - before


def candidates(shape: Shape, names: list[str], dropout_p: float) -> Iterator[Candidate]:
    """Warm: what is compiled, prepared or remembered at a first call is."""
    workload = workloads.make_workload(shape, torch.bfloat16, torch.device("cuda"), dropout_p)
    for name in names:
        try:
            candidate = workloads.build(Provider.parse(name), workload)
        except Unavailable as reason:
            print(f"not measured: {name}: {reason}")
            continue
        with candidate.context():
            for _ in range(3):
                candidate.step()
        yield candidate


def measure(built: list[Candidate], rounds: int, calls: int) -> Iterator[dict[str, object]]:
    """A row per provider and mode."""
    for mode in bench.MODES:
        functions = [c.step if mode == bench.MODES[0] else c.forward for c in built]
        samples, counts = [[] for _ in built], []
        for candidate, function in zip(built, functions, strict=True):
            with candidate.context():
                counts.append(launches_of(function))
        for _ in range(rounds):
            for candidate, function, times in zip(built, functions, samples, strict=True):
                with candidate.context():
                    times.append(cpu_microseconds(function, calls))
        bases = {c.provider: times for c, times in zip(built, samples, strict=True)}
        for candidate, times, count in zip(built, samples, counts, strict=True):
            row = {"provider": candidate.provider.name, "mode": mode, "launches": count}
            row |= _spread("host_us", times)
            for column, base in (("to_linear", Provider(bench.BASE)), ("to_peft_half", PEFT)):
                if base in bases:
                    row |= _spread(column, [a / b for a, b in zip(times, bases[base], strict=True)])
            yield row


def _spread(name: str, values: list[float]) -> dict[str, str]:
    q1, median, q3 = quartiles(values)
    return {name: f"{median:.4g}", f"{name}_q1": f"{q1:.4g}", f"{name}_q3": f"{q3:.4g}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="32,1024,1024,16", help="M,K,N,R")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 3], help="layers that read one x")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--providers", nargs="+", help="of lorasp.bench")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=30, help="per sample")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    tail = {"rounds": options.rounds, "calls": options.calls}
    environment = {"rules": RULES, **info.versions()}
    rows = []
    for members, dropout_p in itertools.product(options.members, options.dropout):
        shape = Shape(*map(int, options.shape.split(",")), members=members)
        print(f"{shape.label}, bfloat16, dropout {dropout_p:g}")
        head = {"op": "host_time", "device": info.device_name("cpu"), "M": shape.M, "K": shape.K, "N": shape.N}
        head |= {"R": shape.R, "members": members, "dtype": "bfloat16", "dropout_p": dropout_p}
        names = options.providers or [*PROVIDERS, *(GROUPS if members > 1 else ())]
        for row in measure(list(candidates(shape, names, dropout_p)), options.rounds, options.calls):
            rows.append({**head, **row, **tail})
            print(
                f"  {row['mode']:17} {row['provider']:21} {row['host_us']:>6} us, {row['launches']:2} launches, "
                f"{row.get('to_linear', '-'):>6} of linear, {row.get('to_peft_half', '-'):>6} of peft-half"
            )
    if options.csv:
        session.finish(options.csv, rows, environment)


if __name__ == "__main__":
    main()
