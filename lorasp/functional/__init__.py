"""Public functions, a file per operator: validate, choose a backend, call the operator."""

from lorasp.functional.dropkey_attention import dropkey_attention
from lorasp.functional.lora_linear import PackedWeight, lora_linear, pack_weight
from lorasp.functional.lora_linear_group import Partial, lora_linear_group

__all__ = ["PackedWeight", "Partial", "dropkey_attention", "lora_linear", "lora_linear_group", "pack_weight"]
