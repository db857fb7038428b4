"""linear_consistency: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import linear_consistency_loss
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("rows", "H", "V")
DEFAULT_SHAPES = ((63, 40, 129), (1, 1, 1), (37, 16, 3000))


@dataclass(frozen=True)
class Case:
    """One call of linear_consistency_loss. needs: which of hidden, other_hidden, lm_head, bias take a gradient."""

    rows: int
    H: int
    V: int
    dtype: torch.dtype = torch.float32
    kind: str = "kl"
    reduction: str = "batchmean"
    needs: tuple[str, ...] = ("hidden", "other_hidden", "lm_head")
    bias: bool = False
    masks: bool = False
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.H}x{self.V}", self.kind, str(self.dtype).removeprefix("torch."), self.reduction]
        words += ["bias"] * self.bias + ["masks"] * self.masks
        return " ".join([*words, "d(" + ", ".join(self.needs) + ")"])


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
    """hidden, other_hidden, lm_head, bias, mask and dloss; logits spread over a few units."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape, std=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    hidden = normal(case.rows, case.H)
    floats = {
        "hidden": hidden,
        "other_hidden": hidden + normal(case.rows, case.H, std=0.5),
        "lm_head": normal(case.V, case.H, std=3 * case.H**-0.5),
        "bias": normal(case.V) if case.bias else None,
    }
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    dloss = normal(case.rows) if case.reduction == "none" else normal(1)[0] * case.rows
    mask = torch.rand(case.rows, generator=generator) < 0.6 if case.masks else None
    return {name: None if t is None else t.to(device, case.dtype) for name, t in floats.items()} | {
        "mask": None if mask is None else mask.to(device),
        "dloss": dloss.to(device, wide),
    }


def run(inputs: dict, case: Case, function: Callable = linear_consistency_loss) -> dict[str, Tensor]:
    """loss and the gradients of one case, named after what they belong to."""
    names = ("hidden", "other_hidden", "lm_head", "bias")
    arguments = {
        name: None if inputs[name] is None else inputs[name].detach().requires_grad_(name in case.needs)
        for name in names
    }
    loss = function(**arguments, kind=case.kind, mask=inputs["mask"], reduction=case.reduction)
    gradients = torch.autograd.grad(loss, [arguments[name] for name in case.needs], inputs["dloss"])
    return {"loss": loss.detach()} | {f"d{name}": grad for name, grad in zip(case.needs, gradients, strict=True)}


def check_case(case: Case, backend: str, plan: str = "auto", device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend, against the fp64 reference."""
    inputs = make_inputs(case, device)
    inputs64 = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}
    with registry.use_backend("reference"):
        reference64, reference = run(inputs64, case), run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("linear_consistency", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, kind="js", needs=("hidden",), masks=True, reduction="mean")
            yield replace(plain, bias=True, masks=True, reduction="none", needs=("hidden", "lm_head", "bias"))


def backend_plans(backend: str) -> tuple[str, ...]:
    """The operator has one way of ordering its work."""
    return ("auto",)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` cannot compute in `dtype` on this machine; None where it can."""
    if plan != "auto":
        return f"linear_consistency: plan must be auto, got {plan!r}"
    return None if backend == "auto" else registry.unsupported(backend, torch.device(device).type, dtype)
