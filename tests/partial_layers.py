"""LoRA-SP layers of one size, with values in every entry."""

import torch
from torch import nn

from lorasp import LoRALinear, PartialConfig

K, N, R = 40, 24, 4
GRANULARITIES = ("feature", "element", "rank")
WITH_FREEZE_A = [
    *((granularity, freeze_A) for granularity in GRANULARITIES for freeze_A in (False, True)),
    ("matrix", False),
]
RESAMPLES = ("never", "epoch")


def layer_with_values(granularity="feature", resample="never", ratio=0.5, seed=0, **arguments) -> LoRALinear:
    """A layer whose low-rank term is as large as the frozen one, the frozen entries of B included."""
    torch.manual_seed(0)
    partial = PartialConfig(ratio, granularity, resample, seed)
    sizes = (arguments.pop("in_features", K), arguments.pop("out_features", N))
    return LoRALinear(*sizes, r=R, lora_alpha=2 * R, init_lora_weights=False, partial=partial, **arguments)


def width(seed: int) -> int:
    """How many of 1000 columns train: the last block of 64 is a short one."""
    return int(layer_with_values(in_features=1000, seed=seed).adapters.default.columns.numel())


def masks(layer: LoRALinear) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.trainable_mask_A(), layer.trainable_mask_B()


def trained(layer: LoRALinear) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]
