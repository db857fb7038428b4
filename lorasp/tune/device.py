"""The device that `lorasp tune` measures: the kernels' launchers, checked and timed without autograd.

Runs on a GPU, or under TRITON_INTERPRET=1 on CPU tensors, where times mean nothing.
"""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from lorasp import info
from lorasp.bench.timing import Clock, interleave, make_clock
from lorasp.testing.rule import error
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.launch import INTERPRETED, compiling
from lorasp.tune.operands import dropkey_attention, lora_linear, lora_linear_skinny
from lorasp.tune.search import Choice, DeviceLost, Job, Rejected

_OPERANDS = {
    "lora_linear": lora_linear.Operands,
    "dropkey_attention": dropkey_attention.Operands,
    "lora_linear_skinny": lora_linear_skinny.Operands,
}


class DeviceBench:
    """A search.Bench on one device; clock: what times a call there (default: as the benchmarks do)."""

    def __init__(self, device: torch.device, clock: Clock | None = None):
        self.device = device
        self.target = tuning.target_of_device(device)
        self._clock = clock or make_clock(device)
        self._operands = None

    def prepare(self, job: Job, choices: Sequence[Choice]) -> None:
        if not INTERPRETED:
            with self._refusals(f"compiling for {job}"):
                operands = self._operands_of(job)
                with compiling():
                    for choice in choices:
                        operands.call(choice)

    def verify(self, job: Job, choice: Choice) -> None:
        with self._refusals(f"{choice} at {job}"):
            operands = self._operands_of(job)
            with _poisoned():
                actual = operands.checked(choice)
            expected = operands.expected()
        for name, (want, allowed) in expected.items():
            have = error(operands.compared(actual[name]), want)
            if not have <= allowed:
                raise AssertionError(f"error {have:.3e} of {name} exceeds {allowed:.3e} at {job}")

    def samples(
        self, job: Job, choices: Sequence[Choice | None], rounds: int | None, seconds: float
    ) -> list[list[tuple[float, float]]]:
        with self._refusals(f"timing at {job}"):
            operands = self._operands_of(job)
            functions = [operands.base if choice is None else partial(operands.call, choice) for choice in choices]
            return interleave(operands.base, functions, self._clock, rounds, seconds)

    def _operands_of(self, job: Job):
        if self._operands is None or self._operands.job != job:
            self._operands = None  # freed before the next ones are made
            self._operands = _OPERANDS[job.operator](job, self.device)
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
    for file in sorted(Path(tuning.__file__).parent.glob("*.py")):
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
