"""lora_linear: its inputs, its cases, and one case against the fp64 reference."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import lora_linear
from lorasp.ops import registry
from lorasp.testing.rule import CheckResult, compare

SHAPE = ("M", "K", "N", "R")
DEFAULT_SHAPES = ((63, 129, 65, 8), (1, 64, 64, 16), (128, 256, 192, 16), (129, 63, 1, 3))


@dataclass(frozen=True)
class Case:
    """One call of lora_linear: sizes, dtypes and what is switched on."""

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    dropout_p: float = 0.0
    freeze_A: bool = False
    need_dx: bool = True
    masters: bool = False
    masks: bool = False
    zero_weight: bool = False
    scale: float = 2.0
    seed: int = 0

    def __str__(self) -> str:
        switches = ("bias", "freeze_A", "masters", "masks", "zero_weight")
        words = [f"{self.M}x{self.K}x{self.N} r{self.R} {str(self.dtype).removeprefix('torch.')}"]
        words += [name for name in switches if getattr(self, name)]
        words += [f"p={self.dropout_p:g}"] * (self.dropout_p > 0) + ["no dx"] * (not self.need_dx)
        return " ".join(words)


def make_inputs(
    M: int,
    K: int,
    N: int,
    R: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    bias: bool = True,
    masters: bool = False,
    masks: bool = False,
    zero_weight: bool = False,
    seed: int = 0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor | None]:
    """x, weight, lora_A, lora_B, bias, mask_A, mask_B and dy such that the low-rank term is as large as the frozen one.

    Otherwise a missing low-rank term would hide inside the frozen product's rounding. masters: lora_A, lora_B fp32.
    generator: draws on its own device; by default one on the CPU, seeded, so that every device gets the same numbers.
    """
    generator = generator or torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "device": generator.device}

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, **draw, dtype=torch.float64) * std).to(device, dtype)

    low_rank = torch.float32 if masters else dtype
    inputs = {
        "x": normal(M, K),
        "weight": normal(N, K, std=0.0 if zero_weight else K**-0.5),
        "lora_A": normal(R, K, std=K**-0.5).to(low_rank),
        "lora_B": normal(N, R, std=R**-0.5).to(low_rank),
        "bias": normal(N) if bias else None,
        "mask_A": torch.rand(R, K, **draw).lt(0.5).to(device) if masks else None,
        "mask_B": torch.rand(N, R, **draw).lt(0.5).to(device) if masks else None,
        "dy": normal(M, N),
    }
    return inputs


def run(inputs: dict, case: Case, function: Callable = lora_linear) -> dict[str, Tensor]:
    """y and the gradients of one case: {"y", "dx", "dlora_A", "dlora_B"}, without what is frozen."""
    leaves = {
        "x": case.need_dx,
        "lora_A": not case.freeze_A,
        "lora_B": True,
    }
    arguments = {
        name: tensor.detach().requires_grad_(leaves.get(name, False)) if tensor is not None else None
        for name, tensor in inputs.items()
        if name != "dy"
    }
    y = function(**arguments, scale=case.scale, dropout_p=case.dropout_p, seed=case.seed + 1)
    wanted = [name for name, needed in leaves.items() if needed]
    gradients = torch.autograd.grad(y, [arguments[name] for name in wanted], inputs["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def check_case(case: Case, backend: str, plan: str, device: str | torch.device = "cpu") -> list[CheckResult]:
    """Every output of one case on one backend and plan, against the fp64 reference."""
    inputs = make_inputs(
        case.M, case.K, case.N, case.R, case.dtype, device, bias=case.bias, masters=case.masters, masks=case.masks,
        zero_weight=case.zero_weight, seed=case.seed,
    )  # fmt: skip
    inputs64 = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    with registry.use_backend("reference"):
        reference64 = run(inputs64, replace(case, dtype=torch.float64))
        reference = run(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run(inputs, case)
    return compare("lora_linear", backend, plan, case, actual, reference, reference64, case.dtype)


def cases(shapes: Iterable[tuple[int, int, int, int]], dtypes: Iterable[torch.dtype]) -> Iterator[Case]:
    """The variants check() runs on every shape and dtype."""
    for dtype in dtypes:
        for sizes in shapes:
            plain = Case(*sizes, dtype=dtype)
            yield plain
            yield replace(plain, bias=False, freeze_A=True, zero_weight=True, dropout_p=0.5)
            yield replace(plain, masks=True, dropout_p=0.1)
            if dtype.itemsize < 4:
                yield replace(plain, masters=True, need_dx=False)


def backend_plans(backend: str) -> tuple[str, ...]:
    """The plans a backend knows."""
    return {"reference": ("auto",), "cpp": ("addmm", "fused"), "cuda": ("addmm",), "auto": ("auto",)}.get(
        backend, ("addmm", "fused", "onepass")
    )


def plan_obstacle(backend: str, plan: str, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` refuses `plan` in `dtype` on this machine, by the smallest call; None where it takes it."""
    inputs = make_inputs(1, 1, 1, 1, dtype, device)
    try:
        with registry.use_backend(backend, plan):
            lora_linear(inputs["x"], inputs["weight"], inputs["lora_A"], inputs["lora_B"])
    except ValueError as error:
        return str(error)
    return None
