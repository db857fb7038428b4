"""python -m lorasp {info,demo,bench,tune,check}; what a command needs beyond torch is imported by that command only."""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lorasp import console
from lorasp.console import UsageError, quiet_imports

_DTYPES = {
    "fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 a result was wrong, 2 a usage error."""
    commands = parser()
    options = commands.parse_args(arguments)
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return options.command(options)
    except UsageError as error:
        print(f"lorasp {options.name}: {error}", file=sys.stderr)
        return 2


def require(*modules: str, extra: str) -> None:
    """Raises UsageError naming the extra unless every module can be imported."""
    for module in modules:
        try:
            with quiet_imports():
                importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f'needs {module} ({error}): pip install "lorasp[{extra}]"') from error


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lorasp", description="Fused LoRA kernels for PyTorch.")
    commands = parser.add_subparsers(dest="name", required=True, metavar="{info,demo,bench,tune,check}")

    info = commands.add_parser("info", help="versions, CPU and GPU, which backends run here and why the others do not")
    info.set_defaults(command=_info)

    demo = commands.add_parser(
        "demo", help="train a small language model, then adapt it six ways and compare", description=_DEMO
    )
    demo.add_argument("--steps", type=_at_least(1), help="adaptation steps per method (default: by device)")
    demo.add_argument("--size", choices=("auto", "tiny", "small", "medium", "large"), default="auto", help="model size")
    demo.add_argument("--device", type=device_of, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    demo.add_argument("--seed", type=_at_least(0), default=0)
    demo.add_argument("--out", type=Path, default=Path("."), help="folder for lorasp-demo.png (default: here)")
    demo.set_defaults(command=_demo)

    bench = commands.add_parser(
        "bench", help="time one adapted layer against the frozen nn.Linear, or a whole model against PEFT",
        description=_BENCH, epilog=_models(), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = bench.add_mutually_exclusive_group()
    what.add_argument(
        "--op", choices=("lora_linear", "dropkey_attention", "hidden_cut", "consistency"), help="default: lora_linear"
    )
    what.add_argument("--model", nargs="+", metavar="NAME", help="training steps of whole models: see below")
    bench.add_argument(
        "--sizes", nargs="+", type=_sizes, metavar="N,N,...",
        help="of the other operators: attention B,H,S,D; hidden_cut B,S,F; consistency M,V",
    )  # fmt: skip
    bench.add_argument("--rates", nargs="+", type=float, metavar="P", help="drop rates of attention")
    bench.add_argument("--causal", action="store_true", help="attention: causal to causal")
    bench.add_argument("--variants", nargs="+", metavar="NAME", help="with --model: see below (default: all)")
    bench.add_argument(
        "--child", metavar="VARIANT", help="with --model: only train it for a few steps and print its memory as JSON"
    )
    bench.add_argument(
        "--memory", nargs="?", const="auto", choices=("auto", "measured", "computed"),
        help="with --model: the peak memory of one step and its parts (always so for published sizes): measured in a "
        "process per variant, or computed on tensors without data (default: measured where there is a GPU)",
    )  # fmt: skip
    bench.add_argument(
        "--checkpointing", action="store_true", help="with --memory or a published size: activation checkpointing"
    )
    bench.add_argument("--shapes", nargs="+", metavar="SET", help=f"named sets: {', '.join(_shape_sets())}")
    bench.add_argument("--mknr", nargs="+", type=_mknr, metavar="M,K,N,R", help="shapes of your own")
    bench.add_argument(
        "--tokens", type=_at_least(1), help="M of named sets (default: the set's; 512 for models on CPU)"
    )
    bench.add_argument("--dtype", type=dtype_of, default=torch.bfloat16, help="fp32, bf16 (default), fp16")
    bench.add_argument("--device", type=device_of, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    bench.add_argument("--dropout", type=float, default=0.0, help="lora_dropout of every adapter")
    bench.add_argument("--providers", nargs="+", metavar="NAME", help="see below (default: what suits the device)")
    bench.add_argument("--freeze-A", action="store_true", help="freeze A in every adapter (LoRA-FA)")
    bench.add_argument(
        "--members", type=_at_least(1), default=1, metavar="G", help="G layers that read one input, such as q, k and v"
    )
    bench.add_argument("--prepack", action="store_true", help="CPU: add lorasp with a prepacked frozen weight")
    bench.add_argument("--rounds", type=_at_least(1), help="interleaved rounds (default: what fits --seconds, 5 to 41)")
    bench.add_argument("--seconds", type=float, default=20.0, help="time budget per shape and mode (default 20)")
    bench.add_argument("--threads", type=_at_least(1), help="CPU threads (default: torch's)")
    bench.add_argument("--out", type=Path, default=Path("."), help="folder for the csv and the plot (default: here)")
    bench.set_defaults(command=_bench, default_of=bench.get_default)

    tune = commands.add_parser(
        "tune", help="measure plans and tiles on this GPU and write its plan table", description=_TUNE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    tune.add_argument(
        "--op", choices=("lora_linear", "dropkey_attention", "lora_linear_skinny"), default="lora_linear",
        help="plans of lora_linear (default), or the tiles of attention's kernels or of the rank-R products",
    )  # fmt: skip
    tune.add_argument(
        "--sizes", nargs="+", type=_sizes, metavar="B,H,S,D",
        help="of attention (default: 16384 tokens in heads of 128 and of 64)",
    )  # fmt: skip
    tune.add_argument(
        "--shapes", nargs="+", type=_kn, metavar="K,N", help="layers (default: those of LLaMA 8B and RoBERTa-large)"
    )
    tune.add_argument("--ranks", nargs="+", type=_at_least(1), metavar="R", help="default: by operator")
    tune.add_argument(
        "--tokens", nargs="+", type=_at_least(1), metavar="M",
        help="rows of x, in the order they are measured (default: from 1 to 32768, 8192 first)",
    )  # fmt: skip
    tune.add_argument(
        "--dtypes", nargs="+", type=dtype_of, default=[torch.bfloat16], metavar="DTYPE",
        help="bf16 (default), fp16, fp32",
    )  # fmt: skip
    tune.add_argument("--dropout", choices=("off", "on", "both"), default="both", help="default: both")
    tune.add_argument("--plans", nargs="+", choices=("fused", "onepass"), help="tried against addmm (default: both)")
    tune.add_argument("--budget", type=_seconds, default=3600.0, help="seconds for everything (default 3600)")
    tune.add_argument("--seconds", type=_seconds, default=2.0, help="of interleaved rounds per call (default 2)")
    tune.add_argument("--device", type=device_of, help="cuda, cuda:1 (default: cuda)")
    tune.add_argument("--out", type=Path, help="folder of the table (default: where lorasp looks for it)")
    tune.add_argument("--fresh", action="store_true", help="drop the rows that the table holds of this --op")
    tune.add_argument("--dry-run", action="store_true", help="show the candidates and the work; needs no GPU")
    tune.add_argument(
        "--target", type=_arch, metavar="sm_90", help="with --dry-run: an architecture instead of the GPU"
    )
    tune.set_defaults(command=_tune, default_of=tune.get_default)

    check = commands.add_parser(
        "check", help="compare the backends with the fp64 reference on this machine; exit code 1 if one disagrees"
    )
    check.add_argument("--op", nargs="+", metavar="NAME", help=f"default: {', '.join(_operators())}")
    check.add_argument("--backend", nargs="+", metavar="NAME", help="reference, cpp, triton, cuda, auto (default: all)")
    check.add_argument(
        "--shapes",
        nargs="+",
        type=_sizes,
        metavar="M,K,N,R",
        help="as the operator takes them (default: a few small ones)",
    )  # fmt: skip
    check.add_argument("--dtype", nargs="+", type=dtype_of, help="fp32, bf16, fp16 (default: all the backend takes)")
    check.add_argument("--device", type=device_of, help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    check.add_argument("--json", action="store_true", help="every comparison as JSON on stdout, nothing else")
    check.set_defaults(command=_check)
    return parser


_DEMO = """Trains a byte-level Llama-style model on English prose, then adapts it to Python source from the same weights
with full fine-tuning, PEFT LoRA, lorasp LoRA, LoRA-FA, LoRA-SP and HiddenKey. No network. One table, one PNG."""

_BENCH = """Times one adapted layer, forward and forward+backward, against the frozen nn.Linear of the same run; or with
--op dropkey_attention, hidden_cut, consistency against PyTorch's own; or with --model training steps of whole models
against PEFT's. Correctness is asserted first; rounds are interleaved; medians and quartiles are reported.

providers:
  linear             nn.Linear, weight frozen (always there: everything is divided by it)
  linear-train       nn.Linear, weight trains
  peft               PEFT as it comes: fp32 adapters
  peft-half          PEFT, adapters in the layer's dtype (autocast_adapter_dtype=False)
  peft-half-compile  torch.compile of peft-half
  aten               LoRA by hand: cuBLAS (MKL, oneDNN) and addmm_ in one autograd Function
  lorasp[:backend[:plan]]   e.g. lorasp, lorasp:cpp:fused, lorasp:triton:onepass, lorasp:reference
flags: +fa freezes A (LoRA-FA); lorasp also takes +sp (LoRA-SP, half of the features train), +shared (--members run as
one group), +masters (fp32 A and B) and +prepack (CPU), e.g. lorasp+fa+prepack"""


_TUNE = """Measures every plan of lora_linear (addmm, fused, onepass), on the architecture's own tiles and on candidates
beside them, against the frozen nn.Linear, and writes the fastest for each call into the plan table of the device.
Correct first: what disagrees with the fp64 reference, does not compile or does not launch is reported, never chosen.
addmm stays unless another plan is faster by more than the noise. Started again, it goes on where it stopped.
With --op dropkey_attention or lora_linear_skinny it measures the tiles of single kernels against their defaults."""


def _at_least(least: int):
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return whole_number


def dtype_of(text: str) -> torch.dtype:
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"must be fp32, bf16 or fp16, got {text!r}")
    return _DTYPES[text]


def device_of(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0 with commas between, got {text!r}")
    return tuple(map(int, parts))


def _mknr(text: str) -> tuple[int, ...]:
    sizes = _sizes(text)
    if len(sizes) != 4:
        raise argparse.ArgumentTypeError(f"must be four whole numbers M,K,N,R above 0, got {text!r}")
    return sizes


def _kn(text: str) -> tuple[int, ...]:
    sizes = _sizes(text)
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f"must be two whole numbers K,N above 0, got {text!r}")
    return sizes


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text}")
    return value


def _arch(text: str) -> int:
    digits = text.removeprefix("sm_")
    if not digits.isdecimal() or int(digits) < 75:
        raise argparse.ArgumentTypeError(f"must be sm_75 or later, such as sm_90, got {text!r}")
    return int(digits)


def _operators() -> Sequence[str]:
    from lorasp.testing import OPERATORS

    return tuple(OPERATORS)


def _shape_sets() -> Sequence[str]:
    from lorasp.bench import SHAPES

    return tuple(SHAPES)


def _models() -> str:
    from lorasp.bench import models_report

    return models_report.choices()


def _info(options: argparse.Namespace) -> int:
    from lorasp import info

    print(info.report())
    return 0


def _demo(options: argparse.Namespace) -> int:
    console.make_folder(options.out)
    require("rich", "matplotlib", "transformers", "peft", "safetensors", extra="demo")
    from lorasp import demo
    from lorasp.bench import session

    demo.run(
        device=options.device or session.default_device(), size=options.size, steps=options.steps, seed=options.seed,
        out=options.out,
    )  # fmt: skip
    return 0


def _bench(options: argparse.Namespace) -> int:
    from lorasp.bench import command, hiddenkey_report

    options.op = options.op or "lora_linear"
    console.refuse_foreign(options, "--model" if options.model else f"--op {options.op}", command.OPTIONS)
    if not options.model:
        return (command if options.op == "lora_linear" else hiddenkey_report).run(options)
    require("peft", "transformers", extra="bench")
    from lorasp.bench import model_memory_report, models_report

    if model_memory_report.wanted(options):
        return model_memory_report.run(options)
    if options.checkpointing:
        raise UsageError("--checkpointing needs --memory or a model of a published size")
    return models_report.run(options)


def _tune(options: argparse.Namespace) -> int:
    from lorasp.tune import command

    return command.run(options)


def _check(options: argparse.Namespace) -> int:
    from lorasp import testing
    from lorasp.bench import session
    from lorasp.ops import registry

    device = options.device or session.default_device()
    backends = options.backend
    for name in backends or ():
        if name not in ("auto", *registry.BACKENDS):
            raise UsageError(f"--backend must be among auto, {', '.join(registry.BACKENDS)}, got {name!r}")
        if reason := registry.available_backends().get(name):
            raise UsageError(f"backend {name}: {reason}")
    if backends is None:
        missing = registry.available_backends()
        backends = [
            name for name, reason in missing.items()
            if reason is None and registry.unsupported(name, device.type, torch.float32) is None
        ]  # fmt: skip
    results = []
    for op in _operators_to_check(options):
        for backend in backends:
            try:
                results += testing.check(op, backend, options.shapes, options.dtype, device)
            except (ValueError, TypeError) as error:
                raise UsageError(str(error)) from error
    failed = [result for result in results if not result.ok]
    if options.json:
        print(json.dumps([{**asdict(result), "ok": result.ok} for result in results], indent=1))
    else:
        _print_check(results, failed, device)
    return 1 if failed else 0


def _operators_to_check(options: argparse.Namespace) -> Sequence[str]:
    """The operators asked for; without --op those whose shapes have as many numbers as the ones given."""
    from lorasp.testing import OPERATORS

    lengths = {len(shape) for shape in options.shapes or ()}
    fitting = [op for op, module in OPERATORS.items() if lengths <= {len(module.SHAPE)}]
    for op in options.op or ():
        if op not in OPERATORS:
            raise UsageError(f"--op must be among {', '.join(OPERATORS)}, got {op!r}")
        if op not in fitting:
            raise UsageError(f"--shapes of {op} must be {','.join(OPERATORS[op].SHAPE)}")
    if not fitting:
        forms = " or ".join(dict.fromkeys(",".join(module.SHAPE) for module in OPERATORS.values()))
        raise UsageError(f"--shapes must be {forms}")
    return options.op or fitting


def _print_check(results: list, failed: list, device: torch.device) -> None:
    for op in dict.fromkeys(result.op for result in results):
        groups: dict[tuple[str, str, str, str], list] = {}
        for result in results:
            if result.op == op:
                dtype, tensor = result.case.split()[2], result.tensor.rstrip("0123456789")
                groups.setdefault((result.backend, result.plan, dtype, tensor), []).append(result)
        rows = []
        for key, members in groups.items():
            worst = max(members, key=lambda r: r.error / r.bound if r.bound else r.error)
            verdict = "ok" if all(r.ok for r in members) else "FAILED"
            rows.append([*key, str(len(members)), f"{worst.error:.1e}", f"{worst.bound:.1e}", verdict])
        columns = ["backend", "plan", "dtype", "tensor", "cases", "worst error", "its bound", ""]
        console.print_table(f"{op} against the fp64 reference on {device}", columns, rows, left=4)
    for result in failed:
        print(
            f"FAILED {result.op} {result.backend}:{result.plan} {result.tensor} [{result.case}]: "
            f"error {result.error:.3e} exceeds {result.bound:.3e}"
        )
    print(f"{len(results) - len(failed)} of {len(results)} comparisons within the bound")
