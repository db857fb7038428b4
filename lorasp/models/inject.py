"""Put adapters into a model in place: everything is checked first, then everything is changed."""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from lorasp.config import LoRAConfig
from lorasp.layers.lora_linear import DEFAULT_ADAPTER, LoRALinear
from lorasp.layers.quantized import parameter_count
from lorasp.layers.quantized_linear import QuantizedLoRALinear
from lorasp.layers.shared_input import SharedInput
from lorasp.models.adapted import active_adapter, adapted_layers, adapter_configs, unwrap, whole_keys
from lorasp.models.mlps import recompute_mlp
from lorasp.models.plan import Plan, make_plan
from lorasp.models.whole_tensors import CHILD, whole_tensors


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


def inject(model: nn.Module, config: LoRAConfig, adapter_name: str = DEFAULT_ADAPTER) -> InjectReport:
    """Replace the targeted linear layers of `model` by LoRALinear, in place, and freeze everything else.

    Weights and biases are shared, not copied; training mode and forward/backward hooks are kept. Quantised layers of
    bitsandbytes and torchao stay as they are, inside a QuantizedLoRALinear. A layer that stands under several names is
    adapted once, under all of them. config.modules_to_save train in full, where they stand, and so do the biases
    config.bias names; a copy of what they were is kept for disable_adapter and other adapters.

    Called again with another adapter_name, it puts a second adapter into the model, beside the first one where both
    want a layer. As in PEFT it neither acts nor trains until set_adapter(model, adapter_name).

    Raises ValueError or TypeError, with the model as it was, if a target names nothing, names a layer that cannot carry
    an adapter (quantised by something else, parametrised, read past its forward), if nothing is left to adapt, if the
    name is taken, or if an adapter is merged. "all-linear" skips such layers and the output head, and the report says
    why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"inject: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"inject: config must be a LoRAConfig, got {type(config).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("inject: model must not be wrapped in DistributedDataParallel yet; inject first, then wrap")
    return install(make_plan(unwrap(model), config, "inject", adapter_name))


def install(plan: Plan) -> InjectReport:
    """Carry out a plan."""
    model, name = plan.model, plan.adapter
    first = not adapter_configs(model)
    if first:
        model.requires_grad_(False)
        model.lorasp_configs = {}
    active = name if first else active_adapter(model)
    placed = {layer for _, _, layer in plan.places}
    for layer_name, layer in plan.layers.items():
        if layer in placed:
            layer.set_adapter(active)
        else:
            layer.adapters[name] = plan.adapters[layer_name].requires_grad_(False)
            layer.prepack |= plan.config.prepack
    for parent, child, layer in plan.places:
        setattr(parent, child, layer)
    for layer_name, layer in plan.layers.items():
        if layer in placed and isinstance(layer, QuantizedLoRALinear):
            whole_tensors(model).rename(layer_name, f"{layer_name}.base_layer")
    for members in plan.groups:
        for layer in members:
            layer.shared_input = None
        SharedInput(members)
    for layer_name, kept in plan.kept.items():
        plan.layers[layer_name].keep_input = kept
    if plan.config.recompute_mlp:
        recompute_mlp(model, plan.config.recompute_mlp)
    model.lorasp_configs[name] = plan.config
    if keys := whole_keys(model, plan.config, plan.layers):
        whole = whole_tensors(model)
        whole.add(model, name, keys, active=first)
        setattr(model, CHILD, whole)
    return report(model, plan.skipped, tuple(plan.layers))


def report(model: nn.Module, skipped: dict[str, str], adapted: tuple[str, ...]) -> InjectReport:
    """The report on a model as it is now; adapted: the layers it is about."""
    layers = adapted_layers(model)
    waiting = set(getattr(model, CHILD, nn.Module()).parameters())
    parameters = [parameter for parameter in model.parameters() if parameter not in waiting]
    adapters = [a for layer in layers.values() for a in layer.adapters.values()]
    factors = sum(a.r * (a.in_features + a.out_features) for a in adapters)
    standing = {p for a in adapters for p in a.parameters()}
    return InjectReport(
        adapted=adapted,
        skipped=skipped,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(parameter_count(p) for p in parameters if p not in standing) + factors,
        groups=shared_groups(layers),
    )


def shared_groups(layers: dict[str, LoRALinear]) -> tuple[tuple[str, ...], ...]:
    """The names of the layers each SharedInput links; one layer alone is no group."""
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.shared_input is not None:
            groups.setdefault(id(layer.shared_input), []).append(name)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)
