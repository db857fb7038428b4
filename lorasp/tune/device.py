"""The device that `lorasp tune` measures: lora_linear's Triton launchers, checked and timed without autograd.

    forward    y, xa of lora_linear                 ÷ torch.nn.functional.linear(x, weight)
    backward   dx, dlora_A, dlora_B of lora_linear  ÷ dy @ weight, the frozen nn.Linear's dx

Runs on a GPU, or under TRITON_INTERPRET=1 on CPU tensors, where times mean nothing.
"""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from triton.errors import TritonError

from lorasp import info
from lorasp.bench.timing import Clock, interleave, make_clock
from lorasp.reference import lora_linear as reference
from lorasp.testing import make_inputs
from lorasp.testing.rule import bound, error
from lorasp.triton_kernels import lora_linear as kernels
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.tuning import Plan
from lorasp.tune.search import DeviceLost, Job, Rejected, describe

DROPOUT_P = 0.1
_SCALE = 2.0
# The reference forms its mask in int64. A row's result does not depend on the rows behind it.
_CHECKED_ROWS = 8192


class DeviceBench:
    """A search.Bench on one device; clock: what times a call there (default: as the benchmarks do)."""

    def __init__(self, device: torch.device, clock: Clock | None = None):
        self.device = device
        self.target = tuning.target_of_device(device)
        self._clock = clock or make_clock(device)
        self._operands: _Operands | None = None

    def verify(self, job: Job, plan: Plan) -> None:
        with self._refusals(f"{describe(plan)} at {job}"):
            operands = self._operands_of(job)
            with _poisoned():
                actual = operands.call(plan)
            expected = operands.expected()
        for name, (want, allowed) in expected.items():
            have = error(actual[name][: want.shape[0]], want)
            if not have <= allowed:
                raise AssertionError(f"error {have:.3e} of {name} exceeds {allowed:.3e} at {job}")

    def samples(
        self, job: Job, plans: Sequence[Plan | None], rounds: int | None, seconds: float
    ) -> list[list[tuple[float, float]]]:
        with self._refusals(f"timing at {job}"):
            operands = self._operands_of(job)
            functions = [operands.function(plan) for plan in plans]
            return interleave(operands.frozen, functions, self._clock, rounds, seconds)

    def _operands_of(self, job: Job) -> "_Operands":
        if self._operands is None or self._operands.job != job:
            self._operands = None  # freed before the next ones are made
            self._operands = _Operands(job, self.device)
        return self._operands

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        """What Triton and the device refuse is Rejected; where the device does not answer any more, DeviceLost."""
        try:
            yield
            self._synchronize()
        except (TritonError, RuntimeError) as refusal:
            try:
                self._synchronize()
            except RuntimeError as lost:
                raise DeviceLost(f"{what}: {_first_line(lost)}") from refusal
            raise Rejected(_first_line(refusal)) from refusal

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Operands:
    """The tensors of one job, drawn on its device; what the reference makes of them is computed once."""

    def __init__(self, job: Job, device: torch.device):
        self.job = job
        generator = torch.Generator(device).manual_seed(0)
        inputs = make_inputs(job.M, job.K, job.N, job.R, job.dtype, device, bias=False, generator=generator)
        self.x, self.weight, self.lora_A, self.lora_B, self.dy = (
            inputs[name] for name in ("x", "weight", "lora_A", "lora_B", "dy")
        )
        self.xa = torch.randn(job.M, job.R, dtype=job.dtype, device=device, generator=generator)
        self.seed = torch.tensor(1234, device=device) if job.dropout else None
        self.dropout_p = DROPOUT_P if job.dropout else 0.0
        self._expected: dict[str, tuple[Tensor, float]] | None = None

    def frozen(self) -> Tensor:
        if self.job.direction == "forward":
            return torch.nn.functional.linear(self.x, self.weight)
        return torch.mm(self.dy, self.weight)

    def function(self, plan: Plan | None) -> Callable[[], object]:
        return self.frozen if plan is None else lambda: self.call(plan)

    def call(self, plan: Plan) -> dict[str, Tensor]:
        if self.job.direction == "forward":
            results = kernels.forward(
                self.x, self.weight, None, self.lora_A, self.lora_B, self.seed, _SCALE, self.dropout_p, 0, plan
            )
            return dict(zip(("y", "xa"), results, strict=True))
        results = kernels.backward(
            self.dy, self.x, self.weight, self.lora_A, self.lora_B, self.xa, self.seed, None, None, _SCALE,
            self.dropout_p, 0, True, True, True, plan,
        )  # fmt: skip
        return dict(zip(("dx", "dlora_A", "dlora_B"), results, strict=True))

    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Name -> (the first rows by the fp64 reference, the tolerance rule's bound); sums over more rows left out."""
        if self._expected is None:
            want, want64 = self._reference(self.job.dtype), self._reference(torch.float64)
            self._expected = {
                name: (want64[name], bound(want[name], want64[name], self.job.dtype))
                for name in want
                if want[name].numel()
            }
        return self._expected

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        rows = min(self.job.M, _CHECKED_ROWS)
        x, dy, xa = (tensor[:rows].to(dtype) for tensor in (self.x, self.dy, self.xa))
        weight, lora_A, lora_B = (tensor.to(dtype) for tensor in (self.weight, self.lora_A, self.lora_B))
        if self.job.direction == "forward":
            results = reference.forward(x, weight, None, lora_A, lora_B, self.seed, _SCALE, self.dropout_p, 0)
            return dict(zip(("y", "xa"), results, strict=True))
        whole = rows == self.job.M
        results = reference.backward(
            dy, x, weight, lora_A, lora_B, xa, self.seed, None, None, _SCALE, self.dropout_p, 0, True, whole, whole
        )
        return dict(zip(("dx", "dlora_A", "dlora_B"), results, strict=True))


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty returns NaN: memory that holds the last plan's results must not pass for this one's."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def driver_version() -> str:
    """The NVIDIA kernel module's version; empty where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"NVRM version:.*?\s(\d+\.[\d.]+)\s", text)
    return found[1] if found else ""


def kernels_digest() -> str:
    """Names the code that was measured, whatever commit it is in."""
    digest = hashlib.sha256()
    for file in sorted(Path(kernels.__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def provenance(bench: DeviceBench) -> dict[str, str]:
    """What the times of a device depend on."""
    versions = info.versions()
    known = {name: versions[name] for name in ("torch", "triton", "lorasp", "commit")}
    return {
        "device": bench.target.name, "driver": driver_version(), "cuda": torch.version.cuda or "",
        "kernels": kernels_digest(), **known,
    }  # fmt: skip
