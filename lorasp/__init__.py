"""lorasp: fused LoRA kernels for PyTorch, with a pure-PyTorch reference behind every operator."""

from lorasp.checkpoint import load_adapter, save_adapter
from lorasp.config import HiddenKeyConfig, LoRAConfig, PartialConfig
from lorasp.functional import (
    PackedWeight,
    Partial,
    consistency_loss,
    dropkey_attention,
    hidden_cut,
    linear_consistency_loss,
    lora_linear,
    lora_linear_group,
    pack_weight,
)
from lorasp.inject import InjectReport, inject
from lorasp.integrations.hiddenkey import HiddenKeyResult, hiddenkey_step
from lorasp.integrations.peft import AccelerateReport, accelerate, restore
from lorasp.integrations.transformers import HiddenKeyReport, apply_hiddenkey, remove_hiddenkey
from lorasp.nn import LoRALinear
from lorasp.ops.registry import available_backends, use_backend
from lorasp.optim import LoRAFAAdamW, PartialAdamW
from lorasp.partial import resample, select
from lorasp.shared_input import SharedInput

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
    "SharedInput",
    "accelerate",
    "apply_hiddenkey",
    "available_backends",
    "consistency_loss",
    "dropkey_attention",
    "hidden_cut",
    "hiddenkey_step",
    "inject",
    "linear_consistency_loss",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "pack_weight",
    "remove_hiddenkey",
    "resample",
    "restore",
    "save_adapter",
    "select",
    "use_backend",
]
