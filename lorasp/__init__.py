"""lorasp: fused LoRA kernels for PyTorch, with a pure-PyTorch reference behind every operator."""

from lorasp.adapter.partial import resample, select
from lorasp.config import HiddenKeyConfig, LoRAConfig, PartialConfig
from lorasp.files.checkpoint import load_adapter, save_adapter
from lorasp.functional import (
    PackedWeight,
    Partial,
    consistency_loss,
    dropkey_attention,
    hidden_cut,
    linear_consistency_loss,
    lora_linear,
    lora_linear_group,
    lora_update,
    pack_weight,
)
from lorasp.integrations.hiddenkey import HiddenKeyResult, hiddenkey_step
from lorasp.integrations.peft import AccelerateReport, accelerate, restore
from lorasp.integrations.transformers import HiddenKeyReport, apply_hiddenkey, remove_hiddenkey
from lorasp.layers.lora_linear import LoRALinear
from lorasp.layers.quantized import frozen_base
from lorasp.layers.quantized_linear import QuantizedLoRALinear, quantized_lora_linear
from lorasp.layers.shared_input import SharedInput
from lorasp.models.adapters import delete_adapter, disable_adapter, merge, set_adapter, unload, unmerge
from lorasp.models.inject import InjectReport, inject
from lorasp.models.mlps import RecomputeReport, recompute_mlp, undo_recompute_mlp
from lorasp.models.processes import check_processes
from lorasp.ops.registry import available_backends, use_backend
from lorasp.optim import LoRAFAAdamW, PartialAdamW

__version__ = "0.1.0"

__all__ = [
    "AccelerateReport",
    "HiddenKeyConfig",
    "HiddenKeyReport",
    "HiddenKeyResult",
    "InjectReport",
    "LoRAConfig",
    "LoRAFAAdamW",
    "LoRALinear",
    "PackedWeight",
    "Partial",
    "PartialAdamW",
    "PartialConfig",
    "QuantizedLoRALinear",
    "RecomputeReport",
    "SharedInput",
    "accelerate",
    "apply_hiddenkey",
    "available_backends",
    "check_processes",
    "consistency_loss",
    "delete_adapter",
    "disable_adapter",
    "dropkey_attention",
    "frozen_base",
    "hidden_cut",
    "hiddenkey_step",
    "inject",
    "linear_consistency_loss",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "lora_update",
    "merge",
    "pack_weight",
    "quantized_lora_linear",
    "recompute_mlp",
    "remove_hiddenkey",
    "resample",
    "restore",
    "save_adapter",
    "select",
    "set_adapter",
    "undo_recompute_mlp",
    "unload",
    "unmerge",
    "use_backend",
]
