"""consistency: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import consistency_loss
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("rows", "V")
DEFAULT_SHAPES = ((63, 129), (5, 1), (64, 2), (9, 5000), (2, 32003))


@dataclass(frozen=True)
class Case:
    """One call of consistency_loss, reduction "none".

    needs: which side takes a gradient; masks: a row mask; hidden: a quarter of the vocabulary is -inf on both sides;
    spread: the logits' standard deviation; distance: the one of their difference; offset: added to `other`.
    """

    rows: int
    V: int
    dtype: torch.dtype = torch.float32
    kind: str = "kl"
    needs: str = "both"
    masks: bool = False
    hidden: bool = False
    spread: float = 3.0
    distance: float = 1.0
    offset: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.rows}x{self.V}", self.kind, str(self.dtype).removeprefix("torch.")]
        words += [f"d{self.needs}"] * (self.needs != "both") + ["masks"] * self.masks + ["hidden"] * self.hidden
        words += [f"{name}={getattr(self, name):g}" for name in ("spread", "distance", "offset")
                  if getattr(self, name) != getattr(Case, name)]  # fmt: skip
        return " ".join(words)


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict[str, Tensor | None]:
    """logits, other, mask and drows."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = case.rows, case.V
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * case.spread
    other = logits + torch.randn(shape, generator=generator, dtype=torch.float64) * case.distance + case.offset
    if case.hidden:
        unused = torch.rand(case.V, generator=generator) < 0.25
        unused[0] = False
        logits, other = (side.masked_fill(unused, -torch.inf) for side in (logits, other))
    mask = torch.rand(case.rows, generator=generator) < 0.6 if case.masks else None
    drows = torch.randn(case.rows, generator=generator, dtype=torch.float64)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    return {
        "logits": logits.to(device, case.dtype),
        "other": other.to(device, case.dtype),
        "mask": None if mask is None else mask.to(device),
        "drows": drows.to(device, wide),
    }


def run(inputs: dict, case: Case, function: Callable = consistency_loss) -> dict[str, Tensor]:
    """rows and the gradients of one case: {"rows", "dlogits", "dother"}, without what is not needed."""
    wanted = [name for name in ("logits", "other") if case.needs in ("both", name)]
    arguments = {name: inputs[name].detach().requires_grad_(name in wanted) for name in ("logits", "other")}
    rows = function(**arguments, kind=case.kind, mask=inputs["mask"], reduction="none")
    gradients = torch.autograd.grad(rows, [arguments[name] for name in wanted], inputs["drows"])
    return {"rows": rows.detach()} | {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def in_float64(inputs: dict) -> dict:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in inputs.items()}


def check_case(case: Case, backend: str, plan: str = "auto", device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend, against the fp64 reference."""
    inputs = make_inputs(case, device)
    with registry.use_backend("reference"):
        reference64, reference = run(in_float64(inputs), case), run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("consistency", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, kind="js", needs="logits", masks=True)
            yield replace(plain, kind="js", hidden=True)
            yield replace(plain, needs="other", hidden=True, masks=True, spread=20.0, distance=5.0)
            yield replace(plain, distance=0.05, offset=30.0)


def backend_plans(backend: str) -> tuple[str, ...]:
    """The operator has one way of ordering its work."""
    return ("auto",)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` cannot compute in `dtype` on this machine; None where it can."""
    if plan != "auto":
        return f"consistency: plan must be auto, got {plan!r}"
    return None if backend == "auto" else registry.unsupported(backend, torch.device(device).type, dtype)
