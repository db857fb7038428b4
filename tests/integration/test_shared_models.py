"""Whole models: the layers that read one input are found, run as one operator, and change nothing."""

import copy
from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject, load_adapter, save_adapter, testing
from lorasp.memory import saved_bytes
from lorasp.ops import lora_linear_group

DECODER = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4}
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LAYERS, TOKENS = 2, torch.arange(3, 15).reshape(2, 6)


def causal(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")
    config = config(**DECODER, **IDS, num_hidden_layers=LAYERS, num_key_value_heads=2)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def encoder(kind: str) -> nn.Module:
    sizes = DECODER | IDS | {"num_hidden_layers": LAYERS, "max_position_embeddings": 32}
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    config = getattr(transformers, f"{kind}Config")(**sizes, **rates)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def bert_decoder() -> nn.Module:
    sizes = DECODER | IDS | {"num_hidden_layers": LAYERS, "is_decoder": True, "add_cross_attention": True}
    rates = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return transformers.BertLMHeadModel(transformers.BertConfig(**sizes, **rates))


def t5(act: str) -> nn.Module:
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": LAYERS, "num_heads": 4}
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.T5Config(**sizes, **ids, feed_forward_proj=act, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config)


def gpt2(cross: bool = False) -> nn.Module:
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}
    rates = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **rates, **IDS, add_cross_attention=cross))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_hidden_layers": LAYERS}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


# Groups per model: the last parts of their names -> how often.
MODELS = {
    "llama": (lambda: causal("Llama"), {"q_proj+k_proj+v_proj": LAYERS, "gate_proj+up_proj": LAYERS}),
    "mistral": (lambda: causal("Mistral"), {"q_proj+k_proj+v_proj": LAYERS, "gate_proj+up_proj": LAYERS}),
    "qwen2": (lambda: causal("Qwen2"), {"q_proj+k_proj+v_proj": LAYERS, "gate_proj+up_proj": LAYERS}),
    "roberta": (lambda: encoder("Roberta"), {"query+key+value": LAYERS}),
    "bert": (lambda: encoder("Bert"), {"query+key+value": LAYERS}),
    "bert decoder": (bert_decoder, {"query+key+value": LAYERS, "key+value": LAYERS}),
    "t5": (lambda: t5("relu"), {"q+k+v": 2 * LAYERS, "k+v": LAYERS}),
    "t5 gated": (lambda: t5("gated-gelu"), {"q+k+v": 2 * LAYERS, "k+v": LAYERS, "wi_0+wi_1": 2 * LAYERS}),
    "gpt2": (gpt2, {}),
    "gpt2 cross": (lambda: gpt2(cross=True), {}),
    "vit": (vit, {"q_proj+k_proj+v_proj": LAYERS}),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double().train()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {"pixel_values": torch.randn((2, 3, 8, 8), generator=generator, dtype=torch.float64)}
    if name.startswith("t5"):
        return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :4]}
    if name in ("bert decoder", "gpt2 cross"):
        return {
            "input_ids": TOKENS,
            "encoder_hidden_states": torch.randn((2, 5, 32), generator=generator, dtype=torch.float64),
        }
    return {"input_ids": TOKENS}


def adapt(model: nn.Module, **arguments):
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | arguments
    torch.manual_seed(2)
    return inject(model, LoRAConfig(**config))


def results(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's output and the gradient of every adapter, in double precision."""
    logits = model(**inputs(name)).logits
    logits.backward(torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(3)))
    gradients = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach()} | gradients


def check_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal as far as single precision can tell, which is far beyond the rounding of double."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if value is None:
            assert found[key] is None
        else:
            testing.assert_close(found[key], value, value, torch.float32, key)


@pytest.fixture
def groups(monkeypatch) -> list[int]:
    """How many members each group had that was computed."""
    found = []
    for backend, op in list(lora_linear_group.forward_ops.items()):
        monkeypatch.setitem(
            lora_linear_group.forward_ops, backend, lambda *a, op=op: (found.append(len(a[1])), op(*a))[1]
        )
    return found


@pytest.mark.parametrize("partial", [None, PartialConfig()], ids=["LoRA", "LoRA-SP"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_groups_is_the_model_without(name, partial, groups):
    model = build(name)
    report = adapt(model, partial=partial)
    expected = MODELS[name][1]
    assert Counter("+".join(layer.rpartition(".")[2] for layer in group) for group in report.groups) == expected
    apart = copy.deepcopy(model)
    for layer in apart.modules():
        if isinstance(layer, LoRALinear):
            layer.shared_input = None
    new = results(name, model)
    # A layer of LoRA-SP on its own is a group of one.
    assert Counter(size for size in groups if size > 1) == Counter(
        {size: n for size in (2, 3) if (n := sum(v for k, v in expected.items() if k.count("+") == size - 1))}
    )
    check_same(new, results(name, apart))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", ["llama", "bert", "t5 gated"])
def test_gradient_checkpointing(name, dropout, reentrant):
    found = []
    for checkpointed in (True, False):
        model = build(name)
        adapt(model, lora_dropout=dropout)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        found.append(results(name, model))
    check_same(*found)


@pytest.mark.parametrize("name", ["llama", "t5 gated"])
def test_generation(name):
    """Decoding token by token: cross attention computes its keys and values once."""
    model = build(name).eval()
    adapt(model)
    apart = copy.deepcopy(model)
    for layer in apart.modules():
        if isinstance(layer, LoRALinear):
            layer.shared_input = None
    arguments = {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
    assert torch.equal(model.generate(TOKENS, **arguments), apart.generate(TOKENS, **arguments))


KEPT = ["llama", "mistral", "qwen2", "roberta", "bert", "bert decoder", "t5", "gpt2", "vit"]


@pytest.mark.parametrize("name", KEPT)
def test_an_input_attention_keeps_is_not_copied(name):
    """keep_input marks layers whose whole input costs nothing; without it, each would keep a copy of half of it."""
    model = build(name)
    adapt(model, partial=PartialConfig())
    marked = {key: layer for key, layer in model.named_modules() if isinstance(layer, LoRALinear) and layer.keep_input}
    assert {key.rpartition(".")[2] for key in marked} <= {"o_proj", "dense", "o", "c_proj"}
    rows = Counter()
    for key, layer in marked.items():
        layer.register_forward_pre_hook(lambda m, a, key=key: rows.update({key: a[0].numel() // a[0].shape[-1]}))
    with_marks = saved_bytes(lambda: model(**inputs(name)), exclude=model)
    copies = sum(rows[key] * layer.in_features // 2 * 8 for key, layer in marked.items())
    for layer in marked.values():
        layer.keep_input = False
    assert saved_bytes(lambda: model(**inputs(name)), exclude=model) - with_marks == copies > 0


@pytest.mark.parametrize("change", [{"attn_implementation": "eager"}, {"attention_dropout": 0.1}], ids=str)
def test_an_input_attention_does_not_keep_is_not_marked(change):
    config = transformers.LlamaConfig(**DECODER, num_hidden_layers=1, **change)
    model = transformers.LlamaForCausalLM(config)
    adapt(model, partial=PartialConfig())
    assert not any(layer.keep_input for layer in model.modules() if isinstance(layer, LoRALinear))


def test_members_of_a_group_train_on_the_same_features(tmp_path):
    model = build("llama")
    report = adapt(model, partial=PartialConfig())
    layers = dict(model.named_modules())
    for group in report.groups:
        first, *others = (layers[name].adapters["default"].columns for name in group)
        assert all(torch.equal(first, other) for other in others)
    save_adapter(model, tmp_path)
    loaded = build("llama")
    assert load_adapter(loaded, tmp_path).groups == report.groups
    check_same(results("llama", loaded), results("llama", model))
