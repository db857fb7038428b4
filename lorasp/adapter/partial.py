"""LoRA-SP (arXiv 2403.08822): half of the LoRA parameters, randomly selected, is frozen during fine-tuning.

That much is what the paper's abstract fixes. What the unit of choice is (PartialConfig's granularity), the same ratio
for A and for B, and whether the choice changes during training (resample) is this library's reading. "LoRA-SP
(Select-Prune)", arXiv 2603.07404, is another method.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lorasp.adapter import selection
from lorasp.adapter.adapter import Adapter
from lorasp.adapter.partial_adapter import PackedAdapter, PartialAdapter, ResampledAdapter
from lorasp.adapter.selection import Selection, Site
from lorasp.config import PartialConfig


def make_adapter(
    in_features: int, out_features: int, *, partial: PartialConfig | None, name: str, peers: Sequence[str], **arguments
) -> Adapter:
    """The adapter these arguments of LoRALinear describe. Raises ValueError if a selection leaves nothing to train."""
    if partial is None:
        return Adapter(in_features, out_features, **arguments)
    freeze_A = arguments["freeze_A"]
    site = Site(name, name, tuple(peers) or (name,), in_features, out_features, arguments["r"], freeze_A)
    if partial.resample != "never":
        return ResampledAdapter(partial, site, **arguments)
    if partial.granularity != "matrix":
        return PackedAdapter(partial, site, **arguments)
    trains_A = bool(selection.draw(partial, site).active_A)
    return Adapter(in_features, out_features, **(arguments | {"freeze_A": not trains_A}), freeze_B=trains_A)


def partial_adapters(model: nn.Module) -> list[PartialAdapter]:
    return [module for module in model.modules() if isinstance(module, PartialAdapter)]


def resample(model: nn.Module) -> None:
    """Give every adapter of `model` with PartialConfig(resample=k or "epoch") its next selection.

    Call it where an epoch ends; resample=k is advanced by PartialAdamW too. Values, and the moments of entries that
    rest, stay as they are. Raises ValueError if no adapter resamples.
    """
    adapters = [adapter for adapter in partial_adapters(model) if isinstance(adapter, ResampledAdapter)]
    if not adapters:
        raise ValueError(
            f"resample: model must have adapters with PartialConfig(resample=...), got {type(model).__name__}"
        )
    for adapter in adapters:
        adapter.resample()


def select(model: nn.Module, scores: Mapping[str, tuple[Tensor | None, Tensor]]) -> None:
    """Choose what trains of the active adapter by scores per entry: the highest are kept (per block or row: their sum).

    scores: layer name -> (score_A (r, in) or None where A is frozen, score_B (out, r)), for any of the layers:
    magnitudes, gradient statistics, whatever the caller has. Layers on one input are chosen together by the sum of
    their scores, so all of them must be named. The effective A and B stay as they are; make the optimizer afterwards.
    Raises ValueError, with nothing changed, for unknown names and scores that do not fit.
    """
    adapters = {adapter.site.name: adapter for adapter in _active_adapters(model)}
    if unknown := [name for name in scores if name not in adapters]:
        raise ValueError(
            f"select: scores must name layers with a PartialConfig, got {unknown}; they are {list(adapters)}"
        )
    for name, score in scores.items():
        if not isinstance(score, tuple | list) or len(score) != 2:
            raise ValueError(
                f"select: scores must be pairs (score_A, score_B), got {type(score).__name__} for {name!r}"
            )
    chosen = {name: _scored(adapters[name], *score) for name, score in scores.items()}
    shared: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        if adapter.partial.granularity == "feature" and not adapter.freeze_A:
            shared.setdefault(adapter.site.shared, []).append(name)
    for names in shared.values():
        missing = [name for name in names if name not in scores]
        if len(names) > 1 and len(missing) < len(names):
            if missing:
                raise ValueError(f"select: layers that read one input must all have scores, missing: {missing}")
            summed = torch.cat([scores[name][0].detach().double().cpu() for name in names]).sum(0)
            for name in names:
                one = summed.expand(adapters[name].r, -1)
                chosen[name] = _scored(adapters[name], one, scores[name][1])
    if wrong := [f"{name} {why}" for name, what in chosen.items() if (why := adapters[name].misfit(what))]:
        raise ValueError(f"select: scores must choose as much as the sharded model trains: {'; '.join(wrong)}")
    for name, what in chosen.items():
        adapters[name].choose(what)


def _active_adapters(model: nn.Module) -> list[PartialAdapter]:
    found = []
    for layer in model.modules():
        adapters = layer._modules.get("adapters")
        adapter = adapters._modules.get(layer.active_adapter) if hasattr(layer, "active_adapter") and adapters else None
        if isinstance(adapter, PartialAdapter):
            found.append(adapter)
    return found


def _scored(adapter: PartialAdapter, score_A: Tensor | None, score_B: Tensor) -> Selection:
    return selection.by_scores(adapter.partial, adapter.site, score_A, score_B)
