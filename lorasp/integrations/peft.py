"""PEFT models run on lorasp's operators: accelerate() and restore().

PEFT's LoRA layers stay PEFT's: parameters, names, files, merging, switching, training loops. Their class becomes a
subclass that computes the forward, so deepcopy and pickle carry it along and isinstance still holds.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lorasp.config import LoRAConfig
from lorasp.layers.shared_input import SharedInput
from lorasp.models.adapted import unwrap
from lorasp.models.inject import shared_groups
from lorasp.models.inputs import shared_inputs


@dataclass(frozen=True)
class AccelerateReport:
    """What accelerate() did, by the layers' names in the model.

    accelerated: layers that run fused, with one of their adapters at least; kept: those that PEFT's own forward serves,
    with the reason, which names the adapter where it is one adapter's; groups: layers that read one input and run as
    one operator (SharedInput); frozen_A: adapter -> layers whose A stays frozen (LoRA-FA).
    """

    accelerated: tuple[str, ...]
    kept: dict[str, str]
    groups: tuple[tuple[str, ...], ...]
    frozen_A: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.accelerated)
        groups = Counter("+".join(name.rpartition(".")[2] for name in group) for group in self.groups)
        counted = f": {', '.join(f'{kind} x{n}' for kind, n in kinds.items())}" if kinds else ""
        lines = [f"lorasp: {len(self.accelerated)} layers accelerated{counted}"]
        if groups:
            lines.append(f"one operator per input: {', '.join(f'{names} x{n}' for names, n in groups.items())}")
        for adapter, names in self.frozen_A.items():
            lines.append(f"LoRA-FA: A of adapter {adapter!r} stays frozen in {len(names)} layers")
        return "\n".join(lines + [f"kept {name}: {why}" for name, why in self.kept.items()])


def accelerate(
    model: nn.Module, *, freeze_A: bool | None = None, share_input: bool | Sequence[Sequence[str]] = True
) -> AccelerateReport:
    """Let PEFT's LoRA layers in `model` compute through lora_linear, in place; all else about them stays PEFT's.

    model: a PeftModel, or any model PEFT (transformers, diffusers) put LoRA layers into. x, y, gradients: as with PEFT,
    to rounding; dropout draws other masks from the same generator. What is not fused keeps PEFT's forward, per layer
    (see the report) or per call (see FusedLinear). Layers on one input run together, as with LoRAConfig.share_input.
    Second derivatives raise.

    freeze_A, LoRA-FA: with None every A that does not require grad while its B does stays so, whatever PEFT's
    set_adapter, enable_adapters or set_requires_grad say; with True every A, of adapters to come too; with False none.
    Backward then keeps x A^T instead of x. Make the optimizer afterwards. Layers that cannot be fused are left as they
    are in this too.

    Adapters may be added, loaded, switched, merged and deleted afterwards. Call it again for layers that a new adapter
    brought, and to decide again which A is frozen: a second call adds to the first (freeze_A=False starts afresh).

    Raises TypeError or ValueError, with the model as it was, if there is no LoRA layer of PEFT's, if the model is
    wrapped in DistributedDataParallel (wrap it afterwards) or share_input fits no layers.
    Sources: LoRA arXiv 2106.09685; LoRA-FA arXiv 2308.03303.
    """
    root = _checked("accelerate", model)
    if freeze_A is not None and not isinstance(freeze_A, bool):
        raise TypeError(f"accelerate: freeze_A must be None, True or False, got {freeze_A!r}")
    found = _lora_layers(root)
    if not found:
        raise ValueError(f"accelerate: model must have LoRA layers of PEFT's, {type(root).__name__} has none")
    from lorasp.integrations.peft_linear import FusedLinear

    kept = {name: why for name, layer in found.items() if (why := _obstacle(layer)) is not None}
    layers = {name: layer for name, layer in found.items() if name not in kept}
    for name in kept:
        if freeze_A or (freeze_A is None and _lora_fa(found[name])):
            kept[name] += "; its A is not held frozen"
    modules = dict(root.named_modules(remove_duplicate=False))
    plain = {name: layer for name, layer in layers.items() if _fused_class(layer) is FusedLinear}
    groups = shared_inputs(modules, plain, LoRAConfig(share_input=share_input), "accelerate")
    for layer in layers.values():
        _fuse(layer, freeze_A)
    for members in groups.values():
        SharedInput(list(members.values()))
    return _report(layers, kept)


def restore(model: nn.Module) -> None:
    """Undo accelerate(): PEFT's own classes, and what freeze_A=True froze trains as its B does. Nothing if not applied.

    Raises TypeError or ValueError, with the model as it was, where accelerate() would, and for layers that were
    themselves given to fully_shard.
    """
    root = _checked("restore", model)
    layers = {name: layer for name, layer in _lora_layers(root).items() if hasattr(layer, "frozen_A")}
    if not layers:
        return
    for name, layer in layers.items():
        if type(layer) is not _fused_class(layer):
            raise ValueError(f"restore: {name} must be of the class accelerate() gave it, got {type(layer).__name__}")
    for layer in layers.values():
        layer.release()
        layer.__class__ = type(layer).__bases__[1]
        for name in ("shared_input", "shared_index", "frozen_A", "freeze_A"):
            vars(layer).pop(name, None)


def _checked(where: str, model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(f"{where}: model must not be wrapped in DistributedDataParallel, pass the module inside")
    return unwrap(model)


def _lora_layers(root: nn.Module) -> dict[str, nn.Module]:
    """PEFT's LoRA layers by name, a shared one by its first. Where peft was never imported there are none."""
    library = sys.modules.get("peft.tuners.lora.layer")
    return {n: m for n, m in root.named_modules() if isinstance(m, library.LoraLayer)} if library else {}


def _lora_fa(layer: nn.Module) -> list[str]:
    """The adapters whose B trains and whose A does not."""

    def trains(factor: nn.Module | nn.Parameter) -> bool:
        return getattr(factor, "weight", factor).requires_grad

    return [name for name in layer.lora_A if trains(layer.lora_B[name]) and not trains(layer.lora_A[name])]


def _fused_class(layer: nn.Module) -> type[nn.Module] | None:
    """The class that a LoRA layer of PEFT's gets, or has; None if there is none for its kind."""
    from lorasp.integrations.peft_linear import FusedLayer, FusedLinear

    kind = type(layer)
    if kind is FusedLinear or kind is FusedLinear.__bases__[1]:
        return FusedLinear
    # Only where such a layer is: PEFT's file imports bitsandbytes.
    if kind.__module__ in ("peft.tuners.lora.bnb", "peft.tuners.lora.torchao") or issubclass(kind, FusedLayer):
        from lorasp.integrations.peft_quantized import FUSED

        return FUSED.get(kind) or (kind if kind in FUSED.values() else None)
    return None


def _obstacle(layer: nn.Module) -> str | None:
    """Why this LoRA layer of PEFT's cannot be fused, whatever its adapters; None if it can (or is)."""
    from lorasp.integrations import peft_linear

    kind = _fused_class(layer)
    if kind is None:
        return f"{type(layer).__name__} is not PEFT's lora.Linear"
    if kind is peft_linear.FusedLinear:
        return peft_linear.obstacle(layer)
    from lorasp.integrations import peft_quantized

    return peft_quantized.obstacle(layer)


def _fuse(layer: nn.Module, freeze_A: bool | None) -> None:
    if type(layer) is not _fused_class(layer):
        layer.__class__, layer.frozen_A, layer.freeze_A = _fused_class(layer), {}, False
    layer.shared_input = None
    if freeze_A is False:
        layer.release()
        return
    for adapter in _lora_fa(layer):
        layer.frozen_A.setdefault(adapter, False)
    layer.freeze_A = layer.freeze_A or freeze_A is True
    layer.hold()


def _report(layers: dict[str, nn.Module], kept: dict[str, str]) -> AccelerateReport:
    accelerated, frozen_A = [], {}
    for name, layer in layers.items():
        reasons = {adapter: layer.why_not(adapter) for adapter in layer.lora_A}
        if None in reasons.values():
            accelerated.append(name)
        if not reasons:
            kept[name] = "it has no adapter"
        if why := [f"adapter {adapter!r}: {reason}" for adapter, reason in reasons.items() if reason]:
            kept[name] = "; ".join(why)
        for adapter in layer.frozen_A:
            frozen_A.setdefault(adapter, []).append(name)
    return AccelerateReport(
        accelerated=tuple(accelerated),
        kept=kept,
        groups=shared_groups({name: layers[name] for name in accelerated}),
        frozen_A={adapter: tuple(names) for adapter, names in frozen_A.items()},
    )
