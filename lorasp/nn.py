"""The layers, under the name people look for them: modules over lorasp.functional."""

from lorasp.layers.lora_linear import LoRALinear
from lorasp.layers.quantized_linear import QuantizedLoRALinear
from lorasp.layers.shared_input import SharedInput

__all__ = ["LoRALinear", "QuantizedLoRALinear", "SharedInput"]
