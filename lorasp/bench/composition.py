"""LoRA over a frozen layer as one writes it by hand for speed: the library's GEMMs and an in-place low-rank update."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class ComposedLoRA(nn.Module):
    """y = x Wᵀ + bias + s D(x) Aᵀ Bᵀ, each product one GEMM of cuBLAS (on a CPU: of MKL or oneDNN), the low-rank one
    added in place by addmm_.

    What an expert gets without a kernel, and the yardstick of plan addmm: backward keeps x (A frozen: x Aᵀ only) and,
    with dropout, the mask as M·K bytes. D is torch's own dropout.
    """

    def __init__(self, frozen: nn.Linear, lora_A: Tensor, lora_B: Tensor, scale: float, dropout_p: float):
        super().__init__()
        self.frozen, self.scale, self.dropout_p = frozen, scale, dropout_p
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)

    def forward(self, x: Tensor) -> Tensor:
        p = self.dropout_p if self.training else 0.0
        return _Composition.apply(x, self.frozen.weight, self.frozen.bias, self.lora_A, self.lora_B, self.scale, p)


class _Composition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale, dropout_p):
        kept, mask = torch.native_dropout(x, dropout_p, True) if dropout_p else (x, None)
        y = linear(x, weight, bias)
        xa = (kept @ lora_A.t()).mul_(scale)
        y.addmm_(xa, lora_B.t())
        ctx.save_for_backward(x if lora_A.requires_grad else None, weight, lora_A, lora_B, xa, mask)
        ctx.scale, ctx.rescale = scale, 1 / (1 - dropout_p)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, xa, mask = ctx.saved_tensors
        g = (dy @ lora_B).mul_(ctx.scale)
        dx = dlora_A = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            if mask is None:
                dx.addmm_(g, lora_A)
            else:
                dx.addcmul_(g @ lora_A, mask, value=ctx.rescale)
        if ctx.needs_input_grad[3]:
            kept = x if mask is None else x.mul(mask).mul_(ctx.rescale)
            dlora_A = g.t() @ kept
        return dx, None, None, dlora_A, dy.t() @ xa, None, None
