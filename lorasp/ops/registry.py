"""How an operator is declared once and bound to its backends, and how a backend is chosen.

Every (operator, direction, backend) is a raw op of its own, `lorasp::<name>_<backend>`, so that opcheck, tests and
benchmarks reach each one. The choice is made here, in Python: dispatch keys know only devices and cannot express a
forced reference, fp64, or interpreted Triton on CPU tensors.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
PLANS = ("auto", "addmm", "fused", "onepass")

_library = torch.library.Library("lorasp", "FRAGMENT")
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

# Names of the operators that the built extension implements, by compiled backend.
_compiled: dict[str, set[str]] = {"cpp": set(), "cuda": set()}
_DISPATCH_KEYS = {"cpp": "CPU", "cuda": "CUDA"}

# Plain module globals: dynamo guards them, while a ContextVar breaks fullgraph.
_forced_backend: str | None = None
_forced_plan: str | None = None


def _load_extension() -> str | None:
    """Import lorasp._C where it was built. None, or the reason why it was not; a broken binary raises."""
    if importlib.util.find_spec("lorasp._C") is not None:
        try:
            importlib.import_module("lorasp._C")
        except ImportError as error:
            raise ImportError(
                f"lorasp: the built C++ extension does not load ({error}); rebuild it against this torch "
                f"({torch.__version__}) with `pip install --no-build-isolation --force-reinstall --no-deps lorasp`"
            ) from error
        return None
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        return "not built: no C++ compiler on this machine"
    return "not built: install with `pip install --no-build-isolation` (torch, ninja and pybind11 present)"


_cpp_missing = _load_extension()
_cuda_missing = _cpp_missing
if _cuda_missing is None and not importlib.import_module("lorasp._C").build_info()["cuda"]:
    _cuda_missing = "not built: the extension was compiled without nvcc or for a torch without CUDA"
_triton_installed = importlib.util.find_spec("triton") is not None
_triton_interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _triton_missing() -> str | None:
    if not _triton_installed:
        return "triton is not installed"
    if _triton_interpreted or torch.cuda.is_available():
        return None
    return "no GPU (set TRITON_INTERPRET=1 to run the kernels on CPU tensors, slowly)"


def _cuda_obstacle() -> str | None:
    if _cuda_missing is not None:
        return _cuda_missing
    return _capability_obstacle(torch.cuda.current_device() if torch.cuda.is_available() else 0)


@functools.cache
def _capability_obstacle(device: int) -> str | None:
    if not torch.cuda.is_available():  # its tensors are fake
        return "no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= (8, 0) else "needs compute capability 8.0, got {}.{}".format(*capability)


def available_backends() -> dict[str, str | None]:
    """Backend name -> None where it can run on this machine, else the reason why not."""
    return {"reference": None, "cpp": _cpp_missing, "triton": _triton_missing(), "cuda": _cuda_obstacle()}


@contextlib.contextmanager
def use_backend(name: str, plan: str | None = None) -> Iterator[None]:
    """Force backend `name` (and plan `plan`) inside the `with` block; "auto" gives the choice back.

    A forced backend that lacks a device, a dtype or a feature raises; it never falls back. The backend is remembered
    for the backward pass, which may run outside the block. Raises ValueError for an unknown or unavailable one.
    """
    global _forced_backend, _forced_plan
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    if plan is not None and plan not in PLANS:
        raise ValueError(f"use_backend: plan must be one of {', '.join(PLANS)}, got {plan!r}")
    reason = available_backends().get(name)
    if reason is not None:
        raise ValueError(f"use_backend: {name} is not available: {reason}")
    before = _forced_backend, _forced_plan
    _forced_backend, _forced_plan = None if name == "auto" else name, plan
    try:
        yield
    finally:
        _forced_backend, _forced_plan = before


def forced() -> tuple[str | None, str | None]:
    """The backend and the plan use_backend forces now."""
    return _forced_backend, _forced_plan


def unsupported(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot compute in `dtype` on `device_type`; None where it can."""
    if backend == "reference":
        return None
    if dtype not in _HALF_AND_SINGLE:
        return f"{backend} does not compute in {dtype}"
    if backend == "cpp":
        return _cpp_missing or (None if device_type == "cpu" else f"cpp runs on cpu, not on {device_type}")
    if backend == "cuda":
        return _cuda_missing or (None if device_type == "cuda" else f"cuda runs on cuda, not on {device_type}")
    if not _triton_installed:
        return "triton is not installed"
    if device_type == "cpu":
        if not _triton_interpreted:
            return "triton takes cpu tensors only under TRITON_INTERPRET=1"
        return "tl.dot on bfloat16 is wrong in Triton's interpreter" if dtype == torch.bfloat16 else None
    return None if device_type == "cuda" else f"triton runs on cuda, not on {device_type}"


# Multiply-adds of a frozen product that a GPU of some 800 TFLOP/s (half precision; float32 takes longer, and would want
# less) computes in 90 us each way. The launches of a layer's
# forward and backward take the host 330 us from Triton and 225 us from C++, PEFT's layer 190 us: CPU time measured by
# tests/idle_gpu/host_time.py, on a device that computes nothing.
_HOST_BOUND = 2**35


def waits_for_host(x: torch.Tensor, out_features: int, plan: str) -> bool:
    """Whether a GPU that backend cuda serves may wait for a linear layer's launches.

    Never in a traced graph, nor where a plan is forced.
    """
    return (
        _cuda_missing is None
        and not torch.compiler.is_compiling()
        and x.is_cuda
        and plan == "auto"
        and x.numel() * out_features <= _HOST_BOUND
        and _capability_obstacle(x.device.index) is None
    )


def choose(operator: str, device_type: str, dtype: torch.dtype, waits: bool = False) -> str:
    """The backend that serves `operator` in `dtype` on `device_type`: the forced one, else the best available.

    waits: waits_for_host(), where the backend that launches from C++ goes first. Raises ValueError if a forced backend
    cannot.
    """
    if _forced_backend is not None:
        reason = unsupported(_forced_backend, device_type, dtype)
        if reason is None and _forced_backend == "cuda" and not _is_compiled(operator, "cuda"):
            reason = "cuda has no kernels for this operator"
        if reason is not None:
            raise ValueError(f"{operator}: the forced backend cannot serve this call: {reason}")
        _check_not_stale(operator, _forced_backend)
        return _forced_backend
    best = {"cpu": "cpp", "cuda": "triton" if _triton_installed else "cuda"}.get(device_type, "reference")
    if waits and best == "triton" and _is_compiled(operator, "cuda") and not unsupported("cuda", device_type, dtype):
        return "cuda"
    if unsupported(best, device_type, dtype) is not None or (best == "cuda" and not _is_compiled(operator, best)):
        return "reference"
    _check_not_stale(operator, best)
    return best


def _is_compiled(operator: str, backend: str) -> bool:
    return bool({operator, f"{operator}_fwd"} & _compiled[backend])


def _check_not_stale(operator: str, backend: str) -> None:
    if backend == "cpp" and not _is_compiled(operator, backend):
        raise RuntimeError(
            f"{operator}: the built C++ extension is older than this package and lacks the operator; build it again "
            "with `pip install --no-build-isolation --force-reinstall --no-deps lorasp`"
        )


def choose_plan(plan: str) -> str:
    """The plan of this call: its own, else the one forced by use_backend, else auto."""
    return _forced_plan if plan == "auto" and _forced_plan is not None else plan


@functools.cache
def triton_kernels(operator: str) -> ModuleType:
    """The launchers of an operator, imported at its first call: importing lorasp must not import triton."""
    return importlib.import_module(f"lorasp.triton_kernels.{operator}")


_AS_IT_IS = contextlib.nullcontext()


def autocast_off(device_type: str):
    """A context without autocast, for what an operator's backends call of torch; free where there is none."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _AS_IT_IS


def choose_linear(
    operator: str, x: torch.Tensor, out_features: int, dtype: torch.dtype, plan: str = "auto"
) -> tuple[str, str]:
    """(backend, plan) of a linear layer's call. Raises ValueError as choose() does, and for a plan cuda has not."""
    plan = choose_plan(plan)
    backend = choose(operator, x.device.type, dtype, waits_for_host(x, out_features, plan))
    if backend == "cuda" and plan not in ("auto", "addmm"):
        raise ValueError(f"{operator}: plan must be auto or addmm for backend cuda, got {plan!r}")
    return backend, plan


def define(schema: str) -> None:
    """Define `lorasp::<schema>`, an op that only a compiled backend implements."""
    _library.define(schema)


def declare(name: str, schema: str, fake: Callable, implementations: dict[str, Callable]) -> dict[str, Callable]:
    """Define `lorasp::<name>_<backend>` for every backend and return them, backend -> op.

    schema: arguments and returns; fake: shapes and dtypes; implementations: the Python ones, backend -> function (a
    compiled backend registers its own kernels for the same schema).
    """
    ops = {}
    for backend in BACKENDS:
        qualified = f"{name}_{backend}"
        _library.define(f"{qualified}{schema}")
        torch.library.register_fake(f"lorasp::{qualified}", fake, lib=_library)
        if backend in implementations:
            _library.impl(qualified, implementations[backend], "CompositeExplicitAutograd")
        elif backend in _compiled and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"lorasp::{qualified}", _DISPATCH_KEYS[backend]
        ):
            _compiled[backend].add(name)
        ops[backend] = getattr(torch.ops.lorasp, qualified).default
    return ops
