"""Tiny transformers models of the seven families HiddenKey knows, a batch for each, and how steps are compared."""

import copy
import warnings

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lorasp import HiddenKeyConfig, apply_hiddenkey, testing

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": 3}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
GROUPED = {"num_key_value_heads": 2}
T5 = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 3, "num_heads": 4}

RATES = {"attention_p": 0.3, "hidden_p": 0.25}


def roberta(**config) -> nn.Module:
    config = transformers.RobertaConfig(**TOKENS, max_position_embeddings=32, **SIZES | config)
    return transformers.RobertaForSequenceClassification(config)


def bert(**config) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(max_position_embeddings=32, **SIZES | config))


def t5(**config) -> nn.Module:
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **T5 | config))


def gpt2(**config) -> nn.Module:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TOKENS, **sizes | config))


def llama(**config) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TOKENS, **GROUPED, **SIZES | config))


def mistral(**config) -> nn.Module:
    config = transformers.MistralConfig(**TOKENS, **GROUPED, sliding_window=4, **SIZES | config)
    return transformers.MistralForCausalLM(config)


def qwen2(**config) -> nn.Module:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TOKENS, **GROUPED, **window, **SIZES | config))


FAMILIES = (roberta, bert, t5, gpt2, llama, mistral, qwen2)

# What "auto" chooses of three layers, written out: (attention modules, modules whose output ends the FFN).
_ENCODER = ("{}.encoder.layer.{}.attention.self", "{}.encoder.layer.{}.output.dense")
_DECODER = ("model.layers.{}.self_attn", "model.layers.{}.mlp.down_proj")
CHOSEN = {
    roberta: tuple([path.format("roberta", i) for i in range(3)] for path in _ENCODER),
    bert: tuple([path.format("bert", i) for i in range(3)] for path in _ENCODER),
    t5: (
        [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(3)]
        + [f"decoder.block.{i}.layer.{kind}" for i in (1, 2) for kind in ("0.SelfAttention", "1.EncDecAttention")],
        [f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(3)]
        + [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in (1, 2)],
    ),
    gpt2: ([f"transformer.h.{i}.attn" for i in (1, 2)], [f"transformer.h.{i}.mlp.c_proj" for i in (1, 2)]),
    **{make: tuple([path.format(i) for i in (1, 2)] for path in _DECODER) for make in (llama, mistral, qwen2)},
}

# What people adapt in each; GPT-2's layers are Conv1D.
TARGETS = {
    roberta: ["query", "value", "dense"],
    bert: ["query", "value", "dense"],
    t5: ["q", "v", "wi", "wo"],
    gpt2: ["c_attn", "c_proj"],
    **{make: ["q_proj", "v_proj", "gate_proj", "down_proj"] for make in (llama, mistral, qwen2)},
}


def build(make, dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """Weights larger than at initialisation, so that every layer, and what it drops, matters to the output."""
    torch.manual_seed(0)
    model = make(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def batch(make, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Padding on the right in one row and on the left in another; labels, where they are tokens, ignore it."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 48, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    mask[2, :2] = 0
    labels = torch.arange(rows) % 2 if make is roberta else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask, "labels": labels}


def applied(make, **config) -> nn.Module:
    model = build(make)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES | config))
    return model.train()


def loss_and_gradients(model: nn.Module, inputs: dict, seed: int = 3) -> dict:
    model.zero_grad()
    torch.manual_seed(seed)
    outputs = model(**inputs)
    outputs.loss.backward()
    # A key's bias moves all logits of a query alike: its gradient is rounding noise.
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("key.bias")]
    gradients = {name: p.grad for name, p in named if p.grad is not None}
    return {"logits": outputs.logits.detach(), **gradients}


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name


def precisions(model: nn.Module, make) -> dict:
    """The same step in fp32 and fp64."""
    dtypes = (torch.float32, torch.float64)
    return {dtype: loss_and_gradients(copy.deepcopy(model).to(dtype), batch(make)) for dtype in dtypes}


def assert_meets_rule(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected[torch.float64].keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, *(expected[dtype][name] for dtype in expected), torch.float32, name)


def peft_model(model: nn.Module, make, **config) -> PeftModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS[make], init_lora_weights=False, **config))
