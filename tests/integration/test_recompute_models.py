"""recompute_mlp in transformers models: each family's MLP, with what else acts on it; bytes of the toy Llama are in
test_memory.py."""

import copy

import hf_models
import pytest
import torch
import transformers
from hf_models import assert_same, batch, build, loss_and_gradients
from torch import nn

from lorasp import HiddenKeyConfig, LoRAConfig, apply_hiddenkey, inject, recompute_mlp, remove_hiddenkey
from lorasp.memory import saved_bytes

MODES = ("activation", "full")
ROWS, LENGTH, R = 3, 9, 4
M, I, SEED, GENERATOR = ROWS * LENGTH, 56, 8, torch.get_rng_state().numel()  # noqa: E741


def t5_gated() -> nn.Module:
    return hf_models.t5(feed_forward_proj="gated-gelu")


def gpt2() -> nn.Module:
    return hf_models.gpt2(n_inner=I)


def phi3() -> nn.Module:
    config = transformers.Phi3Config(**hf_models.TOKENS, **hf_models.GROUPED, **hf_models.SIZES, resid_pdrop=0.1)
    return transformers.Phi3ForCausalLM(config)


def vit() -> nn.Module:
    sizes = {name: size for name, size in hf_models.SIZES.items() if name != "vocab_size"}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=12, patch_size=4))


def inputs(make) -> dict:
    if make is vit:  # 8 patches and the class token
        pixels = torch.randn((ROWS, 3, 12, 12), generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "labels": torch.arange(ROWS) % 2}
    return batch(make, ROWS, LENGTH)


# Per token of an MLP whose A train: what is kept as it was, and the pre-activations, in tensors of I elements. GPT-2's
# GELU is written in Python (4 tensors); the CPU's dropout keeps its mask as a tensor like its input.
FAMILIES = {
    hf_models.llama: (4, 2),
    gpt2: (5, 1),
    hf_models.roberta: (2, 1),
    hf_models.t5: (3, 1),
    t5_gated: (8, 2),
    phi3: (4, 2),
    vit: (2, 1),
}


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_the_same_step_with_fewer_bytes(make):
    model, data = build(make), inputs(make)
    inject(model, LoRAConfig(r=R, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1))
    model.train()
    expected = loss_and_gradients(model, data)
    plain = saved_bytes(lambda: model(**data), exclude=model)
    before, pre = FAMILIES[make]
    dropped = make in (hf_models.t5, t5_gated)
    mlps = 2 * 3 if dropped else 3
    tokens = M + ROWS if make is vit else M
    for mode in MODES:
        report = recompute_mlp(model, mode)
        assert len(report.recomputed) == mlps * (2 if make is hf_models.roberta else 1)
        assert not report.skipped
        assert_same(loss_and_gradients(model, data), expected)
        spared = before * tokens * I * 4
        if mode == "activation":
            spared -= pre * tokens * I * 4 + GENERATOR * dropped
        else:  # and the low-rank products of the projections, with their one seed
            spared += (1 if make is phi3 else pre) * tokens * R * 4 + SEED
        assert plain - saved_bytes(lambda: model(**data), exclude=model) == mlps * spared


@pytest.mark.parametrize("make", [hf_models.llama, hf_models.t5, hf_models.roberta], ids=lambda make: make.__name__)
def test_hiddenkey_before_and_after(make):
    config = HiddenKeyConfig(**hf_models.RATES)
    model, data = build(make).train(), batch(make)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    apply_hiddenkey(model, config)
    expected = loss_and_gradients(model, data)
    apply_hiddenkey(first, config), recompute_mlp(first, "full")
    recompute_mlp(second, "activation"), apply_hiddenkey(second, config)
    for other in (first, second):
        assert_same(loss_and_gradients(other, data), expected)
    remove_hiddenkey(model), remove_hiddenkey(first)
    assert_same(loss_and_gradients(first, data), loss_and_gradients(model, data))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [hf_models.llama, t5_gated], ids=lambda make: make.__name__)
def test_gradient_checkpointing(make, reentrant, mode):
    model, data = build(make).train(), batch(make)
    inject(model, LoRAConfig(r=R, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = loss_and_gradients(model, data)
    plain = saved_bytes(lambda: model(**data), exclude=model)
    recompute_mlp(model, mode)
    assert_same(loss_and_gradients(model, data), expected)
    assert saved_bytes(lambda: model(**data), exclude=model) == plain


class TestPEFT:
    @pytest.mark.parametrize("dropout", [0.0, 0.2])
    def test_half_precision_with_fp32_adapters(self, dropout):
        model = hf_models.peft_model(build(hf_models.llama, torch.bfloat16), hf_models.llama, lora_dropout=dropout)
        model.train()
        data = batch(hf_models.llama)
        expected = loss_and_gradients(model, data)
        plain = saved_bytes(lambda: model(**data), exclude=model)
        for mode in MODES:
            recompute_mlp(model, mode)
            assert_same(loss_and_gradients(model, data), expected)
        recompute_mlp(model)
        # act(gate), and PEFT's fp32 copy of h, which it keeps in the product with its dropout mask if there is one.
        spared = plain - saved_bytes(lambda: model(**data), exclude=model)
        assert spared == 3 * M * I * (2 + (0 if dropout else 4))

    def test_adapters_switch(self):
        model = hf_models.peft_model(build(hf_models.llama), hf_models.llama)
        model.add_adapter("other", model.peft_config["default"])
        data = batch(hf_models.llama)
        plain = copy.deepcopy(model)
        recompute_mlp(model, "full")
        for one in (plain, model):
            one.set_adapter("other")
        assert_same(loss_and_gradients(model, data), loss_and_gradients(plain, data))
        with model.disable_adapter(), plain.disable_adapter(), torch.no_grad():
            assert torch.equal(model(**data).logits, plain(**data).logits)
        for one in (plain, model):
            one.merge_adapter()
        assert torch.equal(model(**data).logits, plain(**data).logits)


def test_4bit_layers():
    bnb = pytest.importorskip("bitsandbytes")
    model = build(hf_models.llama)
    mlps = [layer.mlp for layer in model.model.layers]
    for mlp in mlps:
        for name, layer in list(mlp.named_children()):
            if isinstance(layer, nn.Linear):
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                new.load_state_dict(layer.state_dict())
                setattr(mlp, name, new.to("cpu"))
    model.train().requires_grad_(False)
    model.enable_input_require_grads()
    data = batch(hf_models.llama)
    ids = model.get_input_embeddings()(data.pop("input_ids")).detach().requires_grad_()

    def step() -> list:
        ids.grad = None
        loss = model(inputs_embeds=ids, **data).loss
        loss.backward()
        return [loss.detach(), ids.grad]

    expected = step()
    plain = saved_bytes(lambda: model(inputs_embeds=ids, **data), exclude=model)
    for mode, kept in (("activation", 2 * I), ("full", 32)):
        recompute_mlp(model, mode)
        assert all(map(torch.equal, step(), expected))
        assert (
            plain - saved_bytes(lambda: model(inputs_embeds=ids, **data), exclude=model) == 3 * M * (3 * I - kept) * 4
        )


def test_distributed_data_parallel(process_group):
    model, data = build(hf_models.llama).train(), batch(hf_models.llama)
    inject(model, LoRAConfig(r=R, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.1))
    expected = loss_and_gradients(model, data)
    wrapped = nn.parallel.DistributedDataParallel(model)
    for mode in MODES:
        assert recompute_mlp(wrapped, mode).recomputed
        found = loss_and_gradients(wrapped, data)
        assert_same({name.removeprefix("module."): tensor for name, tensor in found.items()}, expected)
