"""LoRA-SP in a transformers model: groups, gradient checkpointing, resampling, clipping, mid-training files."""

import copy
import itertools

import pytest
import torch
import transformers
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialAdamW, PartialConfig, inject, load_adapter, save_adapter

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = torch.arange(40).reshape(4, 10) % 48


def base() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).train()


def adapted(**partial) -> nn.Module:
    model = base()
    torch.manual_seed(1)
    inject(model, LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear", partial=PartialConfig(**partial)))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return PartialAdamW(model, lr=2e-2)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def values(model: nn.Module) -> list[torch.Tensor]:
    return [factor.detach().clone() for layer in layers(model).values() for factor in (layer.lora_A, layer.lora_B)]


def masks(model: nn.Module) -> list[torch.Tensor]:
    return [mask for layer in layers(model).values() for mask in (layer.trainable_mask_A(), layer.trainable_mask_B())]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("resample", ["never", 2, "epoch"])
@pytest.mark.parametrize("granularity", ["feature", "element", "rank", "matrix"])
def test_what_trains_learns_and_what_rests_keeps_its_bits(granularity, resample):
    model = adapted(granularity=granularity, resample=resample)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer, losses = optimizer_of(model), []
    for number in range(8):
        active, before = masks(model), values(model)
        losses.append(step(model, optimizer))
        for mask, old, new in zip(active, before, values(model), strict=True):
            assert torch.equal(old[~mask], new[~mask])
        again = [torch.equal(old, new) for old, new in zip(active, masks(model), strict=True)]
        assert all(again) is not (resample == 2 and number % 2 == 1)
        if resample == "epoch" and number == 3:
            lorasp.resample(model)
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_layers_on_one_input_have_one_feature_set_through_every_resampling():
    model = adapted(resample="epoch")
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    seen = []
    for _ in range(3):
        q, k, v = (layer.trainable_mask_A()[0] for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert torch.equal(mlp.gate_proj.trainable_mask_A()[0], mlp.up_proj.trainable_mask_A()[0])
        assert not torch.equal(q, attention.o_proj.trainable_mask_A()[0])
        seen.append(q)
        lorasp.resample(model)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("granularity", ["feature", "element"])
def test_gradient_checkpointing_changes_nothing(granularity, use_reentrant):
    model = adapted(granularity=granularity)
    twin = copy.deepcopy(model)
    twin.enable_input_require_grads()
    twin.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for one in (model, twin):
        step(one, optimizer_of(one))
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(twin), strict=True))


@pytest.mark.parametrize("granularity", ["feature", "element", "rank", "matrix"])
def test_training_goes_on_from_files(granularity, tmp_path):
    model = adapted(granularity=granularity, resample=2)
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    save_adapter(model, tmp_path)
    load_adapter(loaded := base(), tmp_path)
    other = optimizer_of(loaded)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(4):
        step(model, optimizer)
        step(loaded, other)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(loaded), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(masks(model), masks(loaded), strict=True))
