"""HiddenKey in transformers models: apply_hiddenkey, remove_hiddenkey.

Attention is switched through transformers' registries (see attention.py). The FFN's output is cut by a hook that stands
behind the FFN and before the residual add: on the input of the dropout that ends it where there is one, else on the
FFN's output, so that adapters put in before or after are inside it. Hooks and marks are plain objects on the modules:
they follow deepcopy and pickle, and a state_dict does not know of them. The residual add is in the layers' own forward:
it stays there, unfused.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lorasp.config import AUTO_LAYERS, HiddenKeyConfig
from lorasp.functional import hidden_cut
from lorasp.models.adapted import unwrap


@dataclass(frozen=True)
class _Family:
    """Where a layer class keeps its attention modules (those that exist) and the end of its FFN."""

    attention: tuple[str, ...]
    ffn: str
    at_input: bool


_ENCODER = _Family(("attention.self", "crossattention.self"), "output.dropout", at_input=True)
_DECODER = _Family(("self_attn",), "mlp", at_input=False)
_FAMILIES = {
    "BertLayer": _ENCODER,
    "RobertaLayer": _ENCODER,
    "T5Block": _Family(("layer.0.SelfAttention", "layer.1.EncDecAttention"), "layer.-1.dropout", at_input=True),
    "GPT2Block": _Family(("attn", "crossattention"), "mlp.dropout", at_input=True),
    "LlamaDecoderLayer": _DECODER,
    "MistralDecoderLayer": _DECODER,
    "Qwen2DecoderLayer": _DECODER,
}
_SUPPORTED = "BERT, RoBERTa, T5, GPT-2, LLaMA, Mistral and Qwen2"
_FLOAT_DROPOUTS = ("dropout", "attention_dropout")


@dataclass(frozen=True)
class HiddenKeyReport:
    """What apply_hiddenkey() did, by module name.

    attention, ffn: what the modules do in training; skipped: layers and attention modules left alone, with the reason;
    silenced: {module: rate} of the dropouts set to 0; replaced: those of attention modules where DropKey acts instead.
    """

    attention: dict[str, str]
    ffn: dict[str, str]
    skipped: dict[str, str]
    replaced: dict[str, float]
    silenced: dict[str, float]

    def __str__(self) -> str:
        lines = []
        for what, changed in (("attention modules", self.attention), ("FFN outputs", self.ffn)):
            kinds = ", ".join(dict.fromkeys(changed.values()))
            lines.append(f"lorasp: HiddenKey in {len(changed)} {what}" + (f": {kinds}" if kinds else ""))
        if self.replaced:
            lines.append(f"attention dropout replaced in {len(self.replaced)} modules")
        if self.silenced:
            lines.append(f"dropout set to 0 in {len(self.silenced)} modules")
        return "\n".join(lines + [f"skipped {name}: {why}" for name, why in self.skipped.items()])


@dataclass(frozen=True)
class HiddenCut:
    """A forward hook (of the FFN) or forward pre-hook (of the dropout behind it) that cuts what passes, in training."""

    p: float
    pattern: str

    def __call__(self, module: nn.Module, args: tuple, *output: Tensor) -> Tensor | None:
        if not module.training:
            return None
        return hidden_cut(output[0] if output else args[0], self.p, pattern=self.pattern)


@dataclass(frozen=True, eq=False)
class _Layer:
    name: str
    index: int
    size: int
    family: _Family
    attention: dict[str, nn.Module]
    ffn: tuple[str, nn.Module]

    @property
    def is_decoder(self) -> bool:
        return bool(getattr(next(iter(self.attention.values())), "is_causal", False))


def apply_hiddenkey(model: nn.Module, config: HiddenKeyConfig) -> HiddenKeyReport:
    """Make a transformers model (BERT, RoBERTa, T5, GPT-2, LLaMA, Mistral, Qwen2) drop as HiddenKey does, in place.

    In training, attention of the chosen layers (self- and cross-attention) goes through dropkey_attention, instead of
    the model's own dropout of attention weights, and the FFN's output through hidden_cut, before residual and norm;
    output_attentions gets no weights from them, as they are never formed. In
    eval mode the model computes what it did before, by the implementation it had ("sdpa" or "eager"). Seeds come from
    torch's generator: torch.manual_seed reproduces a run, and checkpointed layers drop the same again.

    Adapters may be there already or come later; a second call replaces the first. The model gets copies of the config
    objects whose attention implementation changes. Compile after this call, not before.

    Raises TypeError or ValueError, with the model as it was, for models without such layers, for an attention
    implementation other than "sdpa" and "eager" and for layers that name nothing.
    Source: HiddenKey arXiv 2403.00812, section 3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_hiddenkey: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, HiddenKeyConfig):
        raise TypeError(f"apply_hiddenkey: config must be a HiddenKeyConfig, got {type(config).__name__}")
    root = unwrap(model)
    layers = list(_layers(root))
    if not layers:
        raise ValueError(
            f"apply_hiddenkey: model must have transformers layers of {_SUPPORTED}, got {type(root).__name__}"
        )
    chosen = _chosen(layers, config)
    if config.attention_p:
        _check_attention(chosen)
    remove_hiddenkey(root)
    skipped = {layer.name: why for layer in layers if (why := _reason(layer, chosen, config))}
    attention, replaced = _switch_attention(root, layers, chosen, config) if config.attention_p else ({}, {})
    ffn = {}
    for layer in chosen if config.hidden_p else ():
        name, module = layer.ffn
        hook = HiddenCut(config.hidden_p, config.hidden_pattern)
        if layer.family.at_input:
            module.register_forward_pre_hook(hook)
        else:
            module.register_forward_hook(hook)
        ffn[name] = f"{config.hidden_pattern} p={config.hidden_p:g}"
    silenced = _silence(root) if config.disable_other_dropout else {}
    replaced = {name: rate for name, rate in replaced.items() if name not in silenced}
    home(root).lorasp_hiddenkey = config
    return HiddenKeyReport(attention, ffn, skipped, replaced, silenced)


def remove_hiddenkey(model: nn.Module) -> None:
    """Undo apply_hiddenkey: attention implementation, hooks and dropout rates as they were; nothing if not applied."""
    from lorasp.integrations.attention import NAMES, StillSwitched

    root = unwrap(model)
    for module in root.modules():
        vars(module).pop("lorasp_hiddenkey", None)
        mark = vars(module).pop("lorasp_dropkey", None)
        if mark is not None and module.config._attn_implementation == NAMES[mark.base]:
            module.config._attn_implementation_internal = mark.base
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, HiddenCut | StillSwitched)]:
                del hooks[key]
        for attribute, rate in vars(module).pop("lorasp_silenced", {}).items():
            setattr(module, attribute, rate)


def home(model: nn.Module) -> nn.Module:
    """The outermost transformers model inside `model`, which carries the applied config as lorasp_hiddenkey."""
    from transformers import PreTrainedModel

    root = unwrap(model)
    return next((module for module in root.modules() if isinstance(module, PreTrainedModel)), root)


def _layers(root: nn.Module) -> Iterator[_Layer]:
    """The layers of known classes, in order; each stack is a ModuleList."""
    for stack_name, stack in root.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for index, layer in enumerate(stack):
            family = _family(layer)
            if family is None:
                continue
            name = f"{stack_name}.{index}"
            found = {f"{name}.{path}": _at(layer, path) for path in family.attention}
            ffn = family.ffn.replace("-1", str(len(layer.layer) - 1)) if "-1" in family.ffn else family.ffn
            yield _Layer(
                name, index, len(stack), family,
                {path: module for path, module in found.items() if module is not None},
                (f"{name}.{ffn}", _at(layer, ffn)),
            )  # fmt: skip


def _family(layer: nn.Module) -> _Family | None:
    for kind in type(layer).__mro__:
        if kind.__name__ in _FAMILIES and kind.__module__.startswith("transformers.models."):
            return _FAMILIES[kind.__name__]
    return None


def _at(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _chosen(layers: list[_Layer], config: HiddenKeyConfig) -> list[_Layer]:
    wanted = config.layers
    if wanted == AUTO_LAYERS:
        return [layer for layer in layers if not layer.is_decoder or layer.index >= layer.size // 2]

    def fits(item, layer: _Layer) -> bool:
        return item == layer.index if isinstance(item, int) else layer.name == item or layer.name.endswith(f".{item}")

    if missing := [item for item in wanted if not any(fits(item, layer) for layer in layers)]:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"apply_hiddenkey: layers {missing} name no layer; the layers are: {names}")
    return [layer for layer in layers if any(fits(item, layer) for item in wanted)]


def _reason(layer: _Layer, chosen: list[_Layer], config: HiddenKeyConfig) -> str | None:
    if layer in chosen:
        return None
    return "former half of a decoder" if config.layers == AUTO_LAYERS else "not in layers"


def _check_attention(chosen: list[_Layer]) -> None:
    from lorasp.integrations.attention import NAMES, base_of, can_hook

    for layer in chosen:
        for name, module in layer.attention.items():
            if not can_hook(module):
                raise ValueError(
                    f"apply_hiddenkey: attention must go through transformers' AttentionInterface: "
                    f"{name} ({type(module).__name__}) of this transformers version does not; "
                    "set attention_p=0 or use a newer transformers"
                )
            have = base_of(module.config._attn_implementation)
            if have not in NAMES:
                raise ValueError(
                    f"apply_hiddenkey: the attention implementation must be 'sdpa' or 'eager', got {have!r} "
                    f"for {name}; call model.set_attn_implementation('sdpa') first"
                )
            if have == "eager" and getattr(module, "reorder_and_upcast_attn", False):
                raise ValueError(
                    f"apply_hiddenkey: {name} has reorder_and_upcast_attn, which only its eager attention knows; "
                    "call model.set_attn_implementation('sdpa') first"
                )


def _switch_attention(
    root: nn.Module, layers: list[_Layer], chosen: list[_Layer], config: HiddenKeyConfig
) -> tuple[dict[str, str], dict[str, float]]:
    """Marks on every attention module that shares a config with a chosen one; a copy of that config for this model."""
    from lorasp.integrations.attention import NAMES, DropKey, StillSwitched, base_of

    old = {id(module.config): module.config for layer in chosen for module in layer.attention.values()}
    new = {}
    for key, shared in old.items():
        new[key] = copy.copy(shared)
        new[key]._attn_implementation_internal = NAMES[base_of(shared._attn_implementation)]
    attention, replaced = {}, {}
    for layer in layers:
        for name, module in layer.attention.items():
            if id(module.config) not in old:
                continue
            p = config.attention_p if layer in chosen else 0.0
            base = base_of(module.config._attn_implementation)
            module.lorasp_dropkey = DropKey(p, config.attention_pattern, base, name.endswith("EncDecAttention"))
            if p:
                module.register_forward_pre_hook(StillSwitched(new[id(module.config)]._attn_implementation))
                attention[name] = f"{config.attention_pattern} p={p:g}"
                replaced |= {path: rate for path, _, rate in _own_dropout(name, module)}
    for module in root.modules():
        shared = vars(module).get("config")
        if id(shared) in new:
            module.config = new[id(shared)]
    return attention, replaced


def _own_dropout(name: str, attention: nn.Module) -> Iterator[tuple[str, str, float]]:
    """(module name, attribute, rate) of the dropout of attention weights, unless it is 0."""
    for attribute in ("dropout", "attn_dropout", "attention_dropout"):
        found = getattr(attention, attribute, None)
        if isinstance(found, nn.Dropout) and found.p:
            yield f"{name}.{attribute}", "p", found.p
        elif isinstance(found, float) and found:
            yield name, attribute, found


def _silence(root: nn.Module) -> dict[str, float]:
    """Set the model's own dropout rates to 0; the old ones stay on the modules, as lorasp_silenced."""
    silenced = {}
    for name, module in root.named_modules():
        if re.search(r"(^|\.)lora_dropout(\.|$)", name):
            continue
        if isinstance(module, nn.Dropout):
            rates = {"p": module.p}
        else:
            rates = {a: vars(module).get(a) for a in _FLOAT_DROPOUTS if isinstance(vars(module).get(a), float)}
        rates = {attribute: rate for attribute, rate in rates.items() if rate}
        if rates:
            module.lorasp_silenced = rates
            silenced[name] = max(rates.values())
            for attribute in rates:
                setattr(module, attribute, 0.0)
    return silenced
