"""DropKey as an attention implementation of transformers, in its attention registry and its mask registry.

Both registries matter: a name that only the first one knows makes transformers pass attention_mask=None, and padding is
attended to. A module drops only while it trains and carries a DropKey mark; every other call goes on, its arguments as
they came, to the implementation the model had before (scaled_dot_product_attention or the model's own eager code).
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, eager_mask, sdpa_mask

from lorasp.functional import dropkey_attention

# The implementation a model has: what it is called while HiddenKey is applied.
NAMES = {"sdpa": "lorasp_dropkey", "eager": "lorasp_dropkey_eager"}


def base_of(implementation: str) -> str:
    """The implementation behind a name: a config copied from a model that has HiddenKey carries one of NAMES."""
    return next((base for base, name in NAMES.items() if name == implementation), implementation)


@dataclass(frozen=True)
class DropKey:
    """What apply_hiddenkey hangs on an attention module, as `module.lorasp_dropkey`; p = 0 keeps plain attention.

    base: the implementation to go back to. ignore_bias: the position bias is zero by construction.
    """

    p: float
    pattern: str
    base: str
    ignore_bias: bool = False


@dataclass(frozen=True)
class StillSwitched:
    """A forward pre-hook of a dropping module: training fails loudly if someone changed the implementation since."""

    name: str

    def __call__(self, module: nn.Module, args: tuple) -> None:
        have = module.config._attn_implementation
        if module.training and have != self.name:
            raise ValueError(
                f"apply_hiddenkey: the attention implementation was changed to {have!r}, which drops nothing; "
                "call apply_hiddenkey again"
            )


def can_hook(module: nn.Module) -> bool:
    """Whether the module's own code looks attention up in transformers' registry."""
    return hasattr(sys.modules.get(type(module).__module__), "ALL_ATTENTION_FUNCTIONS")


def _eager(module, *args, **kwargs):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _attention(base, module, query, key, value, attention_mask, **kwargs):
    mark = getattr(module, "lorasp_dropkey", None)
    if mark is None or mark.p == 0.0 or not module.training:
        return base(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("softcap") is not None:
        raise ValueError("dropkey_attention: softcap is not supported; leave this layer out of HiddenKeyConfig.layers")
    if attention_mask is not None and attention_mask.ndim != 4:
        raise ValueError(
            f"dropkey_attention: the attention mask must be (B, 1, Sq, Sk), got {tuple(attention_mask.shape)}"
        )
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask, causal = _narrow(attention_mask, causal and query.shape[2] > 1)
    bias = kwargs.get("position_bias")
    if bias is not None and not mark.ignore_bias:
        mask, causal = _with_bias(bias, attention_mask, causal)
    o = dropkey_attention(
        query, key, value, mask, dropout_p=mark.p, pattern=mark.pattern, is_causal=causal,
        scale=kwargs.get("scaling"), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return o.transpose(1, 2), None


def _narrow(mask: Tensor | None, causal: bool) -> tuple[Tensor | None, bool]:
    """The mask in its smallest form: key padding (B, 1, 1, Sk) where it is that, and whether causality comes on top."""
    if mask is None:
        return None, causal
    keys = getattr(mask, "lorasp_keys", None)
    if keys is not None and causal:
        return keys, True
    return (mask[:, :, :1] if mask.stride(2) == 0 else mask), False


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, bool]:
    """T5's position bias as an additive mask; causality stays a flag where no mask carries it."""
    if mask is None:
        return bias, causal
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min), False
    return bias + mask, False


def attention_over_sdpa(module, query, key, value, attention_mask, **kwargs):
    """The attention function that stands in for transformers' "sdpa"."""
    return _attention(sdpa_attention_forward, module, query, key, value, attention_mask, **kwargs)


def attention_over_eager(module, query, key, value, attention_mask, **kwargs):
    """The attention function that stands in for a model's own eager attention."""
    return _attention(_eager, module, query, key, value, attention_mask, **kwargs)


def _mask(base, mask_function=causal_mask_function, **kwargs):
    """`base`'s mask with the same entries; padding keeps a form that the kernels can read without an Sq x Sk tensor."""
    q_length = kwargs.get("q_length")
    if mask_function is bidirectional_mask_function and q_length is not None and not kwargs.get("use_vmap"):
        mask = base(mask_function=mask_function, **kwargs | {"q_length": 1})
        return mask if mask is None else mask.expand(-1, -1, q_length, -1)
    mask = base(mask_function=mask_function, **kwargs)
    padding = kwargs.get("attention_mask")
    square = mask_function is causal_mask_function and kwargs.get("kv_length") == q_length
    # The padding goes along as an attribute, which a graph cannot carry: compiled code reads the whole mask.
    if square and mask is not None and padding is not None and not torch.compiler.is_compiling():
        mask.lorasp_keys = padding[:, None, None, :q_length]
    return mask


def mask_over_sdpa(**kwargs):
    """The mask function that stands in for transformers' "sdpa": boolean masks, or None where none is needed."""
    return _mask(sdpa_mask, **kwargs)


def mask_over_eager(**kwargs):
    """The mask function that stands in for transformers' "eager": additive masks of 0 and finfo.min."""
    return _mask(eager_mask, **kwargs)


AttentionInterface.register(NAMES["sdpa"], attention_over_sdpa)
AttentionInterface.register(NAMES["eager"], attention_over_eager)
AttentionMaskInterface.register(NAMES["sdpa"], mask_over_sdpa)
AttentionMaskInterface.register(NAMES["eager"], mask_over_eager)
