"""LoRALinear: a drop-in nn.Linear whose weight is frozen, whatever is done to modules afterwards."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import LoRAConfig, LoRALinear, testing

K, N, R = 40, 24, 4


def layer_with_values(**arguments) -> LoRALinear:
    """A layer whose low-rank term is as large as the frozen one."""
    torch.manual_seed(0)
    layer = LoRALinear(K, N, r=R, lora_alpha=2 * R, init_lora_weights=False, **arguments)
    with torch.no_grad():
        layer.lora_A.mul_(2)
    return layer


def composition(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    """The plain PyTorch formula on the layer's own tensors."""
    low_rank = x @ layer.lora_A.to(x.dtype).t() @ layer.lora_B.to(x.dtype).t()
    return nn.functional.linear(x, layer.weight, layer.bias) + layer.scale * low_rank


def gradients(y: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_the_formula(dtype, adapter_dtype, bias):
    layer = layer_with_values(bias=bias, dtype=dtype, adapter_dtype=adapter_dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(3, 5, K, dtype=dtype, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    actual = gradients(layer(x), x, layer.lora_A, layer.lora_B)
    reference = gradients(composition(layer, x), x, layer.lora_A, layer.lora_B)
    reference64 = gradients(composition(exact, x64), x64, exact.lora_A, exact.lora_B)
    for what, *tensors in zip(("y", "dx", "dA", "dB"), actual, reference, reference64, strict=True):
        testing.assert_close(*tensors, dtype, what)
    assert actual[2].dtype == actual[3].dtype == (adapter_dtype or dtype)


def test_no_call_asks_whether_autocast_is_available(monkeypatch):
    """Dynamo of torch 2.11 cannot trace that question: no layer compiled into one graph there."""
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_with_values()(x).dtype == torch.bfloat16
    assert layer_with_values()(x).dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computes_the_formula_on_a_gpu_in_a_compiled_graph_too(dtype, freeze_A):
    torch.manual_seed(0)
    layer = LoRALinear(1024, 768, r=16, init_lora_weights=False, freeze_A=freeze_A, dtype=dtype, device="cuda")
    x = torch.randn(2048, 1024, dtype=dtype, device="cuda", requires_grad=True)
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    leaves = ("lora_B",) if freeze_A else ("lora_A", "lora_B")
    reference = gradients(composition(layer, x), x, *(getattr(layer, name) for name in leaves))
    reference64 = gradients(composition(exact, x64), x64, *(getattr(exact, name) for name in leaves))
    for module in (layer, torch.compile(layer, fullgraph=True)):
        actual = gradients(module(x), x, *(getattr(layer, name) for name in leaves))
        for what, *tensors in zip(("y", "dx", *leaves), actual, reference, reference64, strict=True):
            testing.assert_close(*tensors, dtype, what)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 16 / R), (True, 16 / math.sqrt(R))])
def test_scale(use_rslora, scale):
    assert LoRALinear(K, N, r=R, lora_alpha=16, use_rslora=use_rslora).scale == scale


@pytest.mark.parametrize(
    ("init", "A_std", "B_std"),
    [(True, (3 * K) ** -0.5, 0.0), ("gaussian", 1 / 16, 0.0), (False, (3 * K) ** -0.5, (3 * 16) ** -0.5)],
)
def test_initial_values_have_the_documented_spread(init, A_std, B_std):
    torch.manual_seed(0)
    layer = LoRALinear(K, 400, r=16, init_lora_weights=init)
    assert layer.lora_A.std().item() == pytest.approx(A_std, rel=0.1)
    assert layer.lora_B.std().item() == pytest.approx(B_std, rel=0.1)
    before = layer.lora_A.clone()
    layer.reset_lora_parameters()
    assert not torch.equal(layer.lora_A, before)


@pytest.mark.parametrize("freeze_A", [False, True])
def test_only_the_adapter_trains_and_a_frozen_A_cannot_be_thawed(freeze_A):
    layer = LoRALinear(K, N, r=R, freeze_A=freeze_A)
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    both = {"adapters.default.lora_A", "adapters.default.lora_B"}
    assert trainable == (both - {"adapters.default.lora_A"} if freeze_A else both)
    layer.requires_grad_(True)
    layer.train()
    assert layer.lora_A.requires_grad is not freeze_A
    assert set(layer.state_dict()) == {"weight", "bias", *both}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_from_linear_shares_the_parameters_and_freezes_them(bias):
    linear = nn.Linear(K, N).eval()
    weight, own_bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, LoRAConfig(r=R, bias=bias))
    assert layer.weight is weight
    assert layer.bias is own_bias
    assert not weight.requires_grad
    assert own_bias.requires_grad is (bias != "none")
    assert not layer.training
    assert (layer.in_features, layer.out_features) == (K, N)


def test_an_unfrozen_base_trains_too():
    layer = layer_with_values()
    layer.requires_grad_(True)
    x = torch.randn(6, K)
    exact = copy.deepcopy(layer).double()
    leaves = ("weight", "bias", "lora_A", "lora_B")
    actual = gradients(layer(x), *(getattr(layer, name) for name in leaves))
    reference = gradients(composition(layer, x), *(getattr(layer, name) for name in leaves))
    reference64 = gradients(composition(exact, x.double()), *(getattr(exact, name) for name in leaves))
    for what, *tensors in zip(("y", *leaves), actual, reference, reference64, strict=True):
        testing.assert_close(*tensors, torch.float32, what)


def test_conv1d_keeps_its_transposed_weight():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv = Conv1D(N, K)
    layer = LoRALinear.from_linear(conv, LoRAConfig(r=R, init_lora_weights=False))
    assert layer.weight is conv.weight
    assert (layer.in_features, layer.out_features) == (K, N)
    x = torch.randn(6, K)
    exact = copy.deepcopy(layer).double()
    plain = conv(x) + layer.scale * (x @ layer.lora_A.t() @ layer.lora_B.t())
    plain64 = copy.deepcopy(conv).double()(x.double())
    plain64 = plain64 + layer.scale * (x.double() @ exact.lora_A.t() @ exact.lora_B.t())
    testing.assert_close(layer(x), plain, plain64, torch.float32)


def test_dropout_is_for_training_and_follows_manual_seed():
    layer = layer_with_values(lora_dropout=0.5)
    x = torch.randn(16, K)

    def seeded():
        torch.manual_seed(3)
        return layer(x)

    first = seeded()
    assert torch.equal(first, seeded())
    assert not torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x), lorasp.lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scale=2.0))


def test_activation_checkpointing_redraws_the_same_mask():
    layer = layer_with_values(lora_dropout=0.5)
    x = torch.randn(16, K, requires_grad=True)
    torch.manual_seed(3)
    plain = gradients(layer(x), x, layer.lora_A, layer.lora_B)
    torch.manual_seed(3)
    again = gradients(checkpoint(layer, x, use_reentrant=False), x, layer.lora_A, layer.lora_B)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_compute_the_same_and_share_nothing(way, freeze_A):
    layer, x = layer_with_values(freeze_A=freeze_A), torch.randn(6, K)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    elif way == "torch.save":
        torch.save(layer, file := io.BytesIO())
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = LoRALinear(K, N, r=R, lora_alpha=2 * R, freeze_A=freeze_A)
        twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.lora_A.zero_()
    assert not torch.equal(twin(x), layer(x))


def test_a_checkpoint_of_the_plain_linear_loads_into_it():
    linear, layer = nn.Linear(K, N), LoRALinear(K, N, r=R)
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(missing) == {"adapters.default.lora_A", "adapters.default.lora_B"}
    assert not unexpected
    assert torch.equal(layer.weight, linear.weight)


def test_to_dtype_takes_a_frozen_A_along():
    layer = layer_with_values(freeze_A=True).to(torch.bfloat16)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.bfloat16}
    assert layer(torch.randn(2, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("freeze_A", [False, True])
def test_meta_device_has_shapes_and_can_be_made_real(freeze_A):
    layer = LoRALinear(K, N, r=R, freeze_A=freeze_A, device="meta")
    assert layer(torch.empty(2, 3, K, device="meta")).shape == (2, 3, N)
    layer.to_empty(device="cpu").reset_parameters()
    x = torch.randn(2, K)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    testing.assert_close(layer(x), plain, exact, torch.float32)


@pytest.mark.parametrize("prepack", [False, True])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_compiles_in_one_graph(freeze_A, prepack):
    layer, x = layer_with_values(freeze_A=freeze_A, lora_dropout=0.5, prepack=prepack), torch.randn(6, K)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert layer.lora_B.grad.isfinite().all()
    layer.eval()
    layer.prepack = False
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("masters", [None, torch.float32])
def test_autocast_computes_in_its_dtype(masters):
    layer, x = layer_with_values(adapter_dtype=masters), torch.randn(6, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32


class TestPrepack:
    """The cache around pack_weight; what the packed layout computes is the operator's test."""

    @pytest.fixture
    def packs(self, monkeypatch):
        made = []

        def pack(weight):
            made.append(weight.clone())
            return lorasp.PackedWeight(weight.new_empty(0), weight.new_empty(0))

        monkeypatch.setattr("lorasp.layers.lora_linear.pack_weight", pack)
        with lorasp.use_backend("reference"):
            yield made

    def test_is_made_once_and_again_when_the_weight_changes(self, packs):
        layer, x = layer_with_values(prepack=True), torch.randn(2, K)
        for change in (
            lambda: None,
            lambda: layer.weight.data.add_(0),  # through .data: invisible, as documented
            lambda: layer.weight.detach().add_(1),
            lambda: layer.load_state_dict(layer.state_dict()),
            lambda: setattr(layer.weight, "data", layer.weight.data.clone()),
            lambda: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone(), requires_grad=False)),
            layer.double,
            layer.drop_packed,
        ):
            layer(x)
            change()
            x = x.to(layer.weight.dtype)
        layer(x)
        assert len(packs) == 7
        assert torch.equal(packs[-1], layer.weight)

    def test_stays_out_of_the_state_dict_and_of_copies(self, packs):
        layer = layer_with_values(prepack=True)
        layer(torch.randn(2, K))
        assert set(layer.state_dict()) == {"weight", "bias", "adapters.default.lora_A", "adapters.default.lora_B"}
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._packed is None
            assert twin.prepack

    def test_follows_autocast(self, packs):
        layer, x = layer_with_values(prepack=True), torch.randn(2, K)
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        assert [weight.dtype for weight in packs] == [torch.float32, torch.bfloat16]

    def test_computes_the_same_where_the_kernels_exist_and_says_so_where_not(self):
        layer, x = layer_with_values(prepack=True), torch.randn(6, K, requires_grad=True)
        if lorasp.available_backends()["cpp"] is not None:
            with pytest.raises(ValueError, match="pack_weight: not built"):
                layer(x)
            return
        actual = gradients(layer(x), x, layer.lora_A, layer.lora_B)
        reference = gradients(composition(layer, x), x, layer.lora_A, layer.lora_B)
        exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
        reference64 = gradients(composition(exact, x64), x64, exact.lora_A, exact.lora_B)
        for what, *tensors in zip(("y", "dx", "dA", "dB"), actual, reference, reference64, strict=True):
            testing.assert_close(*tensors, torch.float32, what)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "LoRALinear: in_features must be an int >= 1, got 0"),
        ({"out_features": 2.5}, "LoRALinear: out_features must be an int >= 1, got 2.5"),
        ({"r": 0}, "LoRALinear: r must be an int >= 1, got 0"),
        ({"lora_dropout": 1.0}, "LoRALinear: lora_dropout must be in"),
        ({"dtype": torch.float64, "adapter_dtype": torch.float32}, "LoRALinear: adapter_dtype must be None"),
        ({"dtype": torch.float8_e4m3fn}, "LoRALinear: dtype must be torch.float64"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LoRALinear(**({"in_features": K, "out_features": N} | arguments))


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (nn.Embedding(4, 4), "linear must be nn.Linear or Conv1D, got Embedding"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "weight must be a Parameter, got a computed one"),
        (nn.Linear(4, 4).to(torch.float8_e4m3fn), "weight must be torch.float64, .* got torch.float8_e4m3fn"),
    ],
)
def test_from_linear_refuses(linear, message):
    with pytest.raises(TypeError, match=f"LoRALinear.from_linear: {message}"):
        LoRALinear.from_linear(linear, LoRAConfig())


def test_says_what_it_is():
    text = repr(LoRALinear(K, N, r=R, freeze_A=True, lora_dropout=0.1, prepack=True))
    for word in (f"in_features={K}", f"out_features={N}", "bias=True", f"r={R}", "freeze_A=True", "prepack=True"):
        assert word in text
