"""What of a model is adapted: its LoRALinear layers, its adapters' configs, the tensors they train in full."""

from collections.abc import Iterable

from torch import nn

from lorasp.config import LoRAConfig
from lorasp.layers.lora_linear import LoRALinear


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by name; a shared one by its first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapter_configs(model: nn.Module) -> dict[str, LoRAConfig]:
    """The adapters in `model` by name; empty if it has none."""
    return vars(model).get("lorasp_configs") or {}


def active_adapter(model: nn.Module) -> str:
    """The active adapter of a model that has adapters."""
    layer = next(iter(adapted_layers(model).values()), None)
    if layer is None:
        raise ValueError(f"lorasp: {type(model).__name__} must have its LoRALinear layers still, all were replaced")
    return layer.active_adapter


def modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules config.modules_to_save names: those whose name ends so (PEFT's rule: mid-word too)."""
    ends, adapted = tuple(config.modules_to_save or ()), adapted_layers(model)
    named = model.named_modules(remove_duplicate=False)
    adapted = tuple(f"{name}." for name in adapted)
    return {name: module for name, module in named if name and name.endswith(ends) and not name.startswith(adapted)}


def whole_keys(model: nn.Module, config: LoRAConfig, layers: Iterable[str]) -> list[str]:
    """The names of the parameters and buffers that an adapter has in full: its biases and its modules_to_save.

    layers: the names of those it adapts.
    """
    if config.bias == "none" and not config.modules_to_save:
        return []
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    keys = []
    if config.bias == "lora_only":
        biases = {f"{name}.{bias}" for name in layers for bias in ("bias", "base_layer.bias")}
        keys += [name for name in parameters if name in biases]
    if config.bias == "all":
        keys += [name for name in parameters if name.rpartition(".")[2] == "bias"]
    for name, module in modules_to_save(model, config).items():
        keys += [f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)]
        keys += [f"{name}.{key}" for key in _persistent_buffers(module)]
    return list(dict.fromkeys(keys))


def unwrap(model: nn.Module) -> nn.Module:
    """The module below torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _persistent_buffers(module: nn.Module) -> list[str]:
    return [
        f"{name}.{key}" if name else key
        for name, part in module.named_modules(remove_duplicate=False)
        for key, buffer in part._buffers.items()
        if buffer is not None and key not in part._non_persistent_buffers_set
    ]
