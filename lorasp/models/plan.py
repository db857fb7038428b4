"""What an injection will do, checked and built without touching the model."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lorasp.adapter.adapter import Adapter
from lorasp.adapter.partial_adapter import PartialAdapter
from lorasp.config import ALL_LINEAR, LoRAConfig, layer_index, matches_end, matches_names
from lorasp.layers.adapted import check_adapter_name
from lorasp.layers.lora_linear import DEFAULT_ADAPTER, DTYPES, LoRALinear, is_conv1d
from lorasp.layers.quantized import frozen_base
from lorasp.layers.quantized_linear import QuantizedLoRALinear
from lorasp.models.adapted import adapted_layers, adapter_configs, modules_to_save
from lorasp.models.inputs import kept_inputs, shared_inputs
from lorasp.models.mlps import find_mlps
from lorasp.models.whole_tensors import CHILD
from lorasp.sharding import is_sharded

# Their fused kernels read out_proj.weight itself, past any adapter (PEFT refuses the same).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass
class Plan:
    """What an injection will do; made without touching the model."""

    model: nn.Module
    config: LoRAConfig
    adapter: str = DEFAULT_ADAPTER
    layers: dict[str, LoRALinear] = field(default_factory=dict)  # new ones, and those that get one adapter more
    adapters: dict[str, Adapter] = field(default_factory=dict)
    groups: list[list[LoRALinear]] = field(default_factory=list)
    kept: dict[str, bool] = field(default_factory=dict)
    places: list[tuple[nn.Module, str, LoRALinear]] = field(default_factory=list)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module, config: LoRAConfig, where: str, adapter: str = DEFAULT_ADAPTER, *, strict: bool = True
) -> Plan:
    """Everything inject() checks and builds. strict: every name in config must fit something (files may be looser)."""
    check_adapter_name(where, adapter)
    _check_fresh(model, adapter, where)
    if config.target_modules is None:
        raise ValueError(f"{where}: target_modules is not set; {_what_exists(model)}")
    plan = Plan(model, config, adapter, saved=modules_to_save(model, config))
    adapted = adapted_layers(model)
    named = model.named_modules(remove_duplicate=False)
    own = (*(name for name in adapted), CHILD)
    modules = {name: module for name, module in named if name in adapted or not _inside(name, own)}
    if strict:
        _check_names(model, modules, config, where)
    _check_saved(model, plan.saved, adapted, where)
    targets = _targets(plan, modules, where)
    if not targets:
        reasons = "".join(f", {n} {why}" for why, n in Counter(plan.skipped.values()).items())
        if config.layers_to_transform is not None:
            reasons += " (set layers_pattern if the numbered list has no name before it but its own)"
        raise ValueError(
            f"{where}: no layer is left to adapt: target_modules {_shown(config.target_modules)}{reasons}; "
            f"{_what_exists(model)}"
        )
    peers = tuple({modules[name]: name for name in reversed(targets)}.values())
    names: dict[nn.Module, str] = {}
    for name in targets:
        first = names.setdefault(modules[name], name)
        if first != name:
            plan.skipped[name] = f"the same module as {first}"
            continue
        module, layer_config = modules[name], config.for_module(name)
        if isinstance(module, LoRALinear):
            plan.layers[name] = module
            plan.adapters[name] = module.make_adapter(layer_config, name, peers)
            continue
        kind = LoRALinear if frozen_base(module) is None else QuantizedLoRALinear
        layer = plan.layers[name] = kind.beside(module, layer_config, name, peers, adapter)
        plan.adapters[name] = layer.adapters[adapter]
        for hooks in HOOKS:
            setattr(layer, hooks, getattr(module, hooks))
    for name, module in modules.items():
        if module in names and not isinstance(module, LoRALinear):
            parent, _, child = name.rpartition(".")
            plan.places.append((modules[parent], child, plan.layers[names[module]]))
    if strict:
        _check_patterns(plan, where)
    for shared, members in shared_inputs(modules, plan.layers, config, where).items():
        links = {id(layer.shared_input): layer.shared_input for layer in members.values()}
        linked = {layer for link in links.values() if link is not None for layer in link.members}
        # Links among some of these layers give way to one among all; a link that goes beyond them stays.
        if linked <= set(members.values()) and (None in links.values() or len(links) > 1):
            plan.groups.append(list(members.values()))
        for name in members:
            if isinstance(plan.adapters[name], PartialAdapter):
                plan.adapters[name].share(shared)
    if config.recompute_mlp:
        find_mlps(model, f"{where}: recompute_mlp")
    plan.kept = kept_inputs(model, modules, plan.layers)
    return plan


def _check_fresh(model: nn.Module, adapter: str, where: str) -> None:
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(f"{where}: model must not be sharded yet; put adapters in first, then call fully_shard")
    adapted, configs = adapted_layers(model), adapter_configs(model)
    if adapted and not configs:
        raise ValueError(
            f"{where}: the model has LoRALinear layers that inject() did not put there, such as {next(iter(adapted))}"
        )
    holders = [name for name, layer in adapted.items() if adapter in layer.adapters]
    if adapter in configs or holders:
        raise ValueError(
            f"{where}: the model has an adapter {adapter!r} already, in {len(holders)} layers such as "
            f"{next(iter(holders), None)}; give this one another name, or delete_adapter(model, {adapter!r})"
        )
    if merged := [name for name, layer in adapted.items() if layer.merged_adapter is not None]:
        raise ValueError(f"{where}: the adapters must not be merged, {merged[0]} is; unmerge(model) first")
    if disabled := [name for name, layer in adapted.items() if not layer.enabled]:
        raise ValueError(f"{where}: the adapters must not be disabled, {disabled[0]} is")
    for name, module in model.named_modules():
        if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
            raise ValueError(f"{where}: the model carries PEFT's own layers ({name or 'itself'}); pass the base model")


def _check_names(model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig, where: str) -> None:
    def unknown(names, fits):
        return [name for name in names or () if not any(fits(name, path) for path in modules if path)]

    targets = config.target_modules
    if not isinstance(targets, str) and (missing := unknown(targets, lambda name, path: matches_names([name], path))):
        raise ValueError(f"{where}: target_modules {missing} name no module of {_kind(model)}; {_what_exists(model)}")
    if missing := unknown(config.modules_to_save, lambda name, path: path.endswith(name)):
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{where}: modules_to_save {missing} name no module of {_kind(model)}; its parts: {children}")
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        missing = unknown([exclude], matches_names)
    else:
        missing = unknown(exclude, lambda name, path: matches_names([name], path))
    if missing:
        warnings.warn(f"{where}: exclude_modules {missing} name no module of {_kind(model)}", stacklevel=4)


def _check_patterns(plan: Plan, where: str) -> None:
    for field_name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(plan.config, field_name)
        if missing := [key for key in keys if not any(matches_end(key, name) for name in plan.layers)]:
            raise ValueError(f"{where}: {field_name} keys {missing} fit no adapted layer")


def _check_saved(model: nn.Module, saved: dict[str, nn.Module], adapted: dict[str, LoRALinear], where: str) -> None:
    """Modules trained in full must be able to, and must not drag a frozen one along (PEFT would untie it)."""
    if inside := [name for name in adapted if _inside(name, saved)]:
        raise ValueError(
            f"{where}: modules_to_save must not hold layers that another adapter adapts, such as {inside[0]}"
        )
    for name, module in saved.items():
        for key, child in module.named_modules(prefix=name):
            if frozen_base(child) is not None:
                raise ValueError(f"{where}: modules_to_save must be able to train: {key} is a quantised layer")
        for key, parameter in module.named_parameters():
            if not parameter.is_floating_point():
                raise ValueError(f"{where}: modules_to_save must be able to train: {name}.{key} is {parameter.dtype}")
    owned = {id(parameter): f"{name}.{key}" for name, m in saved.items() for key, parameter in m.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owned and not _inside(name, saved):
            raise ValueError(
                f"{where}: modules_to_save must name both ends of a tied weight: {owned[id(parameter)]} is also {name}"
            )


def _targets(plan: Plan, modules: dict[str, nn.Module], where: str) -> list[str]:
    """Names of the layers to adapt; fills plan.skipped; raises if a named layer cannot carry an adapter."""
    model, config = plan.model, plan.config
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    heads = _output_heads(model) if everything else ()
    targets, unsupported = [], {}
    for name, module in modules.items():
        if everything:
            wanted = _looks_linear(module)
        else:
            wanted = name and matches_names(config.target_modules, name)
        if not wanted:
            continue
        obstacle = _obstacle(model, modules, name)
        if config.exclude_modules and matches_names(config.exclude_modules, name):
            plan.skipped[name] = "in exclude_modules"
        elif _inside(name, plan.saved):
            plan.skipped[name] = "in modules_to_save"
        elif config.layers_to_transform is not None and (
            layer_index(name, config.layers_pattern) not in config.layers_to_transform
        ):
            plan.skipped[name] = "not in layers_to_transform"
        elif module in heads:
            plan.skipped[name] = "output head"
        elif obstacle is None:
            targets.append(name)
        elif everything:
            plan.skipped[name] = obstacle
        else:
            unsupported[name] = obstacle
    whole = getattr(model, CHILD, ())
    if taken := [name for name in targets if f"{name}.weight" in whole]:
        raise ValueError(
            f"{where}: target_modules must not name what another adapter trains in full, such as {taken[0]}"
        )
    if unsupported:
        named = "; ".join(f"{name}: {why}" for name, why in unsupported.items())
        raise ValueError(f"{where}: target_modules name layers that cannot carry an adapter: {named}")
    return targets


def _obstacle(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    """Why this module cannot be replaced by a LoRALinear; None if it can."""
    module, kind = modules[name], _kind(modules[name])
    if isinstance(module, LoRALinear):
        return None
    parent_name, _, child = name.rpartition(".")
    if not name:
        return "is the model itself (use LoRALinear.from_linear)"
    base = frozen_base(module)
    if isinstance(base, str):
        return base
    if base is None and (obstacle := _plain_obstacle(module)):
        return obstacle
    if "forward" in vars(module):
        return f"{kind} has a forward of its own"
    parent = modules[parent_name]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{_kind(parent)} reads its weight directly, past any adapter"
    if child == "out_proj" and getattr(getattr(model, "config", None), "model_type", None) in _MAMBA:
        return "Mamba's kernels read its weight directly, past any adapter"
    return None


def _plain_obstacle(module: nn.Module) -> str | None:
    """What a layer that is not quantised lacks to carry an adapter."""
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"{_kind(module)} is not a linear layer"
    plain = nn.Linear if isinstance(module, nn.Linear) else type(module)
    if type(module).forward is not plain.forward:
        return f"{_kind(module)} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not stored (parametrised)"
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    return None


def _looks_linear(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear | LoRALinear) or is_conv1d(module)
    return known or ("Linear" in _kind(module) and not any(True for _ in module.children()))


def _output_heads(model: nn.Module) -> list[nn.Module]:
    """The output embeddings of every transformers model inside, which "all-linear" leaves alone."""
    heads = [m.get_output_embeddings() for m in model.modules() if callable(getattr(m, "get_output_embeddings", None))]
    return [head for head in heads if head is not None]


def _inside(name: str, containers) -> bool:
    return any(name == container or name.startswith(f"{container}.") for container in containers)


def _what_exists(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    ends = sorted({name.rpartition(".")[2] for name in modules if name and _obstacle(model, modules, name) is None})
    ends = [end for end in ends if not re.fullmatch(r"\d+", end)] or ends
    return f"its linear layers are named: {', '.join(ends)}" if ends else f"{_kind(model)} has no linear layer to adapt"


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _shown(names) -> str:
    return repr(names if isinstance(names, str) else list(names))
