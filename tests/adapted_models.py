"""A small model with two adapters: blocks with layers on one input, a tied weight, a norm with buffers, a head."""

import torch
from torch import nn

from lorasp import LoRAConfig, inject
from lorasp.models.adapted import adapted_layers

IN, OUT = 12, 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, IN) for _ in range(3))
        self.norm = nn.BatchNorm1d(IN)
        self.out = nn.Linear(IN, IN, bias=False)

    def forward(self, x):
        return self.out(self.norm(self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x)))


class Model(nn.Module):
    """Two blocks, an embedding tied to an adapted layer, and a head that an adapter may have in full."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embedding = nn.Embedding(IN, IN)
        self.embedding.weight = self.blocks[1].out.weight
        self.head = nn.Linear(IN, OUT)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.embedding(torch.zeros(len(x), dtype=torch.long)))


class Shared(nn.Module):
    """One module under two names, and a bias that two layers share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = self.b = nn.Linear(IN, IN)
        self.c, self.score = nn.Linear(IN, IN), nn.Linear(IN, 2)
        self.c.bias = self.a.bias

    def forward(self, x):
        return self.score(self.c(self.b(self.a(x))))


FIRST = LoRAConfig(r=3, target_modules=["q_proj", "v_proj", "out"], init_lora_weights=False, freeze_A=True)
SECOND = LoRAConfig(
    r=2, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, use_rslora=True,
    modules_to_save=["head", "norm"], bias="lora_only",
)  # fmt: skip
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


def both() -> Model:
    model = Model().eval()
    torch.manual_seed(2)
    inject(model, FIRST)
    inject(model, SECOND, "second")
    return model


def alone(config: LoRAConfig, model: nn.Module, name: str) -> Model:
    """A model with this adapter only, with the values it has in `model`."""
    single = Model().eval()
    inject(single, config)
    layers = adapted_layers(single)
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            layers[path].adapters["default"].load_state_dict(layer.adapters[name].state_dict())
    return single


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def base(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """The frozen model's Parameters, whatever else trains: the objects and where their bytes are."""
    layers = adapted_layers(model).items()
    return {name: (layer.weight, layer.weight.data_ptr(), layer.weight._version) for name, layer in layers}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()
