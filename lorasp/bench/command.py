"""`lorasp bench`: shapes and providers from the command line, results to screen, csv and plot."""

import argparse
from dataclasses import replace

import torch

from lorasp import bench, console, info
from lorasp.bench import Provider, Shape, report, session, targets, workloads
from lorasp.console import UsageError

# What `lorasp bench` can be asked for, and the options that not all of it takes.
OPTIONS = {
    "--op lora_linear": ("shapes", "mknr", "tokens", "dropout", "providers", "freeze_A", "members", "prepack"),
    "--op dropkey_attention": ("sizes", "rates", "causal"),
    "--op hidden_cut": ("sizes",),
    "--op consistency": ("sizes",),
    "--model": ("variants", "child", "memory", "checkpointing", "dropout"),
}
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
    return [replace(shape, members=options.members) for shape in bench.distinct(shapes)]


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
    device = session.device_of(options)
    shapes, providers = choose_shapes(options, device), choose_providers(options, device)
    machine = info.device_name(device)
    environment = session.begin(options.out, machine, session.timing_rules(device))
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
        return session.wrong(error)
    sets = [*set_names(options, device), *["own"] * bool(options.mknr)]
    path = options.out / f"{report.stem(sets, machine, dtype, options.dropout, options.members)}.csv"
    measurements = [m for result in results for m in result.measurements]
    drop = f"dropout {options.dropout:g}" if options.dropout else "no dropout"
    subtitle = f"{dtype}, {drop}; {session.made_with(environment)}"
    nothing = all(m.provider.kind == bench.BASE for m in measurements)
    session.finish(
        path, [report.csv_row(m) for m in measurements], environment,
        None if nothing else lambda picture: report.plot(picture, results, machine, subtitle),
    )  # fmt: skip
    if nothing:
        print("no plot: nothing but the frozen nn.Linear could be measured")
    refused = {provider for result in results for provider in result.unavailable}
    return 2 if options.providers and refused else 0
