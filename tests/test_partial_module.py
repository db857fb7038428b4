"""A LoRA-SP layer is a module like others: copied, stored, moved, compiled, checkpointed, checked."""

import copy
import io
import pickle

import pytest
import torch
from partial_layers import GRANULARITIES, RESAMPLES, K, N, R, layer_with_values, masks, trained, width
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import LoRALinear, PartialConfig, testing


class TestModule:
    """What modules go through."""

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_state_dict_keys(self, granularity, freeze_A):
        layer = LoRALinear(K, N, r=R, partial=PartialConfig(0.5, granularity), freeze_A=freeze_A)
        A = {"lora_A"} if freeze_A else {"lora_A_packed", "frozen_A", "active_A"}
        keys = {f"adapters.default.{name}" for name in {*A, "lora_B_packed", "active_B"}}
        assert set(layer.state_dict()) == {"weight", "bias", *keys}
        layer.requires_grad_(True)
        trainable = {name for name, parameter in layer.named_parameters() if "adapters" in name}
        assert trainable == {key for key in keys if key.endswith("packed")}

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
    def test_copies_compute_and_train_the_same(self, way, granularity, resample, freeze_A):
        layer, x = layer_with_values(granularity, resample, freeze_A=freeze_A), torch.randn(6, K)
        if way == "deepcopy":
            twin = copy.deepcopy(layer)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(layer))
        elif way == "torch.save":
            torch.save(layer, file := io.BytesIO())
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        else:
            twin = layer_with_values(granularity, resample, seed=9, freeze_A=freeze_A)
            assert not all(torch.equal(a, b) for a, b in zip(masks(twin), masks(layer), strict=True))
            twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), layer(x))
        assert all(torch.equal(a, b) for a, b in zip(masks(twin), masks(layer), strict=True))
        for one in (layer, twin):
            one(x).square().sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(trained(twin), trained(layer), strict=True))

    def test_a_state_dict_brings_a_selection_of_another_size(self):
        short, full = (
            layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == size))
            for size in (488, 512)
        )
        parameters, x = trained(short), torch.randn(3, 1000)
        short.load_state_dict(full.state_dict())
        assert trained(short)[0] is parameters[0]
        assert torch.equal(short(x), full(x))

    def test_a_dense_state_dict_is_refused_by_name(self):
        with pytest.raises(RuntimeError, match=r"Missing key.*lora_A_packed[\s\S]*Unexpected key.*lora_A"):
            LoRALinear(K, N, r=R, partial=PartialConfig()).load_state_dict(LoRALinear(K, N, r=R).state_dict())

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_to_dtype(self, granularity):
        layer = layer_with_values(granularity).to(torch.bfloat16)
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.bfloat16
        layer(torch.randn(2, K, dtype=torch.bfloat16)).sum().backward()
        assert {parameter.grad.dtype for parameter in trained(layer)} == {torch.bfloat16}

    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "matrix"])
    def test_meta_device_has_shapes_and_can_be_made_real(self, granularity, resample):
        partial = PartialConfig(0.5, granularity, resample)
        layer = LoRALinear(K, N, r=R, partial=partial, device="meta")
        assert layer(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
        layer.to_empty(device="cpu").reset_parameters()
        real = LoRALinear(K, N, r=R, partial=partial)
        assert all(torch.equal(a, b) for a, b in zip(masks(layer), masks(real), strict=True))
        x = torch.randn(2, K)
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        testing.assert_close(layer(x), plain, exact, torch.float32)

    @pytest.mark.parametrize("resample", RESAMPLES)
    @pytest.mark.parametrize("granularity", ["feature", "element", "matrix"])
    def test_compiles_in_one_graph(self, granularity, resample):
        layer, x = layer_with_values(granularity, resample, lora_dropout=0.5), torch.randn(6, K)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        layer.eval()
        assert torch.equal(compiled(x), layer(x))

    @pytest.mark.parametrize("granularity", ["feature", "rank"])
    def test_a_compiled_layer_follows_its_resampling(self, granularity):
        layer, x = layer_with_values(granularity, "epoch"), torch.randn(6, K)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            layer.zero_grad()
            compiled(x).square().sum().backward()
            for factor, mask in zip((layer.lora_A, layer.lora_B), masks(layer), strict=True):
                assert not factor.grad[~mask].any()
                assert factor.grad[mask].all()
            lorasp.resample(layer)

    def test_a_layer_on_the_meta_device_takes_a_state_dict_as_it_is(self):
        real = layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == 488))
        meta = layer_with_values(in_features=1000, seed=next(s for s in range(20) if width(s) == 512), device="meta")
        meta.load_state_dict(real.state_dict(), assign=True)
        x = torch.randn(3, 1000)
        assert torch.equal(meta(x), real(x))

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_autocast_computes_in_its_dtype(self, granularity):
        layer, x = layer_with_values(granularity), torch.randn(6, K, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert y.dtype == torch.bfloat16
        assert {x.grad.dtype, *(parameter.grad.dtype for parameter in trained(layer))} == {torch.float32}

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_activation_checkpointing_redraws_the_same_mask(self, granularity, use_reentrant):
        """After eval mode the arguments are checked again in the forward, but not in its recompute."""
        layer, x = layer_with_values(granularity, lora_dropout=0.5), torch.randn(16, K, requires_grad=True)
        gradients = []
        for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
            layer.eval()(x)
            layer.train()
            torch.manual_seed(3)
            function(x).square().sum().backward()
            gradients.append([leaf.grad for leaf in (x, *trained(layer))])
            x.grad = None
            layer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(N, K - 1), False)),
                r"weights\[0\] must be",
            ),
            (lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(1), False)), r"biases\[0\] must be"),
            (lambda layer: setattr(trained(layer)[1], "data", torch.zeros(1, R)), r"lora_Bs\[0\] must be"),
            (lambda layer: layer.adapters.to("meta"), "must be on cpu like x, got meta"),
        ],
    )
    def test_what_changes_after_a_call_is_checked_again(self, change, message):
        layer, x = layer_with_values(), torch.randn(2, K)
        for _ in range(2):
            layer(x)
        change(layer)
        with pytest.raises(ValueError, match=message):
            layer(x)

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_what_trains_may_be_cast_alone(self, granularity, freeze_A):
        layer = layer_with_values(granularity, freeze_A=freeze_A, dtype=torch.bfloat16)
        x, before = torch.randn(2, K, dtype=torch.bfloat16), (layer.lora_A.float(), layer.lora_B.float())
        y = layer(x)
        for parameter in trained(layer):
            parameter.data = parameter.data.float()
        assert torch.equal(layer(x), y)
        assert all(torch.equal(new, old) for new, old in zip((layer.lora_A, layer.lora_B), before, strict=True))
        layer.set_lora(*before)
        assert torch.equal(layer(x), y)

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_what_trains_may_be_cast_alone_under_autocast_too(self, granularity, backend):
        """At every call: the frozen part's half is another than autocast's."""
        layer = layer_with_values(granularity, dtype=torch.bfloat16)
        for parameter in trained(layer):
            parameter.data = parameter.data.float()
        x = torch.randn(2, K)
        with lorasp.use_backend(backend), torch.autocast("cpu", torch.float16):
            first, second = layer(x), layer(x)
        assert first.dtype == torch.float16
        assert torch.equal(first, second)

    def test_prepacked_weights_serve_it(self):
        if lorasp.available_backends()["cpp"] is not None:
            pytest.skip("packed weights need the C++ backend")
        layer, x = layer_with_values(prepack=True), torch.randn(6, K)
        exact = copy.deepcopy(layer).double()
        exact.prepack = False
        plain = nn.functional.linear(x, layer.weight, layer.bias) + layer.scale * (
            x @ layer.lora_A.t() @ layer.lora_B.t()
        )
        testing.assert_close(layer(x), plain, exact(x.double()), torch.float32)
        assert layer.packed is not None

    def test_says_what_it_is(self):
        text = repr(LoRALinear(K, N, r=R, partial=PartialConfig(0.25, "element", 10)))
        assert "trainable_ratio=0.25, granularity='element', resample=10" in text
