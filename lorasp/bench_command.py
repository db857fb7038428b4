"""`lorasp bench`: shapes and providers from the command line, results to screen, csv and plot."""

import argparse
import sys

import torch

from lorasp import bench, bench_providers, bench_report, info
from lorasp.bench import Provider, Shape

_CPU_TOKENS = 512


def _shapes(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    own = [Shape(*sizes) for sizes in options.mknr or ()]
    names = options.shapes or ([] if own else ["llama3-8b" if device.type == "cuda" else "square"])
    shapes = []
    for name in names:
        if name not in bench.SHAPES:
            raise ValueError(f"--shapes must be among {', '.join(bench.SHAPES)}, got {name!r}")
        tokens = options.tokens
        if tokens is None and device.type == "cpu" and any(shape.name for shape in bench.SHAPES[name]):
            tokens = _CPU_TOKENS
        shapes += bench.SHAPES[name] if tokens is None else bench.with_tokens(bench.SHAPES[name], tokens)
    return shapes + own


def _providers(options: argparse.Namespace, device: torch.device) -> list[Provider]:
    if options.providers is None:
        return bench_providers.default_providers(device, options.freeze_A, options.prepack)
    providers = [Provider.parse(name) for name in options.providers]
    if options.freeze_A:
        providers = [bench_providers.freeze(p) if p.adapts else p for p in providers]
    if options.prepack:
        providers = [p.packed() if p.kind == "lorasp" else p for p in providers]
    return list(dict.fromkeys(providers))


def run(options: argparse.Namespace) -> int:
    """Exit code 0; 2 if a provider asked for by name cannot run here. Raises ValueError for options that do not fit."""
    if not 0.0 <= options.dropout < 1.0:
        raise ValueError(f"--dropout must be in [0, 1), got {options.dropout}")
    device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, providers = _shapes(options, device), _providers(options, device)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {options.out}: {error}") from error
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
    for result in bench.run(
        shapes, providers, dtype=options.dtype, device=device, dropout_p=options.dropout, rounds=options.rounds,
        seconds=options.seconds, progress=_progress,
    ):  # fmt: skip
        _progress("")
        bench_report.print_result(result)
        results.append(result)
    environment = {"device": machine, **versions, "rules": rules}
    path = options.out / f"{bench_report.stem(machine, dtype, options.dropout)}.csv"
    bench_report.write_csv(path, results, environment)
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
        bench_report.plot(path.with_suffix(".png"), results, machine, subtitle)
    except ImportError as error:
        print(f'no plot: {error}: pip install "lorasp[bench]"')
        return
    print(f"wrote {path.with_suffix('.png')}")


def _progress(text: str) -> None:
    """One line on a terminal's stderr that the next one replaces; nothing where stderr is a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
