"""Several adapters in one model: which one acts, none for a while, merged into the weights, taken out again."""

import contextlib
from collections.abc import Iterator

from torch import nn

from lorasp.layers.lora_linear import LoRALinear
from lorasp.layers.quantized_linear import QuantizedLoRALinear
from lorasp.models.adapted import active_adapter, adapted_layers, adapter_configs, unwrap
from lorasp.models.mlps import undo_recompute_mlp
from lorasp.models.plan import HOOKS
from lorasp.models.whole_tensors import BASE, CHILD, whole_tensors


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Let one of the model's adapters act and train; the others neither act nor require grad.

    Nothing of the base is copied. Layers this adapter does not have run as they were before any adapter;
    modules_to_save and biases change to its own. What is frozen of an adapter (freeze_A, what LoRA-SP does not select)
    stays frozen. Make the optimizer of all parameters it is to train: it goes on where it was when an adapter comes
    back. A state_dict loads where the same adapter is active; save_adapter writes any. Raises ValueError, with nothing
    changed, for an unknown name, while an adapter is merged or disabled, and for a model in DistributedDataParallel.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "set_adapter: model must not be wrapped in DistributedDataParallel, which averages the gradients of what "
            "trained when it was wrapped; pass the module inside, then wrap it again"
        )
    model = _with_adapters("set_adapter", model)
    _check_name("set_adapter", model, adapter_name)
    layers = adapted_layers(model)
    _check_plain("set_adapter", layers)
    whole_tensors(model).switch(model, adapter_name, "set_adapter")
    whole_tensors(model).train_in_force(model)
    for layer in layers.values():
        layer.set_adapter(adapter_name)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model is what it was before any adapter, to the bit; nothing changes requires_grad.

    Merged layers use the weight that was kept. Raises ValueError if one was merged with keep_base=False. Not for use
    while another thread runs the model.
    """
    model = _with_adapters("disable_adapter", model)
    layers = [layer for layer in adapted_layers(model).values() if layer.enabled]
    for layer in layers:
        layer.base_weight()
    active = active_adapter(model)
    whole_tensors(model).switch(model, BASE, "disable_adapter")
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
        if layers:
            whole_tensors(model).switch(model, active, "disable_adapter")


def merge(model: nn.Module, *, keep_base: bool = True) -> None:
    """Put the active adapter into the weights: every adapted layer then costs what the frozen one did.

    Each layer gets a new weight W + s B A, summed in float32 and rounded once to W's dtype; the old one is kept as it
    is, so unmerge is exact to the bit and tied weights keep their values. keep_base=False lets go of the old weights
    layer by layer, for good. A and B do not train while merged (biases and modules_to_save do); save_adapter still
    writes the adapter.

    Raises ValueError, with nothing changed (keep_base=False: nothing of the layer at fault and those after it), if an
    adapter is merged or disabled, weights are sharded, or W + s B A is not finite.
    """
    model = _with_adapters("merge", model)
    layers = adapted_layers(model)
    _check_plain("merge", layers)
    merged: list[LoRALinear] = []
    for name, layer in layers.items():
        if layer.active_adapter not in layer.adapters:
            continue
        try:
            layer.merge(keep_base=keep_base)
        except ValueError as error:
            for done in merged if keep_base else ():
                done.unmerge()
            raise ValueError(f"{error} ({name})") from None
        merged.append(layer)


def unmerge(model: nn.Module) -> None:
    """Undo merge, to the bit. Raises ValueError, with nothing changed, if nothing is merged or keep_base was False."""
    layers = [layer for layer in adapted_layers(_with_adapters("unmerge", model)).values() if layer.merged_adapter]
    if not layers:
        raise ValueError("unmerge: an adapter must be merged, none is")
    for layer in layers:
        layer.base_weight()
    for layer in layers:
        layer.unmerge()


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter that is not the active one, and what it trains in full. Layers that have none left stay.

    Raises ValueError for an unknown name and for the active adapter (set_adapter another one first, or unload all).
    """
    model = _with_adapters("delete_adapter", model)
    _check_name("delete_adapter", model, adapter_name)
    if adapter_name == active_adapter(model):
        raise ValueError(f"delete_adapter: adapter_name must not be the active one, {adapter_name!r} is")
    for layer in adapted_layers(model).values():
        if adapter_name in layer.adapters:
            del layer.adapters[adapter_name]
    whole_tensors(model).remove(adapter_name)
    del model.lorasp_configs[adapter_name]


def unload(model: nn.Module) -> None:
    """Take every adapter out, in place: nn.Linear and Conv1D layers as before inject(), nothing left of lorasp.

    After merge(model) the layers keep the merged weights, biases and modules_to_save what the adapter made of them;
    otherwise the model is again what it was before any adapter, to the bit. Hooks and training mode stay, and so does
    what apply_hiddenkey and recompute_mlp were called for (LoRAConfig(recompute_mlp=...) is undone). Nothing requires
    grad. Raises ValueError while disabled.
    """
    model = _with_adapters("unload", model)
    layers = adapted_layers(model)
    if disabled := [name for name, layer in layers.items() if not layer.enabled]:
        raise ValueError(f"unload: the adapters must not be disabled, {disabled[0]} is")
    if not any(layer.merged_adapter for layer in layers.values()):
        whole_tensors(model).switch(model, BASE, "unload")
    if any(config.recompute_mlp for config in adapter_configs(model).values()):
        undo_recompute_mlp(model)
    plain = {layer: _plain(layer) for layer in layers.values()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in plain:
                setattr(parent, name, plain[child])
    del model.lorasp_configs
    if hasattr(model, CHILD):
        delattr(model, CHILD)


def _plain(layer: LoRALinear) -> nn.Module:
    """The frozen layer alone, as the module it was; its weight and bias are the layer's own Parameters."""
    plain = _frozen_module(layer)
    for hooks in HOOKS:
        setattr(plain, hooks, getattr(layer, hooks))
    return plain.train(layer.training)


def _frozen_module(layer: LoRALinear) -> nn.Module:
    if isinstance(layer, QuantizedLoRALinear):
        return layer.base_layer
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        plain = Conv1D(1, 1)
        plain.nf, plain.nx = layer.out_features, layer.in_features
    else:
        plain = nn.Linear(1, 1, bias=layer.bias is not None)
        plain.in_features, plain.out_features = layer.in_features, layer.out_features
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _with_adapters(where: str, model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    root = unwrap(model)
    if not adapter_configs(root):
        raise ValueError(
            f"{where}: {type(root).__name__} has no adapter of its own; pass the model given to inject() or to "
            "load_adapter()"
        )
    return root


def _check_name(where: str, model: nn.Module, adapter_name: str) -> None:
    if not isinstance(adapter_name, str) or adapter_name not in adapter_configs(model):
        names = ", ".join(adapter_configs(model))
        raise ValueError(f"{where}: adapter_name must be one of {names}, got {adapter_name!r}")


def _check_plain(where: str, layers: dict[str, LoRALinear]) -> None:
    for name, layer in layers.items():
        if layer.merged_adapter is not None:
            raise ValueError(
                f"{where}: no adapter must be merged, {layer.merged_adapter!r} is in {name}; unmerge first"
            )
        if not layer.enabled:
            raise ValueError(f"{where}: the adapters must not be disabled, {name} is")
