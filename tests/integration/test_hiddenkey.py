"""HiddenKey in whole models: what drops where, what stays as it was, and what is refused."""

import sys

import pytest
import torch
import transformers
from hf_models import (
    CHOSEN,
    FAMILIES,
    RATES,
    SIZES,
    TOKENS,
    applied,
    assert_meets_rule,
    assert_same,
    batch,
    bert,
    build,
    gpt2,
    llama,
    loss_and_gradients,
    qwen2,
    roberta,
    t5,
)
from torch import nn

from lorasp import HiddenKeyConfig, apply_hiddenkey, remove_hiddenkey, rng
from lorasp.integrations import attention
from lorasp.integrations import transformers as integration


@pytest.fixture
def seeds(monkeypatch) -> dict[str, list[int]]:
    """The seeds that the model's calls of the two operators drew, in order."""
    drawn = {"attention": [], "ffn": []}

    def recording(kind, operator):
        def call(*args, **kwargs):
            seed = rng.draw_seed(torch.device("cpu"))
            drawn[kind].append(seed.item())
            return operator(*args, **kwargs, seed=seed)

        return call

    monkeypatch.setattr(attention, "dropkey_attention", recording("attention", attention.dropkey_attention))
    monkeypatch.setattr(integration, "hidden_cut", recording("ffn", integration.hidden_cut))
    return drawn


def keep(seed: int, pattern: str, p: float, shape: tuple, purpose: int) -> torch.Tensor:
    """shape: of one decision per element; a column's or a run's last dimension but one is shared."""
    if pattern == "element":
        return rng.keep_mask(seed, shape, p, purpose)
    draw = rng.keep_mask if pattern == "column" else rng.span_keep_mask
    return draw(seed, (*shape[:-2], shape[-1]), p, purpose).unsqueeze(-2)


def make_oracle(model: nn.Module, make, config: HiddenKeyConfig, seeds: dict, monkeypatch) -> None:
    """HiddenKey written out on the model's eager attention and on the last linear layer of each FFN."""
    chosen = [{model.get_submodule(name) for name in names} for names in CHOSEN[make]]
    queues = {kind: list(drawn) for kind, drawn in seeds.items()}

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, position_bias=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query @ key.transpose(-1, -2) * scaling
        logits = logits if position_bias is None else logits + position_bias
        visible = torch.ones_like(logits, dtype=torch.bool)
        if mask is not None:
            logits, visible = logits + mask, (mask == 0).expand_as(logits)
        if module in chosen[0]:
            seed = queues["attention"].pop(0)
            visible = visible & keep(seed, config.attention_pattern, config.attention_p, logits.shape, 1)
        # A query that sees nothing gets zeros, from scaled_dot_product_attention too.
        logits = torch.where(visible.any(-1, keepdim=True), logits.masked_fill(~visible, -torch.inf), 0)
        weights = logits.softmax(-1) * visible
        return (weights @ value).transpose(1, 2), weights

    def cut(module, args, y):
        p, pattern, seed = config.hidden_p, config.hidden_pattern, queues["ffn"].pop(0)
        if pattern == "element":
            return y * keep(seed, pattern, p, y.shape, 2) * rng.rescale(p)
        return y * keep(seed, pattern, p, (y.shape[0], 1, y.shape[1]), 2).transpose(1, 2)

    monkeypatch.setattr(sys.modules[type(model).__module__], "eager_attention_forward", attend)
    for module in chosen[1]:
        module.register_forward_hook(cut)


PATTERNS = [(make, "column", "element") for make in FAMILIES] + [
    (make, *pair) for make in (bert, llama) for pair in (("element", "column"), ("span", "span"))
]


@pytest.mark.parametrize(("make", "over_keys", "over_ffn"), PATTERNS)
def test_training_drops_what_the_masks_say_in_the_chosen_layers(make, over_keys, over_ffn, seeds, monkeypatch):
    config = HiddenKeyConfig(**RATES, attention_pattern=over_keys, hidden_pattern=over_ffn, disable_other_dropout=True)
    # In fp64: through a chain of softmaxes two fp32 runs differ by luck; the kernels are held to the rule one by one.
    model = build(make, torch.float64)
    apply_hiddenkey(model, config)
    actual = loss_and_gradients(model.train(), batch(make))
    assert [len(seeds["attention"]), len(seeds["ffn"])] == [len(names) for names in CHOSEN[make]]
    expected = {}
    for dtype in (torch.float32, torch.float64):
        oracle = build(make, dtype, attn_implementation="eager").train()
        for module in oracle.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        make_oracle(oracle, make, config, seeds, monkeypatch)
        expected[dtype] = loss_and_gradients(oracle, batch(make))
    assert_meets_rule(actual, expected)


@pytest.mark.parametrize(
    ("make", "masks"),
    [
        (bert, {((3, 1, 1, 9), False)}),
        (gpt2, {((3, 1, 1, 9), True)}),
        (llama, {((3, 1, 1, 9), True)}),
        (qwen2, {((3, 1, 1, 9), True), ((3, 1, 9, 9), False)}),
        # The encoder's bias meets its padding; the decoder's stands alone; cross-attention has none.
        (t5, {((3, 4, 9, 9), False), ((1, 4, 9, 9), True), ((3, 1, 1, 9), False)}),
    ],
)
def test_padding_reaches_the_kernel_as_keys(make, masks, monkeypatch):
    """Only windows and biases are Sq x Sk tensors: (mask shape, is_causal) of every call."""
    model, seen, operator = applied(make), set(), attention.dropkey_attention

    def watched(q, k, v, mask, **arguments):
        seen.add((tuple(mask.shape), arguments["is_causal"]))
        return operator(q, k, v, mask, **arguments)

    monkeypatch.setattr(attention, "dropkey_attention", watched)
    model(**batch(make))
    assert seen == masks


def test_layers_that_are_not_chosen_keep_their_own_dropout():
    """Nothing is dropped but by the model itself where HiddenKey is off; the rate it has comes back."""
    config = {"attention_dropout": 0.5}
    model, untouched = build(llama, **config).train(), build(llama, **config).train()
    report = apply_hiddenkey(model, HiddenKeyConfig(attention_p=0.3, hidden_p=0.0, layers=["layers.1"]))
    assert report.replaced == {"model.layers.1.self_attn": 0.5}
    model.model.layers[1].self_attn.lorasp_dropkey = None
    assert_same(loss_and_gradients(model, batch(llama)), loss_and_gradients(untouched, batch(llama)))


@pytest.mark.parametrize("make", FAMILIES)
def test_padding_stays_invisible(make):
    """In training too: what stands at a padded position changes nothing where there is a token."""
    model, inputs = applied(make), batch(make)
    real = inputs["attention_mask"].bool()
    changed = inputs | {"input_ids": inputs["input_ids"].masked_fill(~real, 40)}
    if make is t5:
        real = torch.ones_like(real)  # the decoder's own tokens, which see a padded encoder
    if make is roberta:
        # It counts positions over what is no padding token, and classifies by the first one.
        position = inputs["attention_mask"].cumsum(1) + 2
        inputs, changed = inputs | {"position_ids": position}, changed | {"position_ids": position}
        real = real[:, 0]
    outputs = []
    for arguments in (inputs, changed):
        torch.manual_seed(3)
        outputs.append(model(**arguments).logits.detach()[real])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", FAMILIES)
def test_eval_is_the_untouched_model(make, implementation):
    model, inputs = build(make, attn_implementation=implementation), batch(make)
    before = model(**inputs).logits
    apply_hiddenkey(model, HiddenKeyConfig(**RATES, disable_other_dropout=True))
    assert torch.equal(model(**inputs).logits, before)
    assert not torch.equal(model.train()(**inputs).logits, before)
    without_padding = {name: inputs[name] for name in ("input_ids", "labels")}
    remove_hiddenkey(model)
    expected = model.eval()(**without_padding).logits
    apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    assert torch.equal(model(**without_padding).logits, expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_rates_of_zero_leave_training_as_it_was(make):
    model, untouched = build(make).train(), build(make).train()
    apply_hiddenkey(model, HiddenKeyConfig(attention_p=0.0, hidden_p=0.0))
    assert_same(loss_and_gradients(model, batch(make)), loss_and_gradients(untouched, batch(make)))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("make", FAMILIES)
def test_remove_restores_everything(make, implementation):
    def state(model):
        return [
            (
                name, getattr(module, "p", None), vars(module).get("dropout"), len(module._forward_hooks),
                len(module._forward_pre_hooks), getattr(vars(module).get("config"), "_attn_implementation", None),
                [key for key in vars(module) if key.startswith("lorasp")],
            )
            for name, module in model.named_modules()
        ]  # fmt: skip

    model, untouched = (build(make, attn_implementation=implementation).train() for _ in range(2))
    before = state(model)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES, disable_other_dropout=True))
    apply_hiddenkey(model, HiddenKeyConfig(**RATES, disable_other_dropout=True))
    assert state(model) != before
    remove_hiddenkey(model)
    remove_hiddenkey(model)
    assert state(model) == before
    assert_same(loss_and_gradients(model, batch(make)), loss_and_gradients(untouched, batch(make)))


@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_generation_is_the_untouched_models(make):
    model, inputs = build(make), batch(make)
    arguments = {"input_ids": inputs["input_ids"][2:], "attention_mask": inputs["attention_mask"][2:]}
    arguments |= {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    before = model.generate(**arguments)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    assert torch.equal(model.generate(**arguments), before)


def test_applying_twice_is_applying_once():
    once, twice = applied(llama), applied(llama, attention_p=0.5, hidden_pattern="span", layers=[0])
    apply_hiddenkey(twice, HiddenKeyConfig(**RATES))
    expected = loss_and_gradients(once, batch(llama))
    assert_same(loss_and_gradients(twice, batch(llama)), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_made_from_an_applied_models_config(implementation):
    """It has no HiddenKey until it gets its own, and then as any other."""
    inputs, model = batch(llama), build(llama, attn_implementation=implementation)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    other = transformers.LlamaForCausalLM(model.config)
    other.load_state_dict(model.state_dict())
    assert_same(loss_and_gradients(other, inputs), loss_and_gradients(model, inputs))
    apply_hiddenkey(other, HiddenKeyConfig(**RATES))
    assert_same(loss_and_gradients(other.train(), inputs), loss_and_gradients(model.train(), inputs))
    remove_hiddenkey(other)
    assert other.config._attn_implementation == implementation


def test_models_of_one_config_object_are_independent():
    config = transformers.LlamaConfig(**SIZES, **TOKENS)
    models = [transformers.LlamaForCausalLM(config).train() for _ in range(3)]
    for model, p in zip(models, (0.2, 0.4), strict=False):
        apply_hiddenkey(model, HiddenKeyConfig(attention_p=p))
    remove_hiddenkey(models[0])
    rates = [[getattr(layer.self_attn, "lorasp_dropkey", None) for layer in m.model.layers] for m in models]
    assert [[mark and mark.p for mark in marks] for marks in rates] == [[None] * 3, [0.0, 0.4, 0.4], [None] * 3]
    assert [m.config._attn_implementation for m in models] == ["sdpa", attention.NAMES["sdpa"], "sdpa"]
    assert config._attn_implementation == "sdpa"
    models[1](**batch(llama))


def test_report():
    report = apply_hiddenkey(build(gpt2), HiddenKeyConfig(**RATES, disable_other_dropout=True))
    assert report.attention == dict.fromkeys(CHOSEN[gpt2][0], "column p=0.3")
    assert report.ffn == {f"transformer.h.{i}.mlp.dropout": "element p=0.25" for i in (1, 2)}
    assert report.skipped == {"transformer.h.0": "former half of a decoder"}
    assert set(report.silenced.values()) == {0.1}
    assert report.replaced == {}
    assert "HiddenKey in 2 attention modules: column p=0.3" in str(report)
    assert "skipped transformer.h.0: former half of a decoder" in str(report)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([0], ["encoder.block.0", "decoder.block.0"]),
        (["decoder.block.2", "block.1"], ["encoder.block.1", "decoder.block.1", "decoder.block.2"]),
    ],
)
def test_layers_by_index_or_name(layers, names):
    report = apply_hiddenkey(build(t5), HiddenKeyConfig(**RATES, layers=layers))
    assert list(dict.fromkeys(name.split(".layer.")[0] for name in report.ffn)) == names
    assert list(dict.fromkeys(name.split(".layer.")[0] for name in report.attention)) == names


def test_an_encoder_made_decoder_is_a_decoder():
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    report = apply_hiddenkey(transformers.BertLMHeadModel(config), HiddenKeyConfig(**RATES))
    names = [f"bert.encoder.layer.{i}.{kind}.self" for i in (1, 2) for kind in ("attention", "crossattention")]
    assert list(report.attention) == names


def test_changing_the_implementation_behind_its_back_is_an_error():
    model = applied(llama)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="was changed to 'eager', which drops nothing; call apply_hiddenkey again"):
        model(**batch(llama))
    apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    model(**batch(llama))


def flash(**config):
    model = llama(**config)
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def opt(**config):
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_attention_heads": 2, "word_embed_proj_dim": 8, "vocab_size": 8}
    return transformers.OPTForCausalLM(transformers.OPTConfig(num_hidden_layers=1, **sizes, **config))


REFUSED = [
    (lambda: nn.Linear(2, 2), {}, "model must have transformers layers of BERT, RoBERTa, T5, .*, got Linear"),
    (opt, {}, "model must have transformers layers of .*, got OPTForCausalLM"),
    (flash, {}, r"must be 'sdpa' or 'eager', got 'flash_attention_2' .* call model.set_attn_implementation\('sdpa'\)"),
    (lambda: gpt2(reorder_and_upcast_attn=True, attn_implementation="eager"), {}, "has reorder_and_upcast_attn"),
    (llama, {"layers": [7]}, r"layers \[7\] name no layer; the layers are: model.layers.0, "),
    (llama, {"layers": ["layers.1", "h.1"]}, r"layers \['h.1'\] name no layer"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "config", "message"), REFUSED)
def test_refused(make, config, message):
    model = make()
    with pytest.raises(ValueError, match=f"^apply_hiddenkey: .*{message}"):
        apply_hiddenkey(model, HiddenKeyConfig(**RATES | config))
    assert not any(hasattr(module, "lorasp_dropkey") or module._forward_pre_hooks for module in model.modules())


def test_attention_that_cannot_be_hooked(monkeypatch):
    model = build(bert)
    monkeypatch.delattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    with pytest.raises(
        ValueError, match=r"BertSelfAttention\) of this transformers version does not; set attention_p=0"
    ):
        apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    assert apply_hiddenkey(model, HiddenKeyConfig(attention_p=0.0, hidden_p=0.1)).attention == {}


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (torch.ones(2, 5), {}, r"the attention mask must be \(B, 1, Sq, Sk\), got \(2, 5\)"),
        (None, {"softcap": 30.0}, "softcap is not supported; leave this layer out of HiddenKeyConfig.layers"),
    ],
)
def test_calls_dropkey_cannot_serve(mask, arguments, message):
    module, q = applied(llama).model.layers[2].self_attn, torch.ones(2, 4, 5, 8)
    with pytest.raises(ValueError, match=f"^dropkey_attention: {message}"):
        attention.attention_over_sdpa(module, q, q, q, mask, **arguments)


def test_wrong_types():
    with pytest.raises(TypeError, match=r"^apply_hiddenkey: model must be a torch.nn.Module, got int"):
        apply_hiddenkey(3, HiddenKeyConfig())
    with pytest.raises(TypeError, match=r"^apply_hiddenkey: config must be a HiddenKeyConfig, got dict"):
        apply_hiddenkey(build(llama), {})
