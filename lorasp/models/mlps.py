"""recompute_mlp: which MLPs of a model recompute their activation (recompute.py), and how that gets into them.

An MLP is known by what its forward does, not by its name: the bytecode must be that of one of the forwards below, which
are transformers' own. So classes that share one (LLaMA's, Mistral's, Qwen2's, Gemma's, ...) are known at once, and a
patched or unknown one is left alone. The module's class becomes a subclass of what it was: hooks, parameters, the
state_dict and whatever asks for the class see no difference, and copies and pickles keep it.
"""

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasp.layers.lora_linear import LoRALinear, is_conv1d
from lorasp.layers.recompute import MODES, Elementwise, hidden, project

_ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LOOKS_LIKE_AN_MLP = ("MLP", "ActDense", "Intermediate", "FeedForward", "FFN")


@dataclass(frozen=True)
class RecomputeReport:
    """What recompute_mlp() did, by module name: {name: class} of those that recompute, {name: reason} of those left."""

    mode: str
    recomputed: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} x{count}" for kind, count in Counter(self.recomputed.values()).items())
        lines = [f"lorasp: {self.mode} recompute in {len(self.recomputed)} modules: {kinds}"]
        return "\n".join(lines + [f"skipped {name or 'the model'}: {why}" for name, why in self.skipped.items()])


def recompute_mlp(model: nn.Module, mode: str = "activation") -> RecomputeReport:
    """Let the MLPs of a transformers model recompute in backward what they would keep, in place.

    Backward of a gated MLP, down(act(gate(x)) * up(x)) over M tokens, hidden size H, intermediate size I, keeps beside
    weights, in elements of x's dtype, with lorasp's or plain frozen layers (LoRA: rank R, all three adapted):

                       as it was                      "activation"               "full"
        frozen         3 M I                          2 M I                      M H
        A frozen       3 M I + 3 M R                  2 M I + 3 M R              M H + M R
        LoRA           4 M I + M H + 3 M R            2 M I + M H + 3 M R        M H + M R

    Without a gate, down(act(up(x))): M I (more for activations written in Python, such as GPT-2's) in the place of
    2 M I, and 2 M R of 3 M R. LoRA-SP by features: M H / 2 of "activation"'s M H. x counts once where something else
    keeps it. Dropout between act and down is drawn again from the state of torch's generator, which is kept (5 KB on
    the CPU), as it is by "full" for adapters with dropout; the mask is not.

    "activation" computes act and the product with up again: no matrix product. "full" also computes gate and up again,
    once per backward: 4 M H I FLOPs more beside the 12 M H I of a LoRA MLP's forward and backward (2 beside 8 without a
    gate), and the low-rank products of gate and up. Forward and gradients are what they were, bit for bit.

    Known are the MLPs of LLaMA, Mistral, Qwen2, Qwen3, Gemma, Phi, Phi-3, T5, GPT-2, GPT-NeoX, BERT, RoBERTa, ViT, CLIP
    and all whose forward is the same, whatever their linear layers are: nn.Linear, LoRALinear, PEFT's, quantised ones.
    Call it before or after adapters and HiddenKey; a second call changes the mode. Without grad mode and under
    torch.compile, where Inductor chooses what is kept, the forward is the module's own; so it is while the activation
    module has hooks. Where nothing before the down projection needs a gradient, nothing is recomputed.

    Raises TypeError or ValueError, with the model as it was, for an unknown mode or if no MLP is known; backward raises
    RuntimeError for second derivatives.
    Source: selective activation recomputation, arXiv 2205.05198, section 5.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recompute_mlp: model must be a torch.nn.Module, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"recompute_mlp: mode must be one of {', '.join(MODES)}, got {mode!r}")
    found, skipped = find_mlps(model, "recompute_mlp")
    for module in found.values():
        if not isinstance(module, _Recomputing):
            module.__class__ = _recomputing(type(module))
        module.lorasp_recompute = mode
    return RecomputeReport(mode, {name: type(module).__name__ for name, module in found.items()}, skipped)


def find_mlps(model: nn.Module, where: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules whose forward recompute_mlp would replace, and why it leaves others; ValueError if there are none."""
    found, skipped = {}, {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = _parts(name, module, modules)
        reasons = [why for part in parts.values() if (why := _obstacle(part))]
        if reasons:
            skipped[name] = reasons[0]
        else:
            found |= parts
    if not found:
        reasons = "".join(f"; {name or 'the model'}: {why}" for name, why in skipped.items())
        raise ValueError(f"{where}: model must have MLPs of a known kind, got {type(model).__name__}{reasons}")
    return found, skipped


def undo_recompute_mlp(model: nn.Module) -> None:
    """Undo recompute_mlp: the modules' classes as they were; nothing if it was not called.

    Raises ValueError, with the model as it was, if a module's class was changed again since (fully_shard does that).
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _Recomputing)}
    for name, module in found.items():
        if type(module) is not _recomputing(module.lorasp_original):
            raise ValueError(f"undo_recompute_mlp: {name} must have recompute_mlp's class, got {type(module)}")
    for module in found.values():
        module.__class__ = module.lorasp_original
        del module.lorasp_recompute


class _Layout(NamedTuple):
    """The children of a module by their roles, by attribute; finish: h -> the module's output."""

    projections: tuple[str, ...]
    act: str
    finish: Callable[[nn.Module, Tensor], Tensor]
    dropout: str | None = None
    halves: bool = False


class _Recomputing:
    """What stands before the class of a module that recomputes."""

    lorasp_original: type[nn.Module]
    lorasp_layout: _Layout | None
    lorasp_recompute: str

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (self.lorasp_original,), *state

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"lorasp_recompute={self.lorasp_recompute!r}"]))


class _MLP(_Recomputing):
    def forward(self, x: Tensor) -> Tensor:
        # First of all, so that nothing else is traced.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(x)
        layout = self.lorasp_layout
        act, dropout = getattr(self, layout.act), layout.dropout and getattr(self, layout.dropout)
        # Somebody listens to what would be called twice.
        if _has_hooks(act) or (dropout and _has_hooks(dropout)):
            return super().forward(x)
        layers = [getattr(self, name) for name in layout.projections]

        def pre_activations(x: Tensor) -> tuple[Tensor, ...]:
            return layers[0](x).chunk(2, dim=-1) if layout.halves else tuple([layer(x) for layer in layers])

        elementwise = Elementwise(act, dropout.p if dropout and dropout.training else 0.0)
        draws = any(map(_may_draw, layers))
        return layout.finish(self, hidden(pre_activations, x, elementwise, self.lorasp_recompute, draws))


class _BertOutput(_Recomputing):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(hidden_states, input_tensor)
        return self.LayerNorm(self.dropout(project(self.dense, hidden_states)) + input_tensor)


# transformers' own forwards, which those above stand in for.


def _gated(self, x):
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _gated_halves(self, hidden_states):
    up_states = self.gate_up_proj(hidden_states)

    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)

    return self.down_proj(up_states)


def _fc1_fc2(self, hidden_states):
    hidden_states = self.fc1(hidden_states)
    hidden_states = self.activation_fn(hidden_states)
    hidden_states = self.fc2(hidden_states)
    return hidden_states


def _gpt_neox(self, hidden_states):
    hidden_states = self.dense_h_to_4h(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.dense_4h_to_h(hidden_states)
    return hidden_states


def _gpt2(self, hidden_states):
    hidden_states = self.c_fc(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.c_proj(hidden_states)
    hidden_states = self.dropout(hidden_states)
    return hidden_states


def _t5(self, hidden_states):
    hidden_states = self.wi(hidden_states)
    hidden_states = self.act(hidden_states)
    hidden_states = self.dropout(hidden_states)
    if (
        isinstance(self.wo.weight, torch.Tensor)
        and hidden_states.dtype != self.wo.weight.dtype
        and self.wo.weight.dtype != torch.int8
    ):
        hidden_states = hidden_states.to(self.wo.weight.dtype)
    hidden_states = self.wo(hidden_states)
    return hidden_states


def _t5_gated(self, hidden_states):
    hidden_gelu = self.act(self.wi_0(hidden_states))
    hidden_linear = self.wi_1(hidden_states)
    hidden_states = hidden_gelu * hidden_linear
    hidden_states = self.dropout(hidden_states)
    if (
        isinstance(self.wo.weight, torch.Tensor)
        and hidden_states.dtype != self.wo.weight.dtype
        and self.wo.weight.dtype != torch.int8
    ):
        hidden_states = hidden_states.to(self.wo.weight.dtype)
    hidden_states = self.wo(hidden_states)
    return hidden_states


def _bert_intermediate(self, hidden_states):
    hidden_states = self.dense(hidden_states)
    hidden_states = self.intermediate_act_fn(hidden_states)
    return hidden_states


def _bert_output(self, hidden_states, input_tensor):
    hidden_states = self.dense(hidden_states)
    hidden_states = self.dropout(hidden_states)
    hidden_states = self.LayerNorm(hidden_states + input_tensor)
    return hidden_states


def _finish_gpt2(mlp: nn.Module, h: Tensor) -> Tensor:
    return mlp.dropout(project(mlp.c_proj, h))


def _finish_t5(mlp: nn.Module, h: Tensor) -> Tensor:
    weight = mlp.wo.weight
    if isinstance(weight, Tensor) and weight.dtype not in (h.dtype, torch.int8):
        h = h.to(weight.dtype)
    return project(mlp.wo, h)


def _finish(down: str) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda mlp, h: project(getattr(mlp, down), h)


_MLPS: dict[Callable, _Layout] = {
    _gated: _Layout(("gate_proj", "up_proj"), "act_fn", _finish("down_proj")),
    _gated_halves: _Layout(("gate_up_proj",), "activation_fn", _finish("down_proj"), halves=True),
    _fc1_fc2: _Layout(("fc1",), "activation_fn", _finish("fc2")),
    _gpt_neox: _Layout(("dense_h_to_4h",), "act", _finish("dense_4h_to_h")),
    _gpt2: _Layout(("c_fc",), "act", _finish_gpt2),
    _t5: _Layout(("wi",), "act", _finish_t5, "dropout"),
    _t5_gated: _Layout(("wi_0", "wi_1"), "act", _finish_t5, "dropout"),
    _bert_intermediate: _Layout(("dense",), "intermediate_act_fn", lambda intermediate, h: h),
}


def _same(one: Callable, other: Callable) -> bool:
    a, b = (getattr(function, "__code__", None) for function in (one, other))
    return a is not None and (a.co_code, a.co_names, a.co_consts, a.co_argcount) == (
        b.co_code, b.co_names, b.co_consts, b.co_argcount,
    )  # fmt: skip


def _known(kind: type[nn.Module]) -> Callable | None:
    """Which of transformers' forwards is that of this class."""
    return next((theirs for theirs in (*_MLPS, _bert_output) if _same(kind.forward, theirs)), None)


def _kind(module: nn.Module) -> type[nn.Module]:
    return module.lorasp_original if isinstance(module, _Recomputing) else type(module)


def _parts(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of the MLP that begins with this one (BERT's has two); none if it is, and looks like, no MLP."""
    theirs = _known(_kind(module))
    if theirs is _bert_intermediate:
        output = f"{name.rpartition('.')[0]}.output".lstrip(".")
        return {name: module, output: modules.get(output, module)}
    if theirs is _bert_output:
        return {}
    return {name: module} if theirs or _kind(module).__name__.endswith(_LOOKS_LIKE_AN_MLP) else {}


def _obstacle(module: nn.Module) -> str | None:
    """Why this module's forward cannot be replaced."""
    kind = _kind(module)
    theirs = _known(kind)
    if theirs is None or "forward" in vars(module):
        return f"{kind.__name__} has a forward that is not known"
    if theirs is _bert_output:
        return None
    layout = _MLPS[theirs]
    if layout.dropout and type(dropout := getattr(module, layout.dropout)) is not nn.Dropout:
        return f"its dropout is a {type(dropout).__name__}"
    act = getattr(module, layout.act)
    if type(act).__module__ not in _ACTIVATIONS:
        return f"its activation, {type(act).__name__}, is not torch's or transformers'"
    if next(act.parameters(), None) is not None:
        return f"its activation, {type(act).__name__}, has parameters"
    if getattr(act, "inplace", False):
        return f"its activation, {type(act).__name__}, writes over its input"
    if isinstance(act, nn.RReLU):
        return "its activation, RReLU, draws random numbers"
    return None


@functools.cache
def _recomputing(original: type[nn.Module]) -> type[nn.Module]:
    """The class a module of this one gets."""
    theirs = _known(original)
    if theirs is None:
        raise ValueError(f"recompute_mlp: the forward of {original.__name__} must be a known one")
    base = _BertOutput if theirs is _bert_output else _MLP
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "lorasp_original": original}
    return type(original.__name__, (base, original), names | {"lorasp_layout": _MLPS.get(theirs)})


def _new(original: type[nn.Module]) -> nn.Module:
    kind = _recomputing(original)
    return kind.__new__(kind)


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[hooks] for hooks in _HOOKS)


def _may_draw(layer: nn.Module) -> bool:
    """Whether a projection may draw random numbers."""
    if isinstance(layer, LoRALinear):
        adapter = layer.adapters._modules.get(layer.active_adapter)
        return layer.training and adapter is not None and adapter.lora_dropout > 0
    plain = (isinstance(layer, nn.Linear) and next(layer.children(), None) is None) or is_conv1d(layer)
    return layer.training and not plain
