"""lora_linear's launchers.

forward    y, xa of lora_linear                 ÷ torch.nn.functional.linear(x, weight)
backward   dx, dlora_A, dlora_B of lora_linear  ÷ dy @ weight, the frozen nn.Linear's dx
"""

import torch
from torch import Tensor

from lorasp.reference import lora_linear as reference
from lorasp.testing import make_inputs
from lorasp.triton_kernels import lora_linear as kernels
from lorasp.triton_kernels.tuning import Plan
from lorasp.tune.jobs.lora_linear import Job
from lorasp.tune.operands.checked import CheckedOperands

DROPOUT_P = 0.1
_SCALE = 2.0
# The reference forms its mask in int64.
_CHECKED_ROWS = 8192


class Operands(CheckedOperands):
    """The tensors of one job, drawn on its device; what the reference makes of them is computed once."""

    def __init__(self, job: Job, device: torch.device):
        super().__init__(job)
        generator = torch.Generator(device).manual_seed(0)
        inputs = make_inputs(job.M, job.K, job.N, job.R, job.dtype, device, bias=False, generator=generator)
        self.x, self.weight, self.lora_A, self.lora_B, self.dy = (
            inputs[name] for name in ("x", "weight", "lora_A", "lora_B", "dy")
        )
        self.xa = torch.randn(job.M, job.R, dtype=job.dtype, device=device, generator=generator)
        self.seed = torch.tensor(1234, device=device) if job.dropout else None
        self.dropout_p = DROPOUT_P if job.dropout else 0.0

    def base(self) -> Tensor:
        if self.job.direction == "forward":
            return torch.nn.functional.linear(self.x, self.weight)
        return torch.mm(self.dy, self.weight)

    def call(self, plan: Plan) -> dict[str, Tensor]:
        if self.job.direction == "forward":
            results = kernels.forward(
                self.x, self.weight, None, self.lora_A, self.lora_B, self.seed, _SCALE, self.dropout_p, 0, plan
            )
            return dict(zip(("y", "xa"), results, strict=True))
        results = kernels.backward(
            self.dy, self.x, self.weight, self.lora_A, self.lora_B, self.xa, self.seed, None, None, _SCALE,
            self.dropout_p, 0, True, True, True, plan,
        )  # fmt: skip
        return dict(zip(("dx", "dlora_A", "dlora_B"), results, strict=True))

    def compared(self, actual: Tensor) -> Tensor:
        """The first rows: a row does not depend on those behind it."""
        return actual[:_CHECKED_ROWS]

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        rows = min(self.job.M, _CHECKED_ROWS)
        x, dy, xa = (tensor[:rows].to(dtype) for tensor in (self.x, self.dy, self.xa))
        weight, lora_A, lora_B = (tensor.to(dtype) for tensor in (self.weight, self.lora_A, self.lora_B))
        if self.job.direction == "forward":
            results = reference.forward(x, weight, None, lora_A, lora_B, self.seed, _SCALE, self.dropout_p, 0)
            return dict(zip(("y", "xa"), results, strict=True))
        whole = rows == self.job.M
        results = reference.backward(
            dy, x, weight, lora_A, lora_B, xa, self.seed, None, None, _SCALE, self.dropout_p, 0, True, whole, whole
        )
        return dict(zip(("dx", "dlora_A", "dlora_B"), results, strict=True))
