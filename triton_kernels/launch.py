"""The one place where kernels are launched, so that a launch can also be recorded and compiled without a GPU."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
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
_interceptor: Callable | None = None
_recorded_target: tuning.Target | None = None


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
    return _recorded_target or tuning.target_of_device(tensor.device)


def check_operand(operator: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError for a dtype or a device that the kernels do not take."""
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{operator}: {name} must be float32, bfloat16 or float16 for triton, got {tensor.dtype}")
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise ValueError(f"{operator}: {name} must be on a GPU for triton unless TRITON_INTERPRET=1, got cpu")
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        raise ValueError(f"{operator}: {name} must be float32 or float16 under TRITON_INTERPRET=1, got bfloat16")


_HERE = contextlib.nullcontext()


def device_of(tensor: torch.Tensor):
    """A context with the tensor's device: Triton launches on the current one, not on the tensor's."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


def with_unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the entries of its last dimension lie side by side, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A boolean mask as the contiguous bytes that kernels read."""
    return None if mask is None else mask.contiguous().view(torch.uint8)


def precision_of(tensor: torch.Tensor) -> str:
    """input_precision of fp32 products: TF32 only where torch's own matmul may use it."""
    allowed = tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def launch(kernel, grid: tuple[int, ...], arguments: dict, num_warps: int, num_stages: int) -> None:
    """Run `kernel` over `grid`; arguments by name, constexprs included. Under intercept(), hand it to that instead."""
    (run if _interceptor is None else _interceptor)(kernel, grid, arguments, num_warps, num_stages)


def run(kernel, grid, arguments, num_warps, num_stages) -> CompiledKernel | None:
    """Run the kernel; what the JIT compiled or found for it, None from the interpreter."""
    return kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages, **_OPTIONS)


@contextlib.contextmanager
def intercept(action: Callable) -> Iterator[None]:
    """Inside the block every launch is action(kernel, grid, arguments, num_warps, num_stages), which may call run()."""
    global _interceptor
    before, _interceptor = _interceptor, action
    try:
        yield
    finally:
        _interceptor = before


class Launch:
    """A kernel on a grid whose arguments are fixed but for `free`, in this order: what one shape's calls share.

    The JIT analyses every argument of every call. Here the first call of a kind goes through it, later ones hand their
    arguments to the kernel it compiled. A kind is what the JIT would see of the free arguments: of a tensor its device,
    dtype, presence and whether it starts at a multiple of 16 bytes. Free numbers must be floats, or integers that the
    kernel does not specialise and that stay in int32 (a kernel compiled for one value serves all of them).
    """

    def __init__(
        self, kernel, grid: tuple[int, ...], arguments: dict, free: Sequence[str], num_warps: int, num_stages: int
    ):
        self._kernel, self._grid, self._options = kernel, (*grid, 1, 1)[:3], (num_warps, num_stages)
        self._free, self._names = tuple(free), tuple(kernel.arg_names)
        if arguments.keys() | set(free) != set(self._names) or arguments.keys() & set(free):
            wrong = sorted(arguments.keys() ^ set(self._names) ^ set(free))
            raise TypeError(f"{kernel.__name__}: arguments {wrong} do not fit")
        self._template = [arguments.get(name) for name in self._names]
        self._slots = [self._names.index(name) for name in free]
        # By their names: what is free is a pointer, a descriptor, which the shape determines, or a number.
        self._pointers = [i for i, name in enumerate(free) if name.endswith("_ptr")]
        self._runners: dict[tuple, Callable] = {}

    def __call__(self, *values) -> None:
        arguments = self._template.copy()
        for slot, value in zip(self._slots, values, strict=True):
            arguments[slot] = value
        if _interceptor is not None or INTERPRETED:
            launch(self._kernel, self._grid, dict(zip(self._names, arguments, strict=True)), *self._options)
            return
        kind = self.kind(values)
        runner = self._runners.get(kind)
        if runner is not None:
            runner(*arguments)
            return
        self._check_numbers(values)
        compiled = run(self._kernel, self._grid, dict(zip(self._names, arguments, strict=True)), *self._options)
        if isinstance(compiled, CompiledKernel):
            self._runners[kind] = compiled[self._grid]

    def _check_numbers(self, values: Sequence[object]) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            parameter = self._kernel.params[slot]
            if isinstance(value, int) and not (parameter.do_not_specialize and -(2**31) <= value < 2**31):
                raise TypeError(f"{self._kernel.__name__}: {parameter.name} must not be free: its value is compiled in")

    def kind(self, values: Sequence[object]) -> tuple:
        """What the JIT's specialisation depends on beyond the fixed arguments, and the device of the kernel."""
        kind = []
        for i in self._pointers:
            pointer: Tensor | None = values[i]
            if pointer is None:
                kind.append(None)
            else:
                kind += (pointer.dtype, pointer.data_ptr() % 16 == 0)
        kind.append(values[self._pointers[0]].get_device())
        return tuple(kind)


def per_shape(build: Callable) -> Callable:
    """Cache what a launcher computes from sizes, strides and dtypes alone, most of all its Launch.

    Not under intercept(), nor in the interpreter: tests exchange tiles there. A new table, or tiles that are forced,
    make a cache of their own.
    """

    @functools.lru_cache(maxsize=4096)
    def cached(tiles, *key):
        return build(*key)

    @functools.wraps(build)
    def look_up(*key):
        return build(*key) if _interceptor is not None or INTERPRETED else cached(tuning.tiles_in_force(), *key)

    return look_up


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside the block launches run nothing: what they need is compiled in threads, all of it at the block's end.

    What does not compile is passed over; a launch outside the block says why.
    """

    def warm_up(kernel, grid, arguments, num_warps, num_stages):
        kernel.warmup(grid=grid, **arguments, num_warps=num_warps, num_stages=num_stages, **_OPTIONS)

    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        intercept(warm_up),
    ):
        yield


@contextlib.contextmanager
def record(target: tuning.Target) -> Iterator[list[CompileCase]]:
    """Inside the block launches run nowhere: each distinct specialisation, as chosen for `target`, joins the list."""
    global _recorded_target
    cases = []

    def note(kernel, grid, arguments, num_warps, num_stages):
        case = _specialize(kernel, arguments, target, num_warps, num_stages)
        if case not in cases:
            cases.append(case)

    before, _recorded_target = _recorded_target, target
    try:
        with intercept(note):
            yield cases
    finally:
        _recorded_target = before


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
