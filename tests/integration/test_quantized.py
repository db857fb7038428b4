"""One layer over a quantised weight: its own product and dx to the bit, the rule, and nothing full-size kept."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from quantized_layers import CONFIG, KINDS, LINEAR, K, M, N, R, dequantised, quantised
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import (
    LoRAConfig,
    LoRALinear,
    QuantizedLoRALinear,
    frozen_base,
    quantized_lora_linear,
    testing,
    use_backend,
)
from lorasp.memory import saved_bytes


def adapter(dtype: torch.dtype = torch.float32, zero: bool = False) -> tuple[Tensor, Tensor]:
    """A and B as large as the layer's own term, or B zero."""
    inputs = testing.make_inputs(1, K, N, R, dtype)
    A, B = (inputs[name].to(dtype) for name in ("lora_A", "lora_B"))
    return A.requires_grad_(), (B * 0 if zero else B).requires_grad_()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_product_and_dx_are_the_layer_s_own_to_the_bit(kind, training):
    for dtype in (torch.float32, torch.bfloat16):
        layer = quantised(kind, dtype).train(training)
        base, factors = frozen_base(layer), adapter(zero=True)
        x = torch.randn(2, M // 2, K).to(dtype).requires_grad_()
        dy = torch.randn(2, M // 2, N).to(dtype)
        own, ours = layer(x), quantized_lora_linear(x, base, *factors).mul_(1)  # may be written to
        assert torch.equal(ours, own)
        for have, want in zip(torch.autograd.grad(ours, x, dy), torch.autograd.grad(own, x, dy), strict=True):
            assert torch.equal(have, want)
        with torch.no_grad():  # in eval mode bitsandbytes packs its 4-bit weight for the CPU here
            x = x.detach()
            other = quantised(kind, dtype).train(training)
            assert torch.equal(quantized_lora_linear(x, base, *factors), other(x))
            for shape in ((), (0,), (2, 1, 3)):
                assert quantized_lora_linear(x.new_ones(*shape, K), base, *factors).shape == (*shape, N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fp4 bf16"])
def test_one_layer_meets_the_rule(kind, dtype):
    layer, (A, B), p = quantised(kind, dtype), adapter(), 0.1
    weight, bias = dequantised(layer), layer.bias
    inputs = testing.make_inputs(M, K, N, R, dtype)
    leaves = [inputs["x"].requires_grad_(), A, B]
    options = {"scale": 2.0, "dropout_p": p, "seed": 3}

    def step(function, dtype=dtype, leaves=leaves):
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, inputs["dy"].to(dtype))

    def formula(dtype):
        return lambda x, A, B: lorasp.lora_linear(x, weight.to(dtype), A, B, bias.to(dtype), **options)

    actual = step(lambda x, A, B: quantized_lora_linear(x, frozen_base(layer), A, B, **options))
    with use_backend("reference"):
        reference = step(formula(dtype))
        leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
        reference64 = step(formula(torch.float64), torch.float64, leaves64)
    for name, *tensors in zip(("y", "dx", "dA", "dB"), actual, reference, reference64, strict=True):
        testing.assert_close(*tensors, dtype, name)
    assert [tensor.dtype for tensor in actual] == [dtype, dtype, torch.float32, torch.float32]


@pytest.mark.parametrize("x_needs_grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_what_the_adapter_needs_and_nothing_of_full_size(kind, x_needs_grad):
    layer = quantised(kind)
    x = torch.randn(M, K, requires_grad=x_needs_grad)
    for freeze_A in (False, True):
        module = QuantizedLoRALinear.from_linear(layer, LoRAConfig(r=R, freeze_A=freeze_A, lora_dropout=0.1))
        seed = 8 if x_needs_grad or not freeze_A else 0
        assert saved_bytes(lambda m=module: m(x), exclude=module) == M * (K * (not freeze_A) + R) * 4 + seed
    if "torchao" in kind and x_needs_grad:  # what the product keeps by itself: a whole weight
        assert saved_bytes(lambda: layer(x), exclude=layer) >= N * K * 4


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_not_hidden_from_the_hooks(kind):
    """With A frozen x is gone after the forward; bitsandbytes' own int8 function keeps it as an attribute."""
    layer = quantised(kind)

    def outlives(function) -> bool:
        x = torch.randn(M, K, requires_grad=True) + 1
        y, alive = function(x), weakref.ref(x)
        del x
        return y.requires_grad and alive() is not None

    assert not outlives(QuantizedLoRALinear.from_linear(layer, LoRAConfig(r=R, freeze_A=True)))
    assert outlives(layer) == ("int8" in kind)


@pytest.mark.parametrize("kind", ["nf4", "int8 outliers", "torchao"])
def test_checkpointed_layers_and_dropout(kind):
    module = QuantizedLoRALinear.from_linear(quantised(kind), replace(CONFIG, lora_dropout=0.5))
    x = torch.randn(M, K, requires_grad=True)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(1)
        y = checkpoint(module, x, use_reentrant=False) if wrapped else module(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, module.lora_A, module.lora_B]))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("kind", ["nf4", "nf4 flat", "fp4 bf16"])
def test_a_weight_packed_for_inference_trains_again(kind):
    """bitsandbytes packs in eval mode, has no backward for it, and unpacks flat statistics transposed."""
    layer = quantised(kind)
    if not layer.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs 4-bit weights on CPUs with AVX512-BF16 only")
    module, before = QuantizedLoRALinear.from_linear(layer, CONFIG), dequantised(layer)
    nearly = torch.finfo(torch.bfloat16).eps * before.abs().max()  # what packing rounds the statistics to
    x = torch.randn(M, K, requires_grad=True)
    expected, y = (torch.autograd.grad(module(x).sum(), x), module(x))
    module.eval()(torch.randn(M, K))  # between a forward and its backward
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected[0])
    for save in (False, True):
        module.eval()(torch.randn(M, K))
        assert layer.weight.quant_state.packing_format_for_cpu
        assert saved_bytes(lambda: module(torch.randn(M, K)), exclude=module) == M * (K + R) * 4
        if save:
            module.state_dict()
        x = torch.randn(M, K, requires_grad=True)
        y = module.train()(x)
        assert not layer.weight.quant_state.packing_format_for_cpu
        assert (dequantised(layer) - before).abs().max() <= nearly
        dx = torch.autograd.grad(y, x, torch.ones_like(y))[0]
        low_rank = torch.ones_like(y) @ (module.scale * module.lora_B @ module.lora_A)
        dtype = layer.compute_dtype
        exact = torch.ones_like(y).double() @ dequantised(layer).double() + low_rank.double()
        reference = (torch.ones_like(y).to(dtype) @ dequantised(layer).to(dtype)).float() + low_rank
        testing.assert_close(dx, reference, exact, dtype)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_the_layer_inside_stays_itself(kind):
    layer = quantised(kind)
    expected, keys = layer(torch.ones(3, K)), list(layer.state_dict())
    module = QuantizedLoRALinear.from_linear(layer, replace(CONFIG, init_lora_weights=True))
    assert module.base_layer is layer
    assert (module.in_features, module.out_features, module.bias) == (K, N, layer.bias)
    names = ["adapters.default.lora_A", "adapters.default.lora_B", *(f"base_layer.{key}" for key in keys)]
    assert sorted(module.state_dict()) == sorted(names)
    for same in (copy.deepcopy(module), module.to("cpu")):
        assert torch.equal(same(torch.ones(3, K)), expected)
    module.bfloat16()
    assert module.lora_A.dtype == torch.bfloat16
    assert module(torch.ones(3, K).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4 bf16", "int8", "torchao"])
def test_autocast_gives_what_the_layer_gives(kind):
    layer, (A, B) = quantised(kind), adapter(zero=True)
    x = torch.randn(M, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected, y = layer(x), quantized_lora_linear(x, frozen_base(layer), A, B)
    assert (y.dtype, torch.equal(y, expected)) == (expected.dtype, True)
    for leaf, gradient in zip((x, A, B), torch.autograd.grad(y.sum(), (x, A, B)), strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.isfinite().all()


def test_compiles_fullgraph_without_recompiling_for_new_sizes():
    torch._dynamo.reset()
    module = QuantizedLoRALinear.from_linear(quantised("nf4"), CONFIG)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    module(torch.ones(2, K))  # bitsandbytes finishes its layers in their first forward
    counts = []
    for rows in (8, 2, 33):
        x = torch.randn(rows, K, requires_grad=True)
        leaves = [x, module.lora_A, module.lora_B]
        y, expected = compiled(x), module(x)
        assert torch.equal(y, expected)
        for have, want in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (y, expected)), strict=True):
            assert torch.equal(have, want)
        counts.append(counter.frame_count)
    assert counts == [counts[0]] * 3


def test_second_derivatives_raise():
    x = torch.randn(M, K, requires_grad=True)
    y = quantized_lora_linear(x, frozen_base(quantised("int8")), *adapter())
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_merging_and_misuse_are_refused():
    layer = quantised("nf4")
    module = QuantizedLoRALinear.from_linear(layer, CONFIG)
    with pytest.raises(ValueError, match="merge: the weight must not be quantised, got Linear4bit"):
        module.merge()
    with pytest.raises(TypeError, match="must be made by inject"):
        QuantizedLoRALinear(K, N)
    with pytest.raises(TypeError, match="must be a quantised linear layer: Linear is not quantised"):
        QuantizedLoRALinear.from_linear(LINEAR, CONFIG)
    for kind in ("nf4", "torchao"):
        with pytest.raises(TypeError, match=r"must be a plain Parameter, got a (Params4bit|Int8Tensor)"):
            LoRALinear.from_linear(quantised(kind), CONFIG)
    module.base_layer = LINEAR
    with pytest.raises(ValueError, match="base_layer must be a quantised linear layer"):
        module(torch.randn(M, K))
    base, (A, B) = frozen_base(layer), adapter()
    for message, arguments in {
        "base must be a FrozenBase": (torch.zeros(2, K), layer, A, B),
        "x must be a Tensor, got list": ([1.0], base, A, B),
        r"x must be \(..., 128\), got \(2, 7\)": (torch.zeros(2, 7), base, A, B),
        "x must be torch.float64": (torch.zeros(2, K, dtype=torch.int64), base, A, B),
        "x must be on cpu like the layer": (torch.zeros(2, K, device="meta"), base, A, B),
        r"lora_B must be \(96, 4\)": (torch.zeros(2, K), base, A, A),
    }.items():
        with pytest.raises((TypeError, ValueError), match=f"quantized_lora_linear: {message}"):
            quantized_lora_linear(*arguments)
