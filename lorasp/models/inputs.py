"""Which linear layers of a model read one input, and whose input is in memory anyway: known by class, or named.

Class names, not classes: transformers is not imported for this. Groups are a matter of speed alone (a layer that turns
out to read something else computes apart), and so is keep_input.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lorasp.config import LoRAConfig


class _Kept(NamedTuple):
    """The child that reads the output of fused attention, which saves it; the config's name for attention dropout."""

    child: str
    dropout: str


_Q_K_V, _QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj"), ("query", "key", "value")
_GROUPS: dict[str, tuple[str, ...]] = {
    "LlamaAttention": _Q_K_V,
    "LlamaMLP": ("gate_proj", "up_proj"),
    "MistralAttention": _Q_K_V,
    "MistralMLP": ("gate_proj", "up_proj"),
    "Qwen2Attention": _Q_K_V,
    "Qwen2MLP": ("gate_proj", "up_proj"),
    "BertSelfAttention": _QUERY_KEY_VALUE,
    "RobertaSelfAttention": _QUERY_KEY_VALUE,
    "BertCrossAttention": ("key", "value"),
    "RobertaCrossAttention": ("key", "value"),
    "T5Attention": ("q", "k", "v"),
    "T5DenseGatedActDense": ("wi_0", "wi_1"),
    "ViTAttention": _Q_K_V,
    "ViTSelfAttention": _QUERY_KEY_VALUE,
}
# Where one class serves both kinds of attention, cross attention is known by its name; its query reads another input.
_CROSS = {"EncDecAttention", "crossattention"}
_QUERIES = {"q", "query"}
_KEPT = {
    "LlamaAttention": _Kept("o_proj", "attention_dropout"),
    "MistralAttention": _Kept("o_proj", "attention_dropout"),
    "Qwen2Attention": _Kept("o_proj", "attention_dropout"),
    "BertSelfOutput": _Kept("dense", "attention_probs_dropout_prob"),
    "RobertaSelfOutput": _Kept("dense", "attention_probs_dropout_prob"),
    "T5Attention": _Kept("o", "dropout_rate"),
    "GPT2Attention": _Kept("c_proj", "attn_pdrop"),
    "ViTAttention": _Kept("o_proj", "attention_probs_dropout_prob"),
    "ViTSelfOutput": _Kept("dense", "attention_probs_dropout_prob"),
}


def shared_inputs(
    modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], config: LoRAConfig, where: str
) -> dict[str, dict[str, nn.Module]]:
    """Groups of two or more layers that read one input: a name for the group -> {layer's name: layer}.

    modules: the model's, by every name; layers: those to be adapted. Raises ValueError for names in config.share_input
    that fit no layers side by side, or layers that cannot share an input.
    """
    if config.share_input is True:
        return _known(modules, layers)
    found: dict[str, dict[str, nn.Module]] = {}
    for names in config.share_input or ():
        found |= _named(names, layers, where)
    owners: dict[str, str] = {}
    for group, members in found.items():
        if why := _obstacle(members):
            raise ValueError(f"{where}: share_input {group!r}: the layers must have {why}")
        for name in members:
            if owners.setdefault(name, group) != group:
                raise ValueError(f"{where}: share_input must name {name} once, it is in {owners[name]} and {group}")
    return found


def _known(modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    found = {}
    for name, module in modules.items():
        children = _entry(_GROUPS, module) or ()
        if not _CROSS.isdisjoint(name.split(".")):
            children = tuple(child for child in children if child not in _QUERIES)
        members = {path: layers[path] for path in (_join(name, child) for child in children) if path in layers}
        if len(members) > 1 and not _obstacle(members):
            found[_join(name, "+".join(children))] = members
    return found


def _named(names: tuple[str, ...], layers: Mapping[str, nn.Module], where: str) -> dict[str, dict[str, nn.Module]]:
    """The groups one list of ends of names stands for: one under every common beginning."""
    found: dict[str, dict[str, nn.Module]] = {}
    for end in names:
        fits = [path for path in layers if path == end or path.endswith(f".{end}")]
        if not fits:
            raise ValueError(f"{where}: share_input name {end!r} fits no adapted layer")
        for path in fits:
            found.setdefault(path[: -len(end)], {})[path] = layers[path]
    groups = {f"{start}{'+'.join(names)}": members for start, members in found.items() if len(members) > 1}
    if not groups:
        raise ValueError(f"{where}: share_input {list(names)} fits no two adapted layers side by side")
    return groups


def _obstacle(members: Mapping[str, nn.Module]) -> str | None:
    """What these layers must have in common and do not."""
    layers = list(members.values())
    if not all(getattr(layer, "can_share_input", True) for layer in layers):
        return "weights that are not quantised"
    for what, values in (
        ("the same in_features", {layer.in_features for layer in layers}),
        ("the same device", {layer.weight.device for layer in layers}),
        ("the same dtype", {layer.weight.dtype for layer in layers}),
    ):
        if len(values) > 1:
            return what
    return None


def kept_inputs(model: nn.Module, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> dict[str, bool]:
    """keep_input of the layers whose input attention keeps: a copy of a part of it would cost memory, not save it.

    Eager attention keeps its weights and values instead, and so does fused attention with dropout on the CPU.
    """
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) in (None, "eager"):
        return {}
    found = {}
    for name, module in modules.items():
        kept = _entry(_KEPT, module)
        path = _join(name, kept.child) if kept else None
        if path in layers:
            found[path] = layers[path].weight.device.type != "cpu" or getattr(config, kept.dropout, 0.0) == 0.0
    return found


def _entry(table: Mapping, module: nn.Module):
    return next((table[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in table), None)


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
