"""A small network with PEFT's adapters in it, and a record of what ran fused."""

import warnings

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorasp.ops import lora_linear, lora_linear_group

M, K, N, R = 6, 12, 8, 3
HALF = torch.bfloat16


class Net(nn.Module):
    """A linear layer without bias, one with, and a Conv1D (weight stored (in, out))."""

    def __init__(self):
        super().__init__()
        self.plain, self.biased = nn.Linear(K, N, bias=False), nn.Linear(K, N)
        self.conv = transformers.pytorch_utils.Conv1D(N, K)
        nn.init.normal_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.biased(x) * self.conv(x)


LAYERS = ("plain", "biased", "conv")


def record_fused(monkeypatch) -> list[int]:
    """How many members each fused forward has that runs from now on."""
    calls = []
    for module, members in ((lora_linear, lambda a: 1), (lora_linear_group, lambda a: len(a[1]))):
        for backend, op in list(module.forward_ops.items()):
            monkeypatch.setitem(
                module.forward_ops, backend, lambda *a, op=op, n=members: (calls.append(n(a)), op(*a))[1]
            )
    return calls


def adapted(make=Net, dtype: torch.dtype = torch.float32, **config) -> PeftModel:
    torch.manual_seed(0)
    config = {"r": R, "lora_alpha": 7, "target_modules": list(LAYERS), "init_lora_weights": False} | config
    autocast_adapter_dtype = config.pop("autocast_adapter_dtype", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return get_peft_model(make().to(dtype), LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)


def make_x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, M // 2, K), generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
