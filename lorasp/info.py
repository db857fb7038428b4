"""What this machine is and what lorasp can do on it: the facts behind `python -m lorasp info` and every result file."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import textwrap
from pathlib import Path

import torch

import lorasp
from lorasp import console, testing
from lorasp.ops import registry

_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "bf16", "sve", "sve2",
)  # fmt: skip


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_name() -> str:
    info = _cpuinfo()
    return info.get("model name") or info.get("CPU part") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The vector extensions this project's kernels or its GEMM libraries may use, as the kernel names them."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [name for name in _FEATURES if name in flags]


def device_name(device: str | torch.device) -> str:
    """`NVIDIA H200` or `Intel(R) Xeon(R) … (2 threads)`: what a result file names as its machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, `+changes` where tracked files differ from it; empty outside a checkout."""
    root = Path(lorasp.__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return ""
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def versions() -> dict[str, str]:
    """Name -> version of what a measurement depends on; empty strings where something is not installed."""
    return {
        "lorasp": lorasp.__version__,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def extension() -> dict[str, object]:
    """The C++ extension's build facts and the instruction set its kernels use; empty where it is not built."""
    if registry.available_backends()["cpp"] is not None:
        return {}
    from lorasp import _C

    return {**_C.build_info(), "active_isa": _C.active_isa(), "available_isas": _C.available_isas()}


def plan_table() -> dict:
    """The Triton plan table this machine uses; empty where the kernels are not installed beside lorasp."""
    if importlib.util.find_spec("lorasp.triton_kernels") is None:
        return {}
    from lorasp.triton_kernels import tuning

    return tuning.plan_table()


def report() -> str:
    """What `python -m lorasp info` prints."""
    return "\n".join([*_version_lines(), *_cpu_lines(), *_gpu_lines(), *_backend_lines(), *_plan_lines()])


def _lines(title: str, rows: dict[str, str]) -> list[str]:
    wrapper = textwrap.TextWrapper(console.WIDTH, subsequent_indent=" " * 16, break_on_hyphens=False)
    return [title, *(line for name, value in rows.items() for line in wrapper.wrap(f"  {name:<14}{value}")), ""]


def _version_lines() -> list[str]:
    known = versions()
    checkout = known.pop("commit")
    rows = {name: version or "not installed" for name, version in known.items()}
    return _lines("versions", rows | ({"commit": checkout} if checkout else {}))


def _cpu_lines() -> list[str]:
    built = extension()
    rows = {
        "model": cpu_name(),
        "threads": f"{torch.get_num_threads()} used by torch, {os.cpu_count()} in the machine",
        "features": " ".join(cpu_features()) or "unknown",
        "torch uses": torch.backends.cpu.get_cpu_capability(),
    }
    if built:
        rows["lorasp uses"] = f"{built['active_isa']} (of {', '.join(built['available_isas'])})"
        rows["built with"] = f"{built['compiler']} for torch {built['torch']}"
    return _lines("CPU", rows)


def _gpu_lines() -> list[str]:
    count = torch.cuda.device_count()
    if not count:
        why = "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        return _lines("GPU", {"none": why})
    rows = {}
    for i in range(count):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"
        rows[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {memory}"
    return _lines("GPU", {**rows, "CUDA": torch.version.cuda})


def _backend_lines() -> list[str]:
    rows = {name: reason or "runs here" for name, reason in registry.available_backends().items()}
    for device in ("cpu", *["cuda"] * torch.cuda.is_available()):
        many, few = (registry.choose("lora_linear", device, torch.bfloat16, waits) for waits in (False, True))
        rows[f"auto on {device}"] = many if many == few else f"{many}; {few} for small layers and few tokens"
    return _lines("backends", rows)


def _plan_lines() -> list[str]:
    return [*_cpp_plan_lines(), *_triton_plan_lines()]


def _cpp_plan_lines() -> list[str]:
    if registry.available_backends()["cpp"] is not None:
        return []
    rows = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plans = (
            p
            for p in testing.lora_linear.backend_plans("cpp")
            if testing.lora_linear.plan_obstacle("cpp", p, dtype) is None
        )
        name = str(dtype).removeprefix("torch.")
        rows[name] = f"{', '.join(plans)}; auto: {_cpp_auto_rule(name)}"
    return _lines(f"plans of the cpp backend (auto for a weight of {_ASKED_N} x {_ASKED_K})", rows)


_ASKED_N = _ASKED_K = 1024
_ASKED_M = 4096


def _cpp_auto_rule(dtype: str) -> str:
    """What plan `auto` takes in `dtype` on this CPU: the kernels' own answer for every M up to _ASKED_M."""
    from lorasp import _C

    cases = {
        "A frozen": (False, False, False),
        "A trains": (False, False, True),
        "dropout": (False, True, True),
        "packed": (True, False, True),
    }
    rules = {}
    for case, (packed, dropout, trains_A) in cases.items():
        plans = [_C.auto_plans(dtype, M, _ASKED_N, _ASKED_K, packed, dropout, trains_A) for M in range(1, _ASKED_M + 1)]
        forward, backward = (_by_rows(list(direction)) for direction in zip(*plans, strict=True))
        rules[case] = forward if forward == backward else f"{forward}, backward {backward}"
    if len(set(rules.values())) == 1:
        return rules["packed"]
    return "; ".join(f"{case}: {rule}" for case, rule in rules.items())


def _by_rows(plans: list[str]) -> str:
    """`fused to M = 256, then addmm`, from the plan of each M from 1 on."""
    changes = [M for M in range(1, len(plans)) if plans[M] != plans[M - 1]]
    return ", then ".join([*(f"{plans[M - 1]} to M = {M}" for M in changes), plans[-1]])


def _triton_plan_lines() -> list[str]:
    title = "plans of the triton backend"
    table = plan_table()
    if not table:
        return _lines(title, {"none": "lorasp.triton_kernels is not installed"})
    where = "measured" if table["measured"] else "nobody measured this device: safe defaults"
    rows = {"table": f"{table['file']} ({where})"}
    for direction, plan in table["default"].items():
        count = sum(row["direction"] == direction for row in table["rows"])
        rows[direction] = f"{plan}; {count} measured rows decide first" if count else plan
    return _lines(title, rows)
