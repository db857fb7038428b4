"""PEFT's LoRA layers over quantised weights, with their forward through quantized_lora_linear."""

import torch
from peft.tuners.lora import bnb, torchao
from torch import Tensor, nn

from lorasp.integrations.peft_linear import Factors, FusedLayer, add_others, plain
from lorasp.layers.lora_linear import DTYPES
from lorasp.layers.quantized import FrozenBase, frozen_base
from lorasp.layers.quantized_linear import quantized_lora_linear


class FusedQuantized(FusedLayer):
    """A LoRA layer of PEFT's over a quantised weight: the quantiser's product and dx, the low-rank part in place.

    Each runs alone: groups on one input are for plain weights. Merging is PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        acting = () if args or kwargs else self._acting()
        base = frozen_base(self.base_layer) if acting else None
        if not isinstance(base, FrozenBase) or not self._serves(x, base, acting):
            self.hold()
            return super().forward(x, *args, **kwargs)
        first = acting[0]
        y = quantized_lora_linear(
            x, base, first.lora_A, first.lora_B, scale=first.scale, dropout_p=first.dropout_p
        )  # fmt: skip
        return add_others(y, x, acting[1:])

    def _serves(self, x: Tensor, base: FrozenBase, acting: tuple[Factors, ...]) -> bool:
        """Whether lorasp computes PEFT's function of x: for a half-precision factor PEFT rounds a wider x."""
        if not plain(x, acting) or x.dtype not in DTYPES or x.device != base.device:
            return False
        factors = {factor.dtype for adapter in acting for factor in adapter[:2]}
        return factors <= ({x.dtype, torch.float32} if self.cast_input_dtype_enabled else {x.dtype})

    def _misfit(self, *factors: torch.dtype) -> None:
        return None


# Class statements, so that pickle finds them; PEFT has the first two where bitsandbytes is installed.
FUSED: dict[type[nn.Module], type[FusedQuantized]] = {}

if hasattr(bnb, "Linear4bit"):

    class FusedLinear4bit(FusedQuantized, bnb.Linear4bit):
        """PEFT's lora.Linear4bit, fused."""

    FUSED[bnb.Linear4bit] = FusedLinear4bit

if hasattr(bnb, "Linear8bitLt"):

    class FusedLinear8bitLt(FusedQuantized, bnb.Linear8bitLt):
        """PEFT's lora.Linear8bitLt, fused."""

    FUSED[bnb.Linear8bitLt] = FusedLinear8bitLt


class FusedTorchao(FusedQuantized, torchao.TorchaoLoraLinear):
    """PEFT's TorchaoLoraLinear, fused."""


FUSED[torchao.TorchaoLoraLinear] = FusedTorchao


def obstacle(layer: nn.Module) -> str | None:
    """Why this layer of PEFT's over a quantised base cannot be fused, whatever its adapters; None if it can."""
    if "forward" in vars(layer):
        return "it was given a forward of its own"
    base = frozen_base(layer.base_layer)
    if base is None:
        return f"its base layer {type(layer.base_layer).__name__} is not quantised"
    return base if isinstance(base, str) else None
