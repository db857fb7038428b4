"""dropkey_attention's launchers, one gradient at a time: dq and dkv with what every backward prepares first."""

import torch
from torch import Tensor

from lorasp.reference import dropkey_attention as reference
from lorasp.triton_kernels import dropkey_attention as kernels
from lorasp.triton_kernels.tuning import Tiles, forced_tiles
from lorasp.tune.jobs.dropkey_attention import AttentionJob
from lorasp.tune.operands.checked import CheckedOperands

DROPOUT_P = 0.1
# Logits that the reference forms, of all heads where they are no more than these, else of the first head.
_CHECKED_LOGITS = 2**20
_NEEDED = {"dq": (True, False, False, False), "dkv": (False, True, True, False)}


class Operands(CheckedOperands):
    """The tensors of one job, as models have them: (B, S, H, D), transposed."""

    def __init__(self, job: AttentionJob, device: torch.device):
        super().__init__(job)
        generator = torch.Generator(device).manual_seed(0)
        self.q, self.k, self.v, self.do = (
            torch.randn(job.B, job.S, job.H, job.head_dim, dtype=job.dtype, device=device, generator=generator)
            .mul_(spread)
            .transpose(1, 2)
            for spread in (2, 1, 1, 1)
        )
        drops = job.logits != "plain"
        pattern = "element" if job.logits == "masked" else "column"
        seed = torch.tensor(1234, device=device) if drops else None
        self.arguments = None, seed, DROPOUT_P * drops, pattern, job.causal, job.head_dim**-0.5
        self.saved = kernels.forward(self.q, self.k, self.v, *self.arguments) if job.kernel != "forward" else None
        whole = job.B * job.H * job.S**2 <= _CHECKED_LOGITS
        self._batches, self._heads = (job.B, job.H) if whole else (1, 1)

    def base(self) -> dict[str, Tensor]:
        return self.call(Tiles())

    def call(self, tiles: Tiles) -> dict[str, Tensor]:
        kernel = self.job.kernel
        with forced_tiles("dropkey_attention", kernel, tiles):
            if kernel == "forward":
                results = kernels.forward(self.q, self.k, self.v, *self.arguments)
            else:
                results = kernels.backward(
                    self.do, self.q, self.k, self.v, *self.saved, *self.arguments, *_NEEDED[kernel]
                )
        return self._named(results)

    def _named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        if self.job.kernel == "forward":
            return {"o": results[0]}  # lse is −inf where a query sees nothing, and wrong only with the gradients
        return dict(zip(("dq", "dk", "dv", "dmask"), results, strict=True))

    def compared(self, actual: Tensor) -> Tensor:
        """All heads or the first one. Bits are counted from the first head on, so it is alone what it is among
        others."""
        return actual[: self._batches, : self._heads]

    def _reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v, do = (self.compared(tensor).to(dtype) for tensor in (self.q, self.k, self.v, self.do))
        o, lse = reference.forward(q, k, v, *self.arguments)
        if self.job.kernel == "forward":
            return self._named((o, lse))
        return self._named(reference.backward(do, q, k, v, o, lse, *self.arguments, *_NEEDED[self.job.kernel]))
