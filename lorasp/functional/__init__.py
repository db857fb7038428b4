"""Public functions, a file per operator: validate, choose a backend, call the operator."""

from lorasp.functional.lora_linear import PackedWeight, lora_linear, pack_weight

__all__ = ["PackedWeight", "lora_linear", "pack_weight"]
