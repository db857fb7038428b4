"""lora_linear_group: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import Partial, lora_linear_group
from lorasp.ops import registry
from lorasp.testing import lora_linear
from lorasp.testing.lora_linear import backend_plans
from lorasp.testing.rule import CheckResult, compare

__all__ = [
    "DEFAULT_SHAPES", "SHAPE", "Case", "backend_plans", "cases", "check_case", "make_inputs", "plan_obstacle", "run",
]  # fmt: skip

SHAPE = ("M", "K", "N", "R")
DEFAULT_SHAPES = ((63, 129, 65, 8), (1, 64, 64, 16), (128, 640, 192, 16), (129, 63, 3, 3))
GRANULARITIES = (None, "feature", "feature-whole", "element")


@dataclass(frozen=True)
class Case:
    """One call: G members with N, N + 5, ... outputs and ranks R, R + 1, ...; which part of their factors trains.

    granularity: None all; "feature" half of the input and output features, packed; "feature-whole" the same with whole
    factors (resampling); "element" half of the entries, packed. frozen_B: the frozen part of B is not zero. masters:
    factors are fp32; with frozen_low, what trains alone.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    members: int = 1
    granularity: str | None = None
    frozen_B: bool = False
    bias: bool = True
    dropout_p: float = 0.0
    freeze_A: bool = False
    need_dx: bool = True
    masters: bool = False
    frozen_low: bool = False
    masks: bool = False
    keep_input: bool = False
    seed: int = 0

    def __str__(self) -> str:
        switches = ("frozen_B", "bias", "freeze_A", "masters", "frozen_low", "masks", "keep_input")
        words = [f"{self.M}x{self.K}x{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')} G={self.members}"]
        words += [self.granularity] * (self.granularity is not None)
        words += [name for name in switches if getattr(self, name)]
        words += [f"p={self.dropout_p:g}"] * (self.dropout_p > 0) + ["no dx"] * (not self.need_dx)
        return " ".join(words)


def _choose(count: int, generator: torch.Generator, block: int = 1) -> Tensor:
    """Half of `count` indices, at least one, in whole blocks."""
    blocks = -(-count // block)
    chosen = torch.randperm(blocks, generator=generator)[: max(1, blocks // 2)].sort().values
    indices = (chosen[:, None] * block + torch.arange(block)).flatten()
    return indices[indices < count]


def make_inputs(case: Case, device: str | torch.device = "cpu") -> dict:
    """Keyword arguments of lora_linear_group, and dys: the low-rank terms are as large as the frozen ones."""
    generator = torch.Generator().manual_seed(case.seed)
    members = [
        lora_linear.make_inputs(
            case.M, case.K, case.N + 5 * i, case.R + i, case.dtype, device, bias=case.bias and i != 1,
            masters=case.masters, masks=case.masks, seed=case.seed + i,
        )
        for i in range(case.members)
    ]  # fmt: skip
    inputs = {
        "x": members[0]["x"], "weights": [m["weight"] for m in members], "biases": [m["bias"] for m in members],
        "lora_As": [m["lora_A"] for m in members], "lora_Bs": [m["lora_B"] for m in members],
        "mask_As": [m["mask_A"] for m in members] if case.masks else None,
        "mask_Bs": [m["mask_B"] for m in members] if case.masks else None, "dys": [m["dy"] for m in members],
        "scales": [2.0 + i for i in range(case.members)], "partial": None,
    }  # fmt: skip
    if case.granularity is None:
        return inputs
    As, Bs = inputs["lora_As"], inputs["lora_Bs"]
    frozen_As, frozen_Bs = ([f.to(case.dtype) for f in fs] if case.frozen_low else list(fs) for fs in (As, Bs))
    nothing = [None] * case.members
    if case.granularity == "element":
        entries_B = [_choose(b.numel(), generator).to(device) for b in Bs]
        partial = Partial(frozen_Bs=frozen_Bs if case.frozen_B else None, entries_B=entries_B)
        inputs["lora_Bs"] = [b.flatten()[e] for b, e in zip(Bs, entries_B, strict=True)]
        if not case.freeze_A:
            entries_A = [_choose(a.numel(), generator).to(device) for a in As]
            inputs["lora_As"] = [a.flatten()[e] for a, e in zip(As, entries_A, strict=True)]
            partial = partial._replace(frozen_As=frozen_As, entries_A=entries_A)
    else:
        packed = case.granularity == "feature"
        rows = [_choose(b.shape[0], generator).to(device) for b in Bs]
        partial = Partial(frozen_Bs=frozen_Bs if case.frozen_B and packed else nothing, rows=rows)
        if packed:
            inputs["lora_Bs"] = [b[i] for b, i in zip(Bs, rows, strict=True)]
        if not case.freeze_A:
            columns = _choose(case.K, generator, 64 if case.K >= 512 else 1).to(device)
            partial = partial._replace(columns=columns, frozen_As=frozen_As if packed else nothing)
            if packed:
                inputs["lora_As"] = [a[:, columns] for a in As]
    return inputs | {"partial": partial}


def run(inputs: dict, case: Case, function=lora_linear_group) -> dict[str, Tensor]:
    """Outputs and gradients by name, without what is frozen: y0, y1, ..., dx, dlora_A0, ..., dlora_B0, ..."""
    inputs = dict(inputs)
    dys = inputs.pop("dys")
    leaves = {"x": inputs["x"].detach().requires_grad_(case.need_dx)} if case.need_dx else {}
    for name in ["lora_A"] * (not case.freeze_A) + ["lora_B"]:
        inputs[f"{name}s"] = [t.detach().requires_grad_() for t in inputs[f"{name}s"]]
        leaves |= {f"{name}{i}": t for i, t in enumerate(inputs[f"{name}s"])}
    inputs["x"] = leaves.get("x", inputs["x"].detach())
    ys = function(**inputs, dropout_p=case.dropout_p, seed=case.seed + 1, keep_input=case.keep_input)
    gradients = torch.autograd.grad(ys, list(leaves.values()), dys)
    outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
    return outputs | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def to_double(inputs: dict) -> dict:
    """The same inputs with every floating-point tensor in fp64."""

    def double(value):
        if isinstance(value, Partial):
            return Partial(*(double(field) for field in value))
        if isinstance(value, list | tuple):
            return [double(item) for item in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in inputs.items()}


def check_case(case: Case, backend: str, plan: str, device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend and plan, against the fp64 reference."""
    inputs = make_inputs(case, device)
    with registry.use_backend("reference"):
        reference64 = run(to_double(inputs), case)
        reference = run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("lora_linear_group", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int, int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield replace(plain, members=3)
            yield replace(plain, members=3, dropout_p=0.1, granularity="feature")
            yield replace(plain, granularity="feature", frozen_B=True, freeze_A=True)
            yield replace(plain, members=2, granularity="feature-whole", dropout_p=0.5, bias=False)
            yield replace(plain, members=2, granularity="element", frozen_B=True)
            if dtype.itemsize < 4:
                yield replace(plain, masters=True, granularity="feature", need_dx=False)
                yield replace(plain, masters=True, frozen_low=True, granularity="element", frozen_B=True)


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` refuses `plan` in `dtype` on this machine, by the smallest call; None where it takes it."""
    inputs = make_inputs(Case(1, 1, 1, 1, dtype), device)
    try:
        with registry.use_backend(backend, plan):
            lora_linear_group(inputs["x"], inputs["weights"], inputs["lora_As"], inputs["lora_Bs"])
    except (ValueError, NotImplementedError) as refusal:
        return str(refusal)
    return None
