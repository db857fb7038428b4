"""Put adapters into a model in place: everything is checked first, then everything is changed."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from lorasp.config import ALL_LINEAR, LoRAConfig, layer_index, matches_end, matches_names
from lorasp.model_inputs import mark_kept_inputs, shared_inputs
from lorasp.nn import DEFAULT_ADAPTER, DTYPES, LoRALinear, is_conv1d
from lorasp.sharding import is_sharded
from lorasp.shared_input import SharedInput

# Their fused kernels read out_proj.weight itself, past any adapter (PEFT refuses the same).
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class InjectReport:
    """What inject() did: the adapted layers' names, the skipped ones with the reason, and parameter counts.

    groups: names of layers that read one input and run as one operator (SharedInput).

    trainable, total: numbers of parameters, each tensor once; total counts frozen entries of A and B too.
    """

    adapted: tuple[str, ...]
    skipped: dict[str, str]
    trainable: int
    total: int
    groups: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.adapted)
        groups = Counter("+".join(name.rpartition(".")[2] for name in group) for group in self.groups)
        lines = [
            f"lorasp: {len(self.adapted)} layers adapted: {', '.join(f'{kind} x{n}' for kind, n in kinds.items())}",
            f"trainable parameters: {self.trainable:,} of {self.total:,} ({self.trainable / self.total:.2%})",
        ]
        if groups:
            lines.append(f"one operator per input: {', '.join(f'{names} x{n}' for names, n in groups.items())}")
        return "\n".join(lines + [f"skipped {name}: {why}" for name, why in self.skipped.items()])


@dataclass
class Plan:
    """What an injection will do; made without touching the model."""

    model: nn.Module
    config: LoRAConfig
    layers: dict[str, LoRALinear] = field(default_factory=dict)
    places: list[tuple[nn.Module, str, LoRALinear]] = field(default_factory=list)
    saved: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def inject(model: nn.Module, config: LoRAConfig) -> InjectReport:
    """Replace the targeted linear layers of `model` by LoRALinear, in place, and freeze everything else.

    Weights and biases are shared, not copied; training mode and forward/backward hooks are kept. A layer that stands
    under several names is adapted once, under all of them. config.modules_to_save train in full, where they stand.
    config.bias says which biases train.

    Raises ValueError or TypeError, with the model as it was, if a target names nothing, names a layer that cannot carry
    an adapter (quantised, parametrised, read past its forward), if nothing is left to adapt, or if there are adapters
    already. "all-linear" skips such layers and the output head, and the report says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"inject: config must be a LoRAConfig, got {type(config).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("inject: model must not be wrapped in DistributedDataParallel yet; inject first, then wrap")
    return install(make_plan(unwrap(model), config, "inject"))


def install(plan: Plan) -> InjectReport:
    """Carry out a plan."""
    model, bias = plan.model, plan.config.bias
    model.requires_grad_(False)
    for parent, name, layer in plan.places:
        setattr(parent, name, layer)
    for layer in plan.layers.values():
        layer.adapters.requires_grad_(True)
        if bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    if bias == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.rpartition(".")[2] == "bias")
    for module in plan.saved.values():
        module.requires_grad_(True)
    model.lorasp_configs = {DEFAULT_ADAPTER: plan.config}
    return report(model, plan.skipped)


def report(model: nn.Module, skipped: dict[str, str]) -> InjectReport:
    """The report on a model as it is now."""
    layers = adapted_layers(model)
    parameters = list(model.parameters())
    adapters = [a for layer in layers.values() for a in layer.adapters.values()]
    factors = sum(a.r * (a.in_features + a.out_features) for a in adapters)
    standing = {p for a in adapters for p in a.parameters()}
    return InjectReport(
        adapted=tuple(layers),
        skipped=skipped,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters if p not in standing) + factors,
        groups=shared_groups(layers),
    )


def shared_groups(layers: dict[str, LoRALinear]) -> tuple[tuple[str, ...], ...]:
    """The names of the layers each SharedInput links; one layer alone is no group."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.shared_input is not None:
            groups.setdefault(id(layer.shared_input), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by name; a shared one by its first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules config.modules_to_save names: those whose name ends so (PEFT's rule: mid-word too)."""
    ends, adapted = tuple(config.modules_to_save or ()), adapted_layers(model)
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if name and name.endswith(ends) and not _inside(name, adapted)}


def make_plan(model: nn.Module, config: LoRAConfig, where: str, *, strict: bool = True) -> Plan:
    """Everything inject() checks and builds. strict: every name in config must fit something (files may be looser)."""
    _check_fresh(model, where)
    if config.target_modules is None:
        raise ValueError(f"{where}: target_modules is not set; {_what_exists(model)}")
    plan = Plan(model, config, saved=modules_to_save(model, config))
    modules = dict(model.named_modules(remove_duplicate=False))
    if strict:
        _check_names(model, modules, config, where)
    _check_saved(model, plan.saved, where)
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
        plan.layers[name] = LoRALinear.beside(modules[name], config.for_module(name), name, peers)
        for hooks in _HOOKS:
            setattr(plan.layers[name], hooks, getattr(modules[name], hooks))
    for name, module in modules.items():
        if module in names:
            parent, _, child = name.rpartition(".")
            plan.places.append((modules[parent], child, plan.layers[names[module]]))
    if strict:
        _check_patterns(plan, where)
    for shared, members in shared_inputs(modules, plan.layers, config, where).items():
        SharedInput(list(members.values()))
        for layer in members.values():
            layer.share_selection(shared)
    mark_kept_inputs(model, modules, plan.layers)
    return plan


def _check_fresh(model: nn.Module, where: str) -> None:
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(f"{where}: model must not be sharded yet; put adapters in first, then call fully_shard")
    if adapted := list(adapted_layers(model)):
        raise ValueError(f"{where}: the model has adapters already, in {len(adapted)} layers such as {adapted[0]}")
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
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


def _check_saved(model: nn.Module, saved: dict[str, nn.Module], where: str) -> None:
    """Modules trained in full must be able to, and must not drag a frozen one along (PEFT would untie it)."""
    for name, module in saved.items():
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
    if unsupported:
        named = "; ".join(f"{name}: {why}" for name, why in unsupported.items())
        raise ValueError(f"{where}: target_modules name layers that cannot carry an adapter: {named}")
    return targets


def _obstacle(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    """Why this module cannot be replaced by a LoRALinear; None if it can."""
    module, kind = modules[name], _kind(modules[name])
    parent_name, _, child = name.rpartition(".")
    if not name:
        return "is the model itself (use LoRALinear.from_linear)"
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return f"{kind} is not a linear layer"
    plain = nn.Linear if isinstance(module, nn.Linear) else type(module)
    if type(module).forward is not plain.forward or "forward" in vars(module):
        return f"{kind} has a forward of its own"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed, not stored (parametrised)"
    if type(weight) is not nn.Parameter or weight.dtype not in DTYPES:
        return f"its weight is a {type(weight).__name__} of {weight.dtype}"
    parent = modules[parent_name]
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{_kind(parent)} reads its weight directly, past any adapter"
    if child == "out_proj" and getattr(getattr(model, "config", None), "model_type", None) in _MAMBA:
        return "Mamba's kernels read its weight directly, past any adapter"
    return None


def _looks_linear(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear) or is_conv1d(module)
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


def unwrap(model: nn.Module) -> nn.Module:
    """The module below torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
