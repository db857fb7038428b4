"""Public: check(), inputs and the tolerance rule: what our tests, benchmarks and users' CI call.

A module per operator, each with the same names: SHAPE (what a shape's numbers are), DEFAULT_SHAPES, cases(),
check_case(), backend_plans(), plan_obstacle().
"""

from collections.abc import Iterable

import torch

from lorasp.ops import registry
from lorasp.testing import (
    consistency,
    dropkey_attention,
    hidden_cut,
    linear_consistency,
    lora_linear,
    lora_linear_group,
    lora_update,
)
from lorasp.testing.lora_linear import Case, check_case, make_inputs
from lorasp.testing.rule import CheckResult, assert_close, bound, error

__all__ = ["OPERATORS", "Case", "CheckResult", "assert_close", "bound", "check", "check_case", "error", "make_inputs"]

OPERATORS = {
    "lora_linear": lora_linear,
    "lora_linear_group": lora_linear_group,
    "lora_update": lora_update,
    "dropkey_attention": dropkey_attention,
    "hidden_cut": hidden_cut,
    "consistency": consistency,
    "linear_consistency": linear_consistency,
}


def check(
    op: str = "lora_linear",
    backend: str = "auto",
    shapes: Iterable[tuple[int, ...]] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    device: str | torch.device | None = None,
    plans: Iterable[str] | None = None,
) -> list[CheckResult]:
    """Compare `backend` with the fp64 reference on this machine: outputs and every gradient, by the tolerance rule.

    op: a name of OPERATORS; shapes: as the operator's SHAPE says, default a few odd and even ones; dtypes: default all
    the backend takes; device: default cuda where it is available; plans: default all of the backend's that this machine
    has for the dtype. Returns every comparison; all(r.ok for r in ...) is the verdict. Raises ValueError for an unknown
    op, an unavailable backend or a plan that it lacks.
    """
    if op not in OPERATORS:
        raise ValueError(f"check: op must be one of {', '.join(OPERATORS)}, got {op!r}")
    operator = OPERATORS[op]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = tuple(shapes or operator.DEFAULT_SHAPES)
    if dtypes is None:
        known = (torch.float32, torch.bfloat16, torch.float16)
        dtypes = [d for d in known if backend == "auto" or registry.unsupported(backend, device.type, d) is None]
        if not dtypes:
            raise ValueError(f"check: {registry.unsupported(backend, device.type, torch.float32)}")
    results = []
    for dtype in dtypes:
        chosen = plans
        if chosen is None:
            obstacles = {
                plan: operator.plan_obstacle(backend, plan, dtype, device) for plan in operator.backend_plans(backend)
            }
            chosen = [plan for plan, obstacle in obstacles.items() if obstacle is None]
            if not chosen:
                raise ValueError(f"check: {'; '.join(obstacles.values())}")
        for plan in chosen:
            for case in operator.cases(shapes, [dtype]):
                results += operator.check_case(case, backend, plan, device)
    return results
