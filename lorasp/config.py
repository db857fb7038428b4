"""LoRAConfig and PartialConfig (what to adapt, in PEFT's words), HiddenKeyConfig (what to drop); checked when made."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real

import torch

INITS = (True, False, "gaussian")
BIASES = ("none", "all", "lora_only")
GRANULARITIES = ("feature", "element", "rank", "matrix")
ALL_LINEAR = "all-linear"
DROP_PATTERNS = ("column", "element", "span")
CONSISTENCY_KINDS = ("kl", "js")
AUTO_LAYERS = "auto"
RECOMPUTE_MODES = ("activation", "full")


def check_adapter(
    where: str,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    freeze_A: bool,
    use_rslora: bool,
    init_lora_weights: bool | str,
    prepack: bool,
    adapter_dtype: torch.dtype | None,
    partial: "PartialConfig | None" = None,
) -> None:
    """Raise TypeError or ValueError, naming `where`, unless these describe one adapter."""
    _check_rank(where, "r", r)
    _check_alpha(where, "lora_alpha", lora_alpha)
    if not _is_number(lora_dropout) or not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"{where}: lora_dropout must be in [0, 1), got {lora_dropout!r}")
    for name, value in (("freeze_A", freeze_A), ("use_rslora", use_rslora), ("prepack", prepack)):
        if not isinstance(value, bool):
            raise TypeError(f"{where}: {name} must be a bool, got {value!r}")
    if init_lora_weights not in INITS or isinstance(init_lora_weights, int) != isinstance(init_lora_weights, bool):
        raise ValueError(f"{where}: init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
    if adapter_dtype not in (None, torch.float32):
        raise ValueError(
            f"{where}: adapter_dtype must be None (as the weight) or torch.float32 (masters), got {adapter_dtype!r}"
        )
    if partial is not None and not isinstance(partial, PartialConfig):
        raise TypeError(f"{where}: partial must be a PartialConfig or None, got {partial!r}")
    if partial is not None and partial.granularity == "matrix" and freeze_A:
        raise ValueError(
            f"{where}: partial must not be of granularity 'matrix' with freeze_A: half would train nothing"
        )


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(where: str, name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name} must be an int >= 1, got {value!r}")


def _check_alpha(where: str, name: str, value) -> None:
    if not _is_number(value):
        raise ValueError(f"{where}: {name} must be a finite number, got {value!r}")


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"LoRAConfig: {name} must be a regular expression, got {pattern!r} ({error})") from None


def _names(name: str, value, *, regex: bool) -> str | tuple[str, ...] | None:
    """A list of names as a tuple (sets sorted); a str as it is where a regular expression is allowed."""
    if value is None:
        return None
    if isinstance(value, str) and regex:
        if value.lower() != ALL_LINEAR:
            _check_regex(name, value)
        return value
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        kind = "a str or a list of str" if regex else "a list of str"
        raise TypeError(f"LoRAConfig: {name} must be {kind}, got {value!r}")
    values = tuple(sorted(value) if isinstance(value, set | frozenset) else value)
    if not all(isinstance(item, str) and item for item in values):
        raise TypeError(f"LoRAConfig: {name} must hold non-empty strings, got {list(values)!r}")
    return values


@dataclass(frozen=True)
class PartialConfig:
    """LoRA-SP: only a part of A (r, in) and B (out, r) trains, chosen at random; the rest keeps its bits.

    trainable_ratio: the part that trains, in (0, 1], of A and of B alike.
    granularity: "feature": round(ratio * n) of A's n columns (in blocks of 64 from 512 columns on, the last one may be
        short; single below) and of B's rows: halves the saved input, the work on dA and dB, parameters, gradients and
        optimizer state. "element": single entries; halves all but the saved input. "rank": rows of A and the same
        columns of B; as "element". "matrix": A is frozen in one half of the modules and B in the other (ratio 0.5
        only); where B is frozen it starts at random and A at zero, so that the adapter starts at zero and trains. Under
        resampling a resting matrix has no gradient (DistributedDataParallel wants find_unused_parameters=True).
    resample: "never": the choice is made once and any optimizer sees only what trains. k >= 1: another choice every k
        optimizer steps; "epoch": at every lorasp.resample(model); both need lorasp.optim.PartialAdamW, and optimizer
        state is then whole.
    seed: the choice follows from it and the layer's name. lorasp.select chooses by scores instead.

    Source: LoRA-SP, arXiv 2403.08822. Its abstract fixes that half of the LoRA parameters, randomly selected, is frozen
    during fine-tuning; granularity, ratio and resampling are this library's reading of it, and none of its accuracy
    figures is claimed. "LoRA-SP (Select-Prune)", arXiv 2603.07404, is another method.

    Construction raises ValueError or TypeError.
    """

    trainable_ratio: float = 0.5
    granularity: str = "feature"
    resample: int | str = "never"
    seed: int = 0

    def __post_init__(self):
        ratio, resample, seed = self.trainable_ratio, self.resample, self.seed
        if not _is_number(ratio) or not 0.0 < ratio <= 1.0:
            raise ValueError(f"PartialConfig: trainable_ratio must be in (0, 1], got {ratio!r}")
        object.__setattr__(self, "trainable_ratio", float(ratio))
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"PartialConfig: granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}"
            )
        if self.granularity == "matrix" and ratio != 0.5:
            raise ValueError(f"PartialConfig: trainable_ratio must be 0.5 for granularity 'matrix', got {ratio!r}")
        every = isinstance(resample, int) and not isinstance(resample, bool) and resample >= 1
        if not every and resample not in ("never", "epoch"):
            raise ValueError(f"PartialConfig: resample must be 'never', 'epoch' or an int >= 1, got {resample!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"PartialConfig: seed must be an int in [-2^63, 2^63), got {seed!r}")


@dataclass(frozen=True)
class LoRAConfig:
    """One LoRA adapter: s B A beside each targeted weight, s = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora).

    r, lora_alpha, lora_dropout, use_rslora: of every layer; rank_pattern, alpha_pattern {regex: value} override r and
        lora_alpha where the regex matches the end of a module's name, the first match winning.
    target_modules: a list matches names or ends of names ("q_proj" fits "model.layers.0.q_proj"), a str is matched by
        re.fullmatch, "all-linear" takes every linear layer but the output head. exclude_modules: likewise, left out.
    layers_to_transform, layers_pattern: only layers with these indices (the number after the first "<layers_pattern>.",
        by default after any name); with a list of target_modules.
    modules_to_save: modules, by the end of their name, that train in full and are saved with the adapter.
    bias: which biases train and are saved: "none", "all", "lora_only" (those of adapted layers).
    init_lora_weights: True A kaiming_uniform(a = sqrt 5) and B zero; "gaussian" A normal(0, 1/r) and B zero; False both
        kaiming_uniform, so that the adapter is not zero at the start.
    freeze_A: LoRA-FA: A is a buffer that never trains, and backward keeps x A^T instead of x.
    prepack: CPU: also keep each frozen weight in the kernels' own layout, for two more copies of it.
    adapter_dtype: None keeps A and B in their weight's dtype; torch.float32 keeps masters over a half-precision weight.
    partial: LoRA-SP: only a part of A and B trains; see PartialConfig.
    share_input: layers that read one input (q/k/v; gate/up; key/value of cross attention) run as one operator: True
        those known in LLaMA, Mistral, Qwen2, RoBERTa, BERT, T5 and ViT models; a list of groups, each a list of ends of
        names, the layers with these names side by side; False none. See SharedInput.
    recompute_mlp: "activation" (or True) or "full": MLPs keep their pre-activations, or their input, and recompute the
        rest in backward; False: they keep what they keep. Not part of the adapter's file. See lorasp.recompute_mlp.

    Names and meanings are those of peft.LoraConfig but for the last six. Construction raises ValueError or TypeError.
    Sources: LoRA arXiv 2106.09685; LoRA-FA arXiv 2308.03303; LoRA-SP arXiv 2403.08822; rsLoRA arXiv 2312.03732.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    freeze_A: bool = False
    prepack: bool = False
    adapter_dtype: torch.dtype | None = None
    partial: PartialConfig | None = None
    share_input: bool | Sequence[Sequence[str]] = True
    recompute_mlp: bool | str = False

    def __post_init__(self):
        check_adapter("LoRAConfig", **self.adapter_arguments())
        for name in ("lora_alpha", "lora_dropout"):
            if not isinstance(value := getattr(self, name), int | float):  # numpy's: not for JSON
                object.__setattr__(self, name, float(value))
        if self.bias not in BIASES:
            raise ValueError(f"LoRAConfig: bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        normal = {
            "target_modules": _names("target_modules", self.target_modules, regex=True),
            "exclude_modules": _names("exclude_modules", self.exclude_modules, regex=True),
            "modules_to_save": _names("modules_to_save", self.modules_to_save, regex=False),
            "layers_to_transform": self._layer_indices(),
            "layers_pattern": self._layer_names(),
            "share_input": self._groups(),
            "recompute_mlp": self._recompute(),
        }
        for name in ("rank_pattern", "alpha_pattern"):
            normal[name] = self._pattern(name)
        for name, value in normal.items():
            object.__setattr__(self, name, value)
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(f"LoRAConfig: target_modules must not be empty, got {self.target_modules!r}")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("LoRAConfig: layers_to_transform needs target_modules to be a list, got a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("LoRAConfig: layers_pattern needs layers_to_transform")

    def adapter_arguments(self) -> dict:
        """What LoRALinear takes beyond nn.Linear's own arguments."""
        return {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "freeze_A": self.freeze_A,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "prepack": self.prepack,
            "adapter_dtype": self.adapter_dtype,
            "partial": self.partial,
        }

    def for_module(self, name: str) -> "LoRAConfig":
        """This config with the r and lora_alpha that rank_pattern and alpha_pattern give the module called `name`."""
        if not self.rank_pattern and not self.alpha_pattern:
            return self
        r = next((v for k, v in self.rank_pattern.items() if matches_end(k, name)), self.r)
        lora_alpha = next((v for k, v in self.alpha_pattern.items() if matches_end(k, name)), self.lora_alpha)
        return replace(self, r=r, lora_alpha=lora_alpha)

    def _layer_indices(self) -> tuple[int, ...] | None:
        value = self.layers_to_transform
        if value is None or value == [] or value == ():
            return None
        indices = (value,) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else (value,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices):
            raise ValueError(f"LoRAConfig: layers_to_transform must be an int >= 0 or a list of them, got {value!r}")
        return indices

    def _layer_names(self) -> tuple[str, ...] | None:
        value = self.layers_pattern
        names = _names("layers_pattern", [value] if isinstance(value, str) and value else value or None, regex=False)
        for pattern in names or ():
            _check_regex("layers_pattern", pattern)
        return names

    def _groups(self) -> bool | tuple[tuple[str, ...], ...]:
        value = self.share_input
        if isinstance(value, bool):
            return value
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"LoRAConfig: share_input must be a bool or a list of lists of str, got {value!r}")
        groups = tuple(_names("share_input", names, regex=False) for names in value)
        if not groups or any(names is None or len(set(names)) < 2 for names in groups):
            raise ValueError(f"LoRAConfig: share_input must hold groups of two or more names, got {value!r}")
        return groups

    def _recompute(self) -> bool | str:
        value = RECOMPUTE_MODES[0] if self.recompute_mlp is True else self.recompute_mlp
        if value is not False and value not in RECOMPUTE_MODES:
            raise ValueError(f"LoRAConfig: recompute_mlp must be a bool, 'activation' or 'full', got {value!r}")
        return value

    def _pattern(self, name: str) -> dict:
        value = getattr(self, name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise TypeError(f"LoRAConfig: {name} must be a dict, got {value!r}")
        check = _check_rank if name == "rank_pattern" else _check_alpha
        for pattern, number in value.items():
            if not isinstance(pattern, str) or not pattern:
                raise TypeError(f"LoRAConfig: {name} must have non-empty strings as keys, got {pattern!r}")
            _check_regex(name, pattern)
            check("LoRAConfig", f"{name}[{pattern!r}]", number)
        return dict(value)


@dataclass(frozen=True)
class HiddenKeyConfig:
    """HiddenKey: drop attention logits before the softmax and parts of the FFN's output, and ask two passes to agree.

    attention_p, attention_pattern: of dropkey_attention; hidden_p, hidden_pattern: of hidden_cut ("column", "element"
        or "span"; rates in [0, 1), 0 switches that half off and leaves the model's own code in place).
    loss: what hiddenkey_step adds to the task loss, times loss_weight: "kl" between two dropout passes, "js" between a
        dropout pass and the inference-mode output, None nothing. both_branches: both passes in one doubled batch, with
        gradient to both ("kl"); otherwise the second pass has no gradient.
    layers: "auto" (every encoder layer, the latter half of the decoder layers: those with index >= n // 2), a list of
        indices (in every stack of layers) or a list of layers' names or ends of names.
    disable_other_dropout: set the model's own dropout rates to 0, adapters' lora_dropout aside.

    Construction raises ValueError or TypeError. The paper searched rates in 0.01 to 0.2 and weights in 0.01 to 10.
    Source: HiddenKey arXiv 2403.00812, sections 3 and 4; HiddenKey- of the paper is loss=None.
    """

    attention_p: float = 0.1
    hidden_p: float = 0.1
    attention_pattern: str = "column"
    hidden_pattern: str = "element"
    loss: str | None = "kl"
    loss_weight: float = 1.0
    both_branches: bool = False
    layers: str | Sequence[int] | Sequence[str] = AUTO_LAYERS
    disable_other_dropout: bool = False

    def __post_init__(self):
        for name in ("attention_p", "hidden_p"):
            value = getattr(self, name)
            # Masks count in steps of 2^-16: a rate that rounds to 1 would drop everything.
            if not _is_number(value) or not 0.0 <= value < 1.0 - 2**-17:
                raise ValueError(f"HiddenKeyConfig: {name} must be in [0, 1), got {value!r}")
        for name in ("attention_pattern", "hidden_pattern"):
            if getattr(self, name) not in DROP_PATTERNS:
                raise ValueError(
                    f"HiddenKeyConfig: {name} must be one of {', '.join(DROP_PATTERNS)}, got {getattr(self, name)!r}"
                )
        if self.loss is not None and self.loss not in CONSISTENCY_KINDS:
            raise ValueError(f"HiddenKeyConfig: loss must be 'kl', 'js' or None, got {self.loss!r}")
        if not _is_number(self.loss_weight) or self.loss_weight < 0:
            raise ValueError(f"HiddenKeyConfig: loss_weight must be a finite number >= 0, got {self.loss_weight!r}")
        for name in ("both_branches", "disable_other_dropout"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"HiddenKeyConfig: {name} must be a bool, got {getattr(self, name)!r}")
        if self.both_branches and self.loss != "kl":
            raise ValueError(f"HiddenKeyConfig: both_branches needs loss='kl', two dropout passes, got {self.loss!r}")
        object.__setattr__(self, "layers", self._layers())

    def _layers(self) -> str | tuple:
        layers = self.layers
        if layers == AUTO_LAYERS:
            return layers
        items = tuple(layers) if isinstance(layers, Sequence) and not isinstance(layers, str) else ()
        indices = all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items)
        if not items or not (indices or all(isinstance(item, str) and item for item in items)):
            raise ValueError(
                f"HiddenKeyConfig: layers must be 'auto', a list of indices >= 0 or a list of names, got {layers!r}"
            )
        return items


def matches_end(pattern: str, name: str) -> bool:
    """Whether a rank_pattern or alpha_pattern key fits a module's name, as PEFT has it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def matches_names(names: str | Sequence[str], name: str) -> bool:
    """Whether target_modules or exclude_modules fits a module's name: re.fullmatch for a str, ends for a list."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names)


def layer_index(name: str, layers_pattern: Sequence[str] | None) -> int | None:
    """The index of the layer a module's name lies in: the first numbered part (after one of layers_pattern)."""
    patterns = [rf"(?:^|.*?\.){pattern}" for pattern in layers_pattern or ()] or [r".*?\.[^.]*"]
    for pattern in patterns:
        if match := re.match(rf"{pattern}\.(?P<index>\d+)\.", name):
            return int(match["index"])
    return None
