"""`lorasp bench`: shapes and providers from the command line, results to screen, csv and plot."""

import argparse
import sys
from dataclasses import replace

import torch

from lorasp import bench, console, info
from lorasp.bench import Provider, Shape, report, targets, workloads
from lorasp.console import UsageError

# M of the models' layers on a CPU, where their GPU micro-batch would take minutes per sample.
_CPU_TOKENS = 512


def set_names(options: argparse.Namespace, device: torch.device) -> list[str]:
    """The named sets asked for; without any, and without shapes of the user's own, what suits the device."""
    if options.shapes or options.mknr:
        return list(options.shapes or ())
    return ["llama3-8b" if device.type == "cuda" else "square"]


def choose_shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    shapes = []
    for name in set_names(options, device):
        if name not in bench.SHAPES:
            raise UsageError(f"--shapes must be among {', '.join(bench.SHAPES)}, got {name!r}")
        tokens = options.tokens
        if tokens is None and device.type == "cpu" and any(shape.name for shape in bench.SHAPES[name]):
            tokens = _CPU_TOKENS
        shapes += bench.SHAPES[name] if tokens is None else bench.with_tokens(bench.SHAPES[name], tokens)
    shapes += [Shape(*sizes) for sizes in options.mknr or ()]
    return [replace(shape, members=options.members) for shape in shapes]


def choose_providers(options: argparse.Namespace, device: torch.device) -> list[Provider]:
    """The providers asked for, or what suits the device. Raises UsageError for one that does not exist."""
    if options.providers is None:
        return workloads.default_providers(device, options.freeze_A, options.prepack, options.members > 1)
    try:
        providers = [Provider.parse(name) for name in options.providers]
    except ValueError as error:
        raise UsageError(error) from error
    if options.freeze_A:
        providers = [replace(p, freeze_A=True) if p.adapts else p for p in providers]
    if options.prepack:
        providers = [replace(p, prepack=True) if p.kind == "lorasp" else p for p in providers]
    return list(dict.fromkeys(providers))


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 1 if a provider computes something wrong; 2 if one asked for by name cannot run here.

    Raises UsageError for options that do not fit.
    """
    if not 0.0 <= options.dropout < 1.0:
        raise UsageError(f"--dropout must be in [0, 1), got {options.dropout}")
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, providers = choose_shapes(options, device), choose_providers(options, device)
    console.make_folder(options.out)
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = info.device_name(device)
    versions = info.versions()
    rules = bench.pin_malloc() if device.type == "cpu" else "L2 overwritten before every call"
    print(machine)
    print(f"torch {versions['torch']}, lorasp {versions['lorasp']} {versions['commit']}".rstrip())
    print(rules)
    dtype = str(options.dtype).removeprefix("torch.")
    results = []
    try:
        for result in bench.run(
            shapes, providers, dtype=options.dtype, device=device, dropout_p=options.dropout, rounds=options.rounds,
            seconds=options.seconds, progress=console.progress,
        ):  # fmt: skip
            console.progress("")
            report.print_result(result)
            for target in targets.of_linear(result.measurements, device):
                print(f"  {target}")
            results.append(result)
    except AssertionError as error:
        print(f"lorasp bench: wrong result, nothing is timed: {error}", file=sys.stderr)
        return 1
    sets = [*set_names(options, device), *["own"] * bool(options.mknr)]
    environment = {"device": machine, **versions, "rules": rules}
    path = options.out / f"{report.stem(sets, machine, dtype, options.dropout, options.members)}.csv"
    report.write_csv(path, results, environment)
    print(f"wrote {path}")
    _plot(path, results, machine, dtype, options.dropout, versions)
    refused = {provider for result in results for provider in result.unavailable}
    return 2 if options.providers and refused else 0


def _plot(path, results, machine, dtype, dropout_p, versions) -> None:
    if all(m.provider.kind == bench.BASE for result in results for m in result.measurements):
        print("no plot: nothing but the frozen nn.Linear could be measured")
        return
    drop = f"dropout {dropout_p:g}" if dropout_p else "no dropout"
    subtitle = f"{dtype}, {drop}; torch {versions['torch']}, lorasp {versions['lorasp']} {versions['commit']}".rstrip()
    try:
        report.plot(path.with_suffix(".png"), results, machine, subtitle)
    except ImportError as error:
        print(f'no plot: {error}: pip install "lorasp[bench]"')
        return
    print(f"wrote {path.with_suffix('.png')}")
