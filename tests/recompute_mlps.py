"""The MLP of the recompute tests, and what one step of it gives."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorasp import LoRALinear, PartialConfig, SharedInput
from lorasp.memory import saved_bytes

M, H, I, R = 6, 16, 40, 3  # noqa: E741
SEED = 8
MODES = ("activation", "full")
KINDS = {
    "frozen": None,
    "LoRA": {},
    "LoRA-FA": {"freeze_A": True},
    "LoRA-SP": {"partial": PartialConfig()},
    "masters": {"adapter_dtype": torch.float32, "dtype": torch.bfloat16},
    "dropout": {"lora_dropout": 0.4},
}


class TinyMLP(nn.Module):
    """LLaMA's, over layers of any kind; gate and up are a SharedInput if they can be."""

    def __init__(self, kind: str = "LoRA", act: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"gate_proj": (H, I), "up_proj": (H, I), "down_proj": (I, H)}
        for name, (width, out) in sizes.items():
            if KINDS[kind] is None:
                layer = nn.Linear(width, out, bias=False).requires_grad_(False)
            else:
                layer = LoRALinear(width, out, bias=False, r=R, init_lora_weights=False, **KINDS[kind])
            setattr(self, name, layer)
        if KINDS[kind] is not None:
            SharedInput([self.gate_proj, self.up_proj])
            for layer in (self.gate_proj, self.up_proj):
                layer.share_selection("gate+up")
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class Block(nn.Module):
    def __init__(self, *arguments):
        super().__init__()
        self.mlp = TinyMLP(*arguments)

    def forward(self, x):
        return x + self.mlp(x)


def make_x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, M // 2, H), generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def run(model: nn.Module, x: Tensor, call: Callable | None = None) -> list[Tensor]:
    """Output, gradients of x and of all that trains, and where torch's generator stands after it all."""
    torch.manual_seed(5)
    y = (model if call is None else call)(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    for leaf in leaves:
        leaf.grad = None
    y.backward(torch.linspace(0.5, 2, y.numel()).reshape(y.shape).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves), torch.get_rng_state()]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(one, other), number


def kept(model: nn.Module, x: Tensor) -> int:
    return saved_bytes(lambda: model(x), exclude=model)
