"""Public functions, a file per operator: validate, choose a backend, call the operator."""

from lorasp.functional.consistency import consistency_loss, linear_consistency_loss
from lorasp.functional.dropkey_attention import dropkey_attention
from lorasp.functional.hidden_cut import hidden_cut
from lorasp.functional.lora_linear import PackedWeight, lora_linear, pack_weight
from lorasp.functional.lora_linear_group import Partial, lora_linear_group
from lorasp.functional.lora_update import lora_update

__all__ = [
    "PackedWeight",
    "Partial",
    "consistency_loss",
    "dropkey_attention",
    "hidden_cut",
    "linear_consistency_loss",
    "lora_linear",
    "lora_linear_group",
    "lora_update",
    "pack_weight",
]
