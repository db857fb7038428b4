"""Which whole models `lorasp bench --model` knows, and the ways to adapt one: PEFT's and lorasp's, by one table."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorasp.config import LoRAConfig, PartialConfig
from lorasp.console import quiet_imports
from lorasp.integrations.peft import accelerate
from lorasp.layers.lora_linear import LoRALinear
from lorasp.models.inject import inject

BASE, PEFT = "frozen", "peft"
ALPHA = 32
SEED = 7


@dataclass(frozen=True)
class ModelCase:
    """A transformers model made from a config (no weights are read), and the batch and rank it trains with.

    published: the sizes of a published model, of which memory is what is asked for.
    """

    family: str
    head: str
    config: Mapping[str, object]
    batch: int
    tokens: int
    rank: int
    published: bool = False

    def build(self, dtype: torch.dtype, device: torch.device, checkpointing: bool = False) -> nn.Module:
        """The frozen model. Its matrices are larger than at initialisation, so that every layer matters.

        checkpointing: transformers' own, which keeps each layer's input and runs the layer again in backward.
        """
        import transformers

        torch.manual_seed(SEED)
        config = getattr(transformers, f"{self.family}Config")(**self.config, **_SPECIAL_TOKENS)
        # Straight in place: a large model never passes through fp32 on the host, and tied weights stay tied on meta.
        with _made_as(dtype, device):
            model = getattr(transformers, f"{self.family}{self.head}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
        if checkpointing:
            # Its name changes from transformers 5 to 6.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model.train().requires_grad_(False)

    def inputs(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Input embeddings that require grad, as activations inside a model do, and labels."""
        generator = torch.Generator().manual_seed(SEED)
        config = model.config
        names = ["inputs_embeds"] + ["decoder_inputs_embeds"] * config.is_encoder_decoder
        shape = self.batch, self.tokens, config.hidden_size
        made = {n: torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for n in names}
        classes, shape = config.vocab_size, shape[:2]
        if self.head == "ForSequenceClassification":
            classes, shape = config.num_labels, shape[:1]
        return made | {"labels": torch.randint(classes, shape, generator=generator).to(device)}


@contextlib.contextmanager
def _made_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """New floating-point tensors are of this dtype and on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


_SPECIAL_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "vocab_size": 512}
_ENCODER = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 512}
# Sizes as published with the weights (LLaMA arXiv 2302.13971, RoBERTa arXiv 1907.11692, T5 arXiv 1910.10683). Batch,
# length and rank are this project's choice: how LoRA-FA and LoRA-SP set theirs could not be read. No cache of keys and
# values, which is for generating.
_LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048, "use_cache": False,
}  # fmt: skip
_ROBERTA_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
}  # fmt: skip
_T5_LARGE = {
    "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "vocab_size": 32128,
    "use_cache": False,
}  # fmt: skip
_TINY = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "vocab_size": 48}

MODELS: dict[str, ModelCase] = {
    "toy-llama": ModelCase(
        "Llama", "ForCausalLM", _LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 8}, 4, 256, 16
    ),
    "toy-roberta": ModelCase(
        "Roberta", "ForSequenceClassification",
        _ENCODER | {"num_attention_heads": 8, "max_position_embeddings": 264}, 4, 256, 16,
    ),
    "toy-gpt2": ModelCase(
        "GPT2", "LMHeadModel", {"n_embd": 512, "n_layer": 4, "n_head": 8, "n_positions": 256, "vocab_size": 512},
        4, 256, 16,
    ),
    "toy-t5": ModelCase(
        "T5", "ForConditionalGeneration",
        {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8, "vocab_size": 512}, 4, 256, 16,
    ),
    "tiny-llama": ModelCase(
        "Llama", "ForCausalLM", _TINY | {"num_attention_heads": 4, "num_key_value_heads": 2}, 2, 12, 4
    ),
    "llama-7b": ModelCase("Llama", "ForCausalLM", _LLAMA_7B, 4, 512, 16, published=True),
    "roberta-large": ModelCase("Roberta", "ForSequenceClassification", _ROBERTA_LARGE, 64, 128, 16, published=True),
    "t5-large": ModelCase("T5", "ForConditionalGeneration", _T5_LARGE, 32, 128, 16, published=True),
}  # fmt: skip


def adapt_with_peft(
    model: nn.Module,
    rank: int,
    dropout_p: float,
    *,
    masters: bool = True,
    freeze_A: bool = False,
    accelerated: bool = False,
) -> nn.Module:
    with quiet_imports():
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=dropout_p, target_modules="all-linear")
    with warnings.catch_warnings():
        # Of GPT-2's Conv1D, and of an attribute that transformers is renaming.
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config, autocast_adapter_dtype=masters)
    for layer in adapted_layers(model).values():
        layer.lora_A["default"].weight.requires_grad_(not freeze_A)
    if accelerated:
        accelerate(model)
    return model


def adapt_with_lorasp(model: nn.Module, rank: int, dropout_p: float, **config) -> nn.Module:
    arguments = {"r": rank, "lora_alpha": ALPHA, "lora_dropout": dropout_p, "target_modules": "all-linear"}
    inject(model, LoRAConfig(**arguments | config))
    return model


@dataclass(frozen=True)
class Variant:
    """A way to adapt a model: in words, and as a function of (model, rank, lora_dropout), which may work in place."""

    what: str
    adapt: Callable[[nn.Module, int, float], nn.Module]


def _variant(what: str, adapt: Callable, **arguments) -> Variant:
    return Variant(what, functools.partial(adapt, **arguments))


VARIANTS: dict[str, Variant] = {
    BASE: Variant("nothing trains: forward and backward to the inputs", lambda model, rank, dropout_p: model),
    PEFT: _variant("PEFT as it comes: fp32 adapters", adapt_with_peft),
    "peft-half": _variant("PEFT, adapters in the model's dtype", adapt_with_peft, masters=False),
    "peft+fa": _variant("peft, A frozen", adapt_with_peft, freeze_A=True),
    "peft-half+fa": _variant("peft-half, A frozen", adapt_with_peft, masters=False, freeze_A=True),
    "accelerate": _variant("peft, accelerated by lorasp", adapt_with_peft, accelerated=True),
    "accelerate+fa": _variant("peft, A frozen, accelerated", adapt_with_peft, freeze_A=True, accelerated=True),
    "lorasp": _variant("lorasp LoRA, adapters in the model's dtype", adapt_with_lorasp),
    "lorasp+masters": _variant("lorasp LoRA, fp32 adapters", adapt_with_lorasp, adapter_dtype=torch.float32),
    "lorasp+fa": _variant("lorasp LoRA-FA: A frozen", adapt_with_lorasp, freeze_A=True),
    "lorasp+sp": _variant("lorasp LoRA-SP: half of A and B train", adapt_with_lorasp, partial=PartialConfig()),
    "lorasp+recompute": _variant(
        "lorasp LoRA, MLPs recompute their activation", adapt_with_lorasp, recompute_mlp="activation"
    ),
    "lorasp+fa+recompute": _variant(
        "lorasp LoRA-FA, MLPs recompute their activation", adapt_with_lorasp, freeze_A=True, recompute_mlp="activation"
    ),
    "lorasp+fa+recompute-full": _variant(
        "lorasp LoRA-FA, MLPs recompute gate and up too", adapt_with_lorasp, freeze_A=True, recompute_mlp="full"
    ),
}


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """lorasp's or PEFT's adapted layers, by the base model's names."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear) or (hasattr(module, "base_layer") and hasattr(module, "lora_A"))
    }


def factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The effective A (R, K) and B (N, R)."""
    if isinstance(layer, LoRALinear):
        return layer.lora_A.detach(), layer.lora_B.detach()
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def set_factors(layer: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
    if isinstance(layer, LoRALinear):
        # A fresh LoRA-SP adapter: what is frozen of B is zero.
        layer.set_lora(lora_A, lora_B * layer.trainable_mask_B())
    else:
        for have, value in zip(factors(layer), (lora_A, lora_B), strict=True):
            have.copy_(value)


def trained(layer: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """("A" or "B", the Parameter that trains, bool mask of the entries of the whole factor it holds)."""
    if isinstance(layer, LoRALinear):
        masks = {"A": layer.trainable_mask_A(), "B": layer.trainable_mask_B()}
        for name, parameter in layer.adapters[layer.active_adapter].named_parameters():
            which = name.removeprefix("lora_")[0]
            yield which, parameter, masks[which]
    else:
        for which, factor in (("A", layer.lora_A), ("B", layer.lora_B)):
            parameter = factor["default"].weight
            if parameter.requires_grad:
                yield which, parameter, torch.ones_like(parameter, dtype=torch.bool)
