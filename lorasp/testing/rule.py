"""The tolerance rule, everywhere: against an fp64 reference,
    max|out - ref64| <= 2 * max|ref_dtype - ref64| + 2 * eps(dtype) * max|ref64|
where dtype is the compute dtype (x's) and ref_dtype the plain PyTorch computation in it. Non-finite output fails.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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


def compare(
    op: str,
    backend: str,
    plan: str,
    case: object,
    actual: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    reference64: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> list[CheckResult]:
    """Every tensor of one case by the rule."""
    return [
        CheckResult(
            op, backend, plan, str(case), name, error(actual[name], exact), bound(reference[name], exact, dtype)
        )
        for name, exact in reference64.items()
    ]  # fmt: skip
