"""hidden_cut: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import hidden_cut
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("B", "S", "F")
DEFAULT_SHAPES = ((2, 65, 129), (1, 1, 7), (3, 33, 256), (1, 130, 3000))


@dataclass(frozen=True)
class Case:
    """One call of hidden_cut. residual: the dtype of the residual, None for no residual."""

    B: int
    S: int
    F: int
    dtype: torch.dtype = torch.float32
    pattern: str = "element"
    p: float = 0.1
    residual: torch.dtype | None = None
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.B}x{self.S}x{self.F}", self.pattern, str(self.dtype).removeprefix("torch."), f"p={self.p:g}"]
        return " ".join(words + ["+ " + str(self.residual).removeprefix("torch.")] * (self.residual is not None))


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
    """x, residual and dy, of one size each, so that neither addend hides in the other's rounding."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(dtype):
        return torch.randn(case.B, case.S, case.F, generator=generator, dtype=torch.float64).to(device, dtype)

    summed = case.dtype if case.residual is None else torch.promote_types(case.dtype, case.residual)
    return {
        "x": normal(case.dtype),
        "residual": None if case.residual is None else normal(case.residual),
        "dy": normal(summed),
    }


def run(inputs: dict, case: Case, function: Callable = hidden_cut) -> dict[str, Tensor]:
    """y and the gradients of one case: {"y", "dx", "dresidual"}."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("x", "residual") if inputs[name] is not None}
    y = function(
        leaves["x"], case.p, pattern=case.pattern, residual=leaves.get("residual"), seed=case.seed + 1
    )  # fmt: skip
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def check_case(case: Case, backend: str, plan: str = "auto", device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend, against the fp64 reference."""
    inputs = make_inputs(case, device)
    inputs64 = {name: None if tensor is None else tensor.double() for name, tensor in inputs.items()}
    with registry.use_backend("reference"):
        reference64, reference = run(inputs64, case), run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("hidden_cut", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, p=0.5, residual=dtype)
            yield replace(plain, p=0.3, pattern="column", residual=torch.float32)
            yield replace(plain, p=0.3, pattern="span", residual=dtype)
            yield replace(plain, p=0.3, pattern="span")


def backend_plans(backend: str) -> tuple[str, ...]:
    """The operator has one way of ordering its work."""
    return ("auto",)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` cannot compute in `dtype` on this machine; None where it can."""
    if plan != "auto":
        return f"hidden_cut: plan must be auto, got {plan!r}"
    return None if backend == "auto" else registry.unsupported(backend, torch.device(device).type, dtype)
