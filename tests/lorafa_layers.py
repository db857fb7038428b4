"""Layers whose A is frozen, and what LoRA-FA's correction makes of their gradient."""

import copy

import torch
from partial_oracle import batches, loss
from torch import Tensor, nn

from lorasp import LoRAConfig, LoRALinear, inject

K, N, R = 40, 24, 4


def frozen(**arguments) -> LoRALinear:
    torch.manual_seed(0)
    return LoRALinear(K, N, **({"r": R, "lora_alpha": 3 * R, "freeze_A": True, "init_lora_weights": False} | arguments))


def factor_B(layer: nn.Module) -> nn.Parameter:
    (parameter,) = layer.adapters[layer.active_adapter].parameters()
    return parameter


def backward(layer: LoRALinear, rows: int = 16) -> Tensor:
    """Give the layer gradients; returns that of its whole weight, in fp64."""
    ((x, target),) = batches(1, rows, layer, layer.weight.dtype)
    loss(layer(x), target).backward()
    twin = copy.deepcopy(layer).double().requires_grad_(True)
    twin.zero_grad()
    loss(twin(x.double()), target.double()).backward()
    return twin.weight.grad


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, K, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class Net(nn.Module):
    """Two adapted layers and a head that trains whole."""

    def __init__(self, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(K, 32), nn.Linear(32, 16), nn.Linear(16, 8)
        config = {"r": R, "target_modules": ["first", "second"], "freeze_A": True, "init_lora_weights": False}
        inject(self, LoRAConfig(**(config | {"modules_to_save": ["head"], "bias": "lora_only"} | arguments)))

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def same(one: nn.Module, other: nn.Module) -> bool:
    return not changed(values(one), other)
