"""The one place where kernels are launched, so that a launch can also be recorded and compiled without a GPU."""

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning

# Read when triton decorates the kernels, hence once, at import.
INTERPRETED = triton.knobs.runtime.interpret

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Stated, because Triton warns about its own default, which changes in 3.10.
_OPTIONS = {"enable_fp_fusion": True}
_recording: tuple[tuning.Target, list] | None = None
_compiling = False


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of one kernel for one architecture: what the JIT would build for a recorded launch."""

    kernel: object
    target: tuning.Target
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        values = dict(self.constants)
        blocks = "x".join(str(values[key]) for key in values if key.startswith("BLOCK"))
        flags = "".join(f" {key}" for key, value in values.items() if value is True)
        dtype = next(kind for _, kind in self.signature if kind != "constexpr").lstrip("*").split("[")[0]
        dtype = dtype.removeprefix("tensordesc<")
        return f"{self.kernel.__name__} {dtype} {blocks} w{self.num_warps} s{self.num_stages}{flags} {self.target.name}"

    def compile(self):
        """Compile to a cubin with triton.compile; needs no GPU."""
        source = ASTSource(
            fn=self.kernel,
            signature=dict(self.signature),
            constexprs=dict(self.constants),
            attrs={(index,): [["tt.divisibility", 16]] for index in self.divisible},
        )
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages} | _OPTIONS
        return triton.compile(source, target=GPUTarget("cuda", self.target.arch, 32), options=options)


def target_of(tensor: torch.Tensor) -> tuning.Target:
    """The hardware a launch on this tensor is for."""
    return tuning.target_of_device(tensor.device) if _recording is None else _recording[0]


def check_operand(operator: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a dtype or a device that the kernels do not take."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{operator}: {name} must be float32, bfloat16 or float16 for triton, got {tensor.dtype}")
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"{operator}: {name} must be on a GPU for triton unless TRITON_INTERPRET=1, got cpu")
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{operator}: {name} must be float32 or float16 under TRITON_INTERPRET=1, got bfloat16")


def device_of(tensor: torch.Tensor):
    """A context with the tensor's device: Triton launches on the current one, not on the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision_of(tensor: torch.Tensor) -> str:
    """input_precision of fp32 products: TF32 only where torch's own matmul may use it."""
    allowed = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def launch(kernel, grid: tuple[int, ...], arguments: dict, num_warps: int, num_stages: int) -> None:
    """Run `kernel` over `grid`; arguments by name, constexprs included. Under record(), note it instead; under
    compiling(), compile it."""
    if _recording is None:
        options = {"num_warps": num_warps, "num_stages": num_stages} | _OPTIONS
        if _compiling:
            kernel.warmup(grid=grid, **arguments, **options)
        else:
            kernel[grid](**arguments, **options)
        return
    target, cases = _recording
    case = _specialize(kernel, arguments, target, num_warps, num_stages)
    if case not in cases:
        cases.append(case)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside the block launches run nothing: what they need is compiled in threads, all of it at the block's end.

    What does not compile is passed over; a launch outside the block says why.
    """
    global _compiling
    with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
        _compiling = True
        try:
            yield
        finally:
            _compiling = False


@contextlib.contextmanager
def record(target: tuning.Target) -> Iterator[list[CompileCase]]:
    """Inside the block launches run nowhere: each distinct specialisation, as chosen for `target`, joins the list."""
    global _recording
    before, _recording = _recording, (target, [])
    try:
        yield _recording[1]
    finally:
        _recording = before


def _specialize(kernel, arguments, target, num_warps, num_stages) -> CompileCase:
    """The JIT's own rules: 1 and None become constants, multiples of 16 and aligned pointers are marked."""
    if arguments.keys() != set(kernel.arg_names):
        raise TypeError(f"{kernel.__name__}: arguments {sorted(arguments.keys() ^ set(kernel.arg_names))} do not fit")
    signature, constants, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        kind = "constexpr"
        if parameter.is_constexpr or value is None:
            constants.append((parameter.name, value))
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            kind = f"*{_TYPES[value.dtype]}"
            divisible += [index] * (value.data_ptr() % 16 == 0)
        elif isinstance(value, float):
            kind = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            constants.append((parameter.name, 1))
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [index] * (value % 16 == 0 and not parameter.do_not_specialize)
        signature.append((parameter.name, kind))
    return CompileCase(kernel, target, tuple(signature), tuple(constants), tuple(divisible), num_warps, num_stages)
