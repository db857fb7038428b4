"""The rank-R products of lora_linear, each kernel alone with the reduction that its tiles bring.

project        h = scale·(keep∘p) q      p (M, C), q (R, C) as lora_A lies: xa of the forward
outer          out = (keep∘p)ᵀ h         as lora_A's gradient (R, C)
project_outer  g = scale·p q, dB = pᵀ h  q (C, R) as lora_B lies: one pass over dy
accumulate     out += keep∘(h q)         as dx takes g A
"""

import torch
from torch import Tensor

from lorasp import rng
from lorasp.triton_kernels import lora_linear_products as products
from lorasp.triton_kernels.launch import device_of, target_of
from lorasp.triton_kernels.tuning import Tiles, forced_tiles
from lorasp.tune.jobs.lora_linear_skinny import RankJob
from lorasp.tune.operands.checked import CheckedOperands

DROPOUT_P = 0.1
_SCALE = 2.0


class Operands(CheckedOperands):
    """The tensors of one job; accumulate adds to memory of its own again and again when it is timed."""

    def __init__(self, job: RankJob, device: torch.device):
        super().__init__(job)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, dtype=job.dtype, device=device, generator=generator)

        self.p, self.h, self.q = normal(job.M, job.C), normal(job.M, job.R), normal(job.R, job.C)
        self.seed = torch.tensor(1234, device=device)
        self.dropout = products.Dropout(self.seed, rng.threshold(DROPOUT_P) if job.dropout else 0, 0)
        self.sum = self.p.clone() if job.kernel == "accumulate" else None

    def base(self) -> dict[str, Tensor]:
        return self._run(Tiles(), self.sum)

    def call(self, tiles: Tiles) -> dict[str, Tensor]:
        return self._run(tiles, self.sum)

    def _run(self, tiles: Tiles, total: Tensor | None) -> dict[str, Tensor]:
        job, target = self.job, target_of(self.p)
        with forced_tiles("lora_linear_skinny", job.kernel, tiles), device_of(self.p):
            if job.kernel == "project":
                return {"h": products.project(self.p, self.q, _SCALE, self.dropout, target, rank_first=True)}
            if job.kernel == "outer":
                return {"out": products.outer(self.p, self.h, job.dtype, None, self.dropout, target, rank_first=True)}
            if job.kernel == "project_outer":
                g, dB = products.project_outer(
                    self.p, self.q.view(job.C, job.R), self.h, _SCALE, None, job.dtype, target
                )
                return {"g": g, "dB": dB}
            products.accumulate(total, self.h, self.q, self.dropout, target, rank_first=True)
            return {"out": total}

    def checked(self, tiles: Tiles) -> dict[str, Tensor]:
        """What call() gives, accumulate onto fresh memory."""
        return self._run(tiles, self.p.clone())

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        job = self.job
        p, h, q = (tensor.to(dtype) for tensor in (self.p, self.h, self.q))
        keep = rng.keep_mask(self.seed, (job.M, job.C), DROPOUT_P, rng.PURPOSE_LORA_DROPOUT) if job.dropout else None
        kept = torch.where(keep, p, 0) if job.dropout else p
        if job.kernel == "project":
            return {"h": kept @ q.t() * _SCALE}
        if job.kernel == "outer":
            return {"out": h.t() @ kept}
        if job.kernel == "project_outer":
            return {"g": p @ q.view(job.C, job.R) * _SCALE, "dB": p.t() @ h}
        product = h @ q
        return {"out": p + (torch.where(keep, product, 0) if job.dropout else product)}
