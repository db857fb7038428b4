"""LoRA-SP spelled out: dense LoRA under autograd, with the gradients and AdamW's moments masked entry by entry."""

import torch
from torch import Tensor, nn

from lorasp import LoRALinear

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.99), 1e-6, 0.1


class Entry:
    """One dense factor and AdamW's state of every entry of it."""

    def __init__(self, value: Tensor):
        self.value = value.requires_grad_()
        self.exp_avg, self.exp_avg_sq, self.steps = (torch.zeros_like(value) for _ in range(3))

    def step(self, active: Tensor, lr: float) -> None:
        """AdamW where active, with that entry's own count of steps; nothing elsewhere."""
        grad = self.value.grad
        with torch.no_grad():
            self.steps += active
            m = BETAS[0] * self.exp_avg + (1 - BETAS[0]) * grad
            v = BETAS[1] * self.exp_avg_sq + (1 - BETAS[1]) * grad**2
            m_hat, v_hat = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
            new = self.value * (1 - lr * WEIGHT_DECAY) - lr * m_hat / (v_hat.sqrt() + EPS)
            for have, value in ((self.exp_avg, m), (self.exp_avg_sq, v), (self.value, new)):
                have.copy_(torch.where(active, value, have))
        self.value.grad = None


class Oracle:
    """The layer's values in dtype; trained by step()."""

    def __init__(self, layer: LoRALinear, dtype: torch.dtype):
        self.weight, self.bias, self.scale = layer.weight.to(dtype), layer.bias.to(dtype), layer.scale
        self.A, self.B = (Entry(factor.detach().clone().to(dtype)) for factor in (layer.lora_A, layer.lora_B))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.scale * (x @ self.A.value.t() @ self.B.value.t())

    def step(self, x: Tensor, target: Tensor, mask_A: Tensor, mask_B: Tensor, lr: float) -> None:
        dtype = self.weight.dtype
        loss(self.forward(x.to(dtype)), target.to(dtype)).backward()
        self.A.step(mask_A, lr)
        self.B.step(mask_B, lr)


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def batches(count: int, rows: int, layer: LoRALinear, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    sizes = layer.in_features, layer.out_features
    return [tuple(torch.randn(rows, size, generator=generator).to(dtype) for size in sizes) for _ in range(count)]
