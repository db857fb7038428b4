"""merge, unmerge and unload: the same function, to the bit where nothing is merged, and nothing left behind."""

import copy
import pickle

import pytest
import torch
from adapted_models import Model, Shared, X, base, both, step
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, inject, testing
from lorasp.models.adapted import adapted_layers


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("name", ["default", "second"])
    def test_computes_the_same_and_unmerges_to_the_bit(self, name, dtype):
        model = both().to(dtype)
        lorasp.set_adapter(model, name)
        x, before = X.to(dtype), base(model)
        expected, state = model(x), copy.deepcopy(model.state_dict())
        exact = copy.deepcopy(model).double()(x.double())
        lorasp.merge(model)
        merged = model(x)
        single = copy.deepcopy(model).double()(x.double())  # of the weights as they were rounded
        testing.assert_close(merged, expected, single, dtype)
        if dtype != torch.bfloat16:
            testing.assert_close(merged, expected, exact, dtype)
        assert all(not p.requires_grad for n, p in model.named_parameters() if n.endswith(".weight") and "_proj" in n)
        with lorasp.disable_adapter(model):
            assert torch.equal(model(x), Model().eval().to(dtype)(x))
        lorasp.unmerge(model)
        assert base(model) == before
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
        assert torch.equal(model(x), expected)

    def test_is_rounded_once(self):
        layer = LoRALinear(7, 5, r=3, init_lora_weights=False, dtype=torch.bfloat16)
        wide = layer.weight.float() + layer.scale * (layer.lora_B.float() @ layer.lora_A.float())
        layer.merge()
        assert torch.equal(layer.weight, wide.bfloat16())

    def test_leaves_tied_weights_alone(self):
        model = both()
        tied, before = model.embedding.weight, model.embedding.weight.clone()
        lorasp.merge(model)
        assert model.embedding.weight is tied
        assert torch.equal(tied, before)
        assert model.blocks[1].out.weight is not tied
        lorasp.unmerge(model)
        assert model.blocks[1].out.weight is tied

    @pytest.mark.parametrize("move", [lambda m: m.double(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_unmerges_after_a_move_or_a_copy(self, move):
        model = both()
        lorasp.merge(model)
        model = move(model)
        lorasp.unmerge(model)
        assert torch.equal(model.blocks[1].out.weight, Model().blocks[1].out.weight.to(model.head.weight.dtype))
        assert model.blocks[1].out.weight is model.embedding.weight

    def test_without_the_base_there_is_no_way_back(self):
        model = both()
        lorasp.merge(model, keep_base=False)
        for call in (lorasp.unmerge, lambda m: lorasp.disable_adapter(m).__enter__()):
            with pytest.raises(ValueError, match="keep_base=False"):
                call(model)
        assert all(
            layer.merged_adapter == "default" for layer in adapted_layers(model).values() if layer.merged_adapter
        )

    def test_one_bad_layer_changes_nothing(self):
        model = both()
        with torch.no_grad():
            adapted_layers(model)["blocks.1.q_proj"].lora_B[2, 1] = torch.inf
        before = base(model)
        with pytest.raises(ValueError, match=r"must be finite.*blocks\.1\.q_proj"):
            lorasp.merge(model)
        assert base(model) == before

    def test_a_transposed_weight(self):
        transformers = pytest.importorskip("transformers")
        conv = transformers.pytorch_utils.Conv1D(9, 6)
        layer = LoRALinear.from_linear(conv, LoRAConfig(r=2, init_lora_weights=False))
        x = torch.randn(4, 6)
        expected, exact = layer(x), copy.deepcopy(layer).double()(x.double())
        layer.merge()
        assert layer.weight.shape == (6, 9)
        testing.assert_close(layer(x), expected, exact, torch.float32)


class TestMergedLayers:
    def test_keep_the_names_of_the_state_dict(self):
        model = both()
        names, count = list(model.state_dict()), len(list(model.parameters()))
        lorasp.merge(model)
        assert list(model.state_dict()) == names
        assert len(list(model.parameters())) <= count + 1  # the tied weight is its own again
        lorasp.unmerge(model)
        assert list(dict(model.named_parameters())) == list(dict(both().named_parameters()))
        assert len(model.blocks[0].q_proj._parameters) == 2

    @pytest.mark.parametrize("around", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
    def test_are_the_same_whatever_mode_they_are_made_in(self, around):
        model, plain = both(), both()
        lorasp.merge(plain)
        with around():
            lorasp.merge(model)
        assert torch.equal(model.blocks[0].q_proj.weight, plain.blocks[0].q_proj.weight)
        model(X.clone().requires_grad_()).sum().backward()


@pytest.mark.parametrize("merged", [False, True])
def test_unload_leaves_nothing_of_lorasp(merged):
    model = both()
    lorasp.set_adapter(model, "second")
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    model.blocks[0].q_proj.register_forward_hook(lambda *_: None)
    expected = Model().eval()(X)
    if merged:
        lorasp.merge(model)
        expected = model(X)
    lorasp.unload(model)
    assert torch.equal(model(X), expected)
    assert not any(type(module).__module__.startswith("lorasp") for module in model.modules())
    assert list(model.state_dict()) == list(Model().state_dict())
    assert not [key for key in vars(model) if key.startswith("lorasp")]
    assert len(model.blocks[0].q_proj._forward_hooks) == 1


def test_unload_a_layer_under_two_names():
    model = Shared()
    inject(model, LoRAConfig(r=2, target_modules=["a", "score"], init_lora_weights=False))
    lorasp.unload(model)
    assert type(model.a) is nn.Linear
    assert model.a is model.b
    assert torch.equal(model(X), Shared()(X))


def test_unload_undoes_the_recompute_that_inject_set_up():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, **sizes))
    kind = type(model.layers[0].mlp)
    inject(model, LoRAConfig(target_modules="all-linear", recompute_mlp=True))
    assert type(model.layers[0].mlp) is not kind
    lorasp.unload(model)
    assert type(model.layers[0].mlp) is kind
