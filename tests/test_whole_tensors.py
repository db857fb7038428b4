"""Biases and modules_to_save: each adapter has its own, the base keeps its."""

import copy

import pytest
import torch
from adapted_models import FIRST, IN, SECOND, Model, Shared, X, both, step, trainable
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, inject
from lorasp.models.adapted import adapted_layers


class TestWholeTensors:
    @pytest.mark.parametrize("config", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["a", "b", "c"]}])
    def test_modules_and_tensors_that_stand_twice(self, config, tmp_path):
        model, base = Shared(), Shared()
        inject(model, LoRAConfig(r=2, target_modules=["score" if "modules_to_save" in config else "c"], **config))
        with torch.no_grad():
            model.c.bias.fill_(7)
        expected = model(X)
        with lorasp.disable_adapter(model):
            assert torch.equal(model(X), base(X))
        assert torch.equal(model(X), expected)
        assert model.c.bias.requires_grad
        assert model.c.bias is model.a.bias is model.b.bias
        lorasp.save_adapter(model, tmp_path)
        fresh = Shared()
        lorasp.load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(X), expected)

    def test_the_state_dict_holds_what_waits(self):
        model = both()
        lorasp.set_adapter(model, "second")
        step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
        state, expected = copy.deepcopy(model.state_dict()), model(X)
        twin = both()
        for parameter in twin.parameters():  # another start, as a model made from a config has
            nn.init.normal_(parameter)
        with pytest.raises(RuntimeError, match="lorasp_whole"):  # the first adapter is active: not b's head for a's
            twin.load_state_dict(state)
        twin = both()
        lorasp.set_adapter(twin, "second")
        for parameter in twin.parameters():
            nn.init.normal_(parameter)
        twin.load_state_dict(state)
        assert torch.equal(twin(X), expected)
        with lorasp.disable_adapter(twin):
            assert torch.equal(twin(X), Model().eval()(X))
        lorasp.set_adapter(twin, "default")
        lorasp.set_adapter(model, "default")
        assert torch.equal(twin(X), model(X))

    def test_a_sequential_goes_on_computing(self):
        model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), nn.Linear(IN, 2))
        base = model(X)
        inject(model, LoRAConfig(r=2, target_modules=["0"]))
        assert len(model) == 3  # nothing stands in full: nothing is added
        inject(model, LoRAConfig(r=2, target_modules=["2"], bias="all"), "biases")
        lorasp.set_adapter(model, "biases")
        with torch.no_grad():
            model[0].bias.add_(1)
        assert model(X).shape == (len(X), 2)
        with lorasp.disable_adapter(model):
            assert torch.equal(model(X), base)

    def test_a_deleted_adapters_modules_are_free(self):
        model = both()
        lorasp.delete_adapter(model, "second")
        inject(model, LoRAConfig(target_modules=["head"]), "third")
        assert isinstance(model.head, LoRALinear)

    def test_what_has_no_data_changes_nothing(self):
        model = both()
        model.head.to("meta")
        with pytest.raises(ValueError, match=r"set_adapter: .* must be on a real device"):
            lorasp.set_adapter(model, "second")
        model.head.to_empty(device="cpu")
        lorasp.set_adapter(model, "second")
        assert torch.equal(model.head.weight, Model().head.weight)

    def test_they_are_no_parameters_of_the_model_s_size(self):
        model = Model()
        single = inject(model, SECOND)
        assert single.total == sum(p.numel() for p in Model().parameters()) + sum(
            a.r * 2 * IN for layer in adapted_layers(model).values() for a in layer.adapters.values()
        )
        second = inject(model, FIRST, "first")
        assert set(second.adapted) == {f"blocks.{i}.{n}" for i in (0, 1) for n in FIRST.target_modules}


def test_whole_tensors_in_shards_do_not_change():
    model = both()
    model.head.weight.placements = ()  # what a DTensor is known by
    before = trainable(model)
    with pytest.raises(ValueError, match=r"^set_adapter: .* must be whole .*, head\.weight is sharded"):
        lorasp.set_adapter(model, "second")
    assert trainable(model) == before
    assert {layer.active_adapter for layer in adapted_layers(model).values()} == {"default"}
