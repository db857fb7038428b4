"""lora_update: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import lora_update
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("M", "K", "N", "R")
DEFAULT_SHAPES = ((63, 129, 65, 8), (1, 64, 64, 16), (128, 256, 192, 16), (129, 63, 1, 3))


@dataclass(frozen=True)
class Case:
    """One call of lora_update: sizes, dtypes and what is switched on."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    dropout_p: float = 0.0
    freeze_A: bool = False
    freeze_B: bool = False
    need_dx: bool = True
    masters: bool = False
    scale: float = 2.0
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in ("freeze_A", "freeze_B", "masters") if getattr(self, name)]
        words += [f"p={self.dropout_p:g}"] * (self.dropout_p > 0) + ["no dx"] * (not self.need_dx)
        return " ".join(words)


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """y, x, lora_A, lora_B and dy such that the update is as large as what it is added to."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, case.dtype)

    low_rank = torch.float32 if case.masters else case.dtype
    return {
        "y": normal(case.M, case.N),
        "x": normal(case.M, case.K),
        "lora_A": normal(case.R, case.K, std=case.K**-0.5).to(low_rank),
        "lora_B": normal(case.N, case.R, std=case.R**-0.5).to(low_rank),
        "dy": normal(case.M, case.N),
    }


def run(inputs: dict, case: Case, function: Callable = lora_update) -> dict[str, Tensor]:
    """y and the gradients of one case: {"y", "dx", "dlora_A", "dlora_B"}, without what is frozen."""
    leaves = {"x": case.need_dx, "lora_A": not case.freeze_A, "lora_B": not case.freeze_B}
    arguments = {name: inputs[name].detach().requires_grad_(needed) for name, needed in leaves.items()}
    y = inputs["y"].clone(memory_format=torch.preserve_format)
    y = function(y, **arguments, scale=case.scale, dropout_p=case.dropout_p, seed=case.seed + 1)
    wanted = [name for name, needed in leaves.items() if needed]
    gradients = torch.autograd.grad(y, [arguments[name] for name in wanted], inputs["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def check_case(case: Case, backend: str, plan: str = "auto", device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend, against the fp64 reference."""
    inputs = make_inputs(case, device)
    inputs64 = {name: tensor.double() for name, tensor in inputs.items()}
    with registry.use_backend("reference"):
        reference64 = run(inputs64, replace(case, dtype=torch.float64))
        reference = run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("lora_update", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int, int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, freeze_A=True, dropout_p=0.5)
            if dtype.itemsize < 4:
                yield replace(plain, masters=True, dropout_p=0.1)


def backend_plans(backend: str) -> tuple[str, ...]:
    """The operator has one way of ordering its work."""
    return ("auto",)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` cannot compute in `dtype` on this machine; None where it can."""
    if plan != "auto":
        return f"lora_update: plan must be auto, got {plan!r}"
    return None if backend == "auto" else registry.unsupported(backend, torch.device(device).type, dtype)
