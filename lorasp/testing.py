"""Public: inputs, the tolerance rule and check(): what our tests, benchmarks and users' CI call.

The rule, everywhere: against an fp64 reference,
    max|out - ref64| <= 2 * max|ref_dtype - ref64| + 2 * eps(dtype) * max|ref64|
where dtype is the compute dtype (x's) and ref_dtype the plain PyTorch computation in it. Non-finite output fails.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorasp.functional import lora_linear
from lorasp.ops import registry

DEFAULT_SHAPES = ((63, 129, 65, 8), (1, 64, 64, 16), (128, 256, 192, 16), (129, 63, 1, 3))


@dataclass(frozen=True)
class CheckResult:
    """One tensor of one case: error and bound are absolute, in the tensor's own units."""

    op: str
    backend: str
    plan: str
    case: str
    tensor: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


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


def bound(reference: Tensor, reference64: Tensor, dtype: torch.dtype) -> float:
    """The tolerance rule's right-hand side."""
    if reference64.numel() == 0:
        return 0.0
    own_error = (reference.double() - reference64).abs().max().item()
    return 2 * own_error + 2 * torch.finfo(dtype).eps * reference64.abs().max().item()


def error(actual: Tensor, reference64: Tensor) -> float:
    """max|actual - reference64|; infinite if the shapes differ or anything is not finite."""
    if actual.shape != reference64.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    actual = actual.double()
    return (actual - reference64).abs().max().item() if actual.isfinite().all() else math.inf


def assert_close(actual: Tensor, reference: Tensor, reference64: Tensor, dtype: torch.dtype, what: str = "") -> None:
    """Raise AssertionError unless `actual` meets the tolerance rule."""
    have, allowed = error(actual, reference64), bound(reference, reference64, dtype)
    if not have <= allowed:
        raise AssertionError(f"{what}: error {have:.3e} exceeds {allowed:.3e} (shape {tuple(actual.shape)})")


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
) -> dict[str, Tensor | None]:
    """x, weight, lora_A, lora_B, bias, mask_A, mask_B and dy such that the low-rank term is as large as the frozen one.

    Otherwise a missing low-rank term would hide inside the frozen product's rounding. masters: lora_A, lora_B fp32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device, dtype)

    low_rank = torch.float32 if masters else dtype
    inputs = {
        "x": normal(M, K),
        "weight": normal(N, K, std=0.0 if zero_weight else K**-0.5),
        "lora_A": normal(R, K, std=K**-0.5).to(low_rank),
        "lora_B": normal(N, R, std=R**-0.5).to(low_rank),
        "bias": normal(N) if bias else None,
        "mask_A": torch.rand(R, K, generator=generator).lt(0.5).to(device) if masks else None,
        "mask_B": torch.rand(N, R, generator=generator).lt(0.5).to(device) if masks else None,
        "dy": normal(M, N),
    }
    return inputs


def run_lora_linear(inputs: dict, case: Case, function: Callable = lora_linear) -> dict[str, Tensor]:
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
        reference64 = run_lora_linear(inputs64, replace(case, dtype=torch.float64))
        reference = run_lora_linear(inputs, case)
    with registry.use_backend(backend, plan):
        actual = run_lora_linear(inputs, case)
    return [
        CheckResult(
            "lora_linear", backend, plan, str(case), name, error(actual[name], reference64[name]),
            bound(reference[name], reference64[name], case.dtype),
        )
        for name in reference64
    ]  # fmt: skip


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
    return {"reference": ("auto",), "cpp": ("addmm", "fused"), "auto": ("auto",)}.get(
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


def check(
    op: str = "lora_linear",
    backend: str = "auto",
    shapes: Iterable[tuple[int, int, int, int]] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: str | torch.device | None = None,
    plans: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Compare `backend` with the fp64 reference on this machine: outputs and every gradient, by the tolerance rule.

    shapes: (M, K, N, R) each, default a few odd and even ones; dtypes: default all the backend takes; device: default
    cuda where it is available; plans: default all of the backend's that this machine has for the dtype. Returns every
    comparison; all(r.ok for r in ...) is the verdict. Raises ValueError for an unknown op, an unavailable backend or a
    plan that it lacks.
    """
    if op != "lora_linear":
        raise ValueError(f"check: op must be lora_linear, got {op!r}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = tuple(shapes or DEFAULT_SHAPES)
    if dtypes is None:
        known = (torch.float32, torch.bfloat16, torch.float16)
        dtypes = [d for d in known if backend == "auto" or registry.unsupported(backend, device.type, d) is None]
        if not dtypes:
            raise ValueError(f"check: {registry.unsupported(backend, device.type, torch.float32)}")
    results = []
    for dtype in dtypes:
        chosen = plans
        if chosen is None:
            obstacles = {plan: plan_obstacle(backend, plan, dtype, device) for plan in backend_plans(backend)}
            chosen = [plan for plan, obstacle in obstacles.items() if obstacle is None]
            if not chosen:
                raise ValueError(f"check: {'; '.join(obstacles.values())}")
        for plan in chosen:
            for case in cases(shapes, [dtype]):
                results += check_case(case, backend, plan, device)
    return results
