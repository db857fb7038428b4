"""Quantised bases: their own product and dx to the bit, PEFT's numbers within the rule, and nothing full-size kept."""

import copy
import warnings
import weakref
from dataclasses import replace
from functools import partial as part

import pytest
import torch
import transformers
from quantized_layers import KINDS, K, M, N, R, bnb, dequantised, quantised, torchao, weight_only
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import (
    LoRAConfig,
    LoRALinear,
    PartialConfig,
    QuantizedLoRALinear,
    frozen_base,
    inject,
    quantized_lora_linear,
    testing,
    use_backend,
)
from lorasp.memory import saved_bytes
from lorasp.models.inject import adapted_layers


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


def llama(layer_of=None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small Llama, its linear layers but the head replaced by layer_of(linear)."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if layer_of is not None and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer_of(module))
    return model.train()


def plain(linear_of: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A model of the same weights, dequantised, for the fp64 reference."""
    model = llama(dtype=dtype)
    for name, module in linear_of.named_modules():
        if frozen_base(module) is not None:
            model.get_submodule(name).weight.data = dequantised(module).to(dtype)
    return model


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LoRAConfig(r=R, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
FAMILIES = {"nf4": "is_loaded_in_4bit", "int8": "is_loaded_in_8bit", "torchao": "is_quantized"}


def peft_model(model: nn.Module, kind: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    setattr(model, FAMILIES[kind], True)
    arguments = {"r": R, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")
        return get_peft_model(model, LoraConfig(**arguments))


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("base_model.model."): (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    }


def train(model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    """Losses of some steps, and of the first one the gradients of A and B by the names of their layers."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = {}
    for step in range(steps):
        tokens = torch.randint(3, 48, (2, 9), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if step == 0:
            ours = adapted_layers(model)
            factors = {name: (layer.lora_A, layer.lora_B) for name, layer in ours.items()} or peft_factors(model)
            found |= {f"{name} {i}": f.grad.clone() for name, pair in factors.items() for i, f in enumerate(pair)}
        found[f"loss {step}"] = loss.detach()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.fixture(scope="module")
def families() -> dict[str, tuple[nn.Module, nn.Module, nn.Module]]:
    """Kind -> (ours, PEFT's, the fp64 model of the same weights), with the same adapters."""
    found = {}
    for kind in FAMILIES:
        base = llama(KINDS[kind])
        peft, reference64 = peft_model(copy.deepcopy(base), kind), plain(base, torch.float64)
        inject(base, CONFIG)
        inject(reference64, replace(CONFIG, share_input=False))
        for name, (A, B) in peft_factors(peft).items():
            for model in (base, reference64):
                model.get_submodule(name).set_lora(A, B)
        found[kind] = base, peft, reference64
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_three_steps_of_a_model_are_peft_s(families, kind):
    ours, peft, reference64 = map(copy.deepcopy, families[kind])
    assert len(peft_factors(peft)) == 14
    with use_backend("reference"):  # whole models: see assert_same_function in test_peft.py
        actual, exact = train(ours), train(reference64)
    expected = train(peft)
    assert actual.keys() == expected.keys() == exact.keys()
    for name in exact:
        testing.assert_close(actual[name], expected[name], exact[name], torch.float32, name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_files_interchange_with_peft(families, kind, tmp_path):
    from peft import PeftModel

    ours, peft, _ = families[kind]
    tokens = torch.arange(3, 12)[None]
    lorasp.save_adapter(ours, tmp_path / "ours")
    peft.save_pretrained(tmp_path / "peft")
    for path in ("ours", "peft"):
        theirs, fresh = llama(KINDS[kind]), llama(KINDS[kind])
        setattr(theirs, FAMILIES[kind], True)
        theirs = PeftModel.from_pretrained(theirs, tmp_path / path, is_trainable=True).train()
        report = lorasp.load_adapter(fresh, tmp_path / path)
        assert len(report.adapted) == 14
        for name, (A, B) in peft_factors(theirs).items():
            layer = fresh.get_submodule(name)
            assert type(layer) is QuantizedLoRALinear
            assert torch.equal(layer.lora_A, A)
            assert torch.equal(layer.lora_B, B)
        assert torch.equal(fresh(tokens).logits, ours(tokens).logits)


def test_what_a_model_reports():
    model = llama(KINDS["nf4"])
    heads = sum(p.numel() for p in llama().parameters())
    report = inject(model, replace(CONFIG, target_modules="all-linear"))
    assert len(report.adapted) == 14
    assert report.groups == ()
    assert report.total == heads + report.trainable
    assert report.skipped == {"lm_head": "output head"}
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


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


def test_the_bias_trains_where_it_should():
    module = QuantizedLoRALinear.from_linear(quantised("nf4"), replace(CONFIG, bias="lora_only"))
    y = module(torch.randn(2, 5, K))
    (gradient,) = torch.autograd.grad(y, module.bias, torch.ones_like(y))
    assert torch.equal(gradient, torch.full((N,), 10.0))


def test_second_derivatives_raise():
    x = torch.randn(M, K, requires_grad=True)
    y = quantized_lora_linear(x, frozen_base(quantised("int8")), *adapter())
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_whole_factor_may_rest():
    config = replace(CONFIG, partial=PartialConfig(granularity="matrix"))
    model = nn.ModuleDict({name: quantised("nf4") for name in ("a", "b")})
    inject(model, replace(config, target_modules=["a", "b"]))
    trains = [(layer.lora_A.requires_grad, layer.lora_B.requires_grad) for layer in model.values()]
    assert sorted(trains) == [(False, True), (True, False)]
    for layer in model.values():
        layer(torch.randn(M, K)).sum().backward()
        assert (layer.lora_A.grad is None) == layer.lora_B.requires_grad


class QuantLinear(nn.Module):
    """As GPTQ's and AWQ's layers look from outside."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class OwnLinear4bit(bnb.nn.Linear4bit):
    def forward(self, x):
        return super().forward(x) * 2


LINEAR = nn.Linear(K, N)
UNSUPPORTED = {
    "Linear4bit is not quantised yet": lambda: bnb.nn.Linear4bit(K, N),
    "Linear8bitLt is not quantised yet": lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False),
    "has_fp16_weights=True": lambda: bnb.nn.Linear8bitLt(K, N),
    "OwnLinear4bit has a forward of its own": lambda: OwnLinear4bit(K, N).to("cpu"),
    "Int8Tensor with quantised activations": part(
        weight_only, LINEAR, torchao.Int8DynamicActivationInt8WeightConfig
    ),
    "torchao's Float8Tensor": part(weight_only, LINEAR, torchao.Float8WeightOnlyConfig),
    "QuantLinear is not a linear layer": QuantLinear,
}  # fmt: skip


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_other_bases_are_refused_by_name_and_nothing_changes(reason):
    model = nn.ModuleDict({"good": quantised("nf4"), "bad": UNSUPPORTED[reason]()})
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"cannot carry an adapter: bad: .*{reason}"):
        inject(model, replace(CONFIG, target_modules=["good", "bad"]))
    assert dict(model.named_modules()) == before
    report = inject(model, replace(CONFIG, target_modules="all-linear"))
    assert report.adapted == ("good",)
    assert reason in report.skipped["bad"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prepack": True}, ValueError, "prepack must be False over a quantised weight"),
        ({"partial": PartialConfig()}, ValueError, "partial must be None or of granularity 'matrix'"),
        ({"share_input": [["q", "k"]]}, ValueError, "must have weights that are not quantised"),
        ({"modules_to_save": ["k"], "target_modules": ["q"]}, ValueError, "k is a quantised layer"),
    ],
)
def test_what_a_quantised_weight_cannot_do(changes, error, message):
    model = nn.ModuleDict({name: quantised("torchao") for name in ("q", "k")})
    before = dict(model.named_modules())
    with pytest.raises(error, match=message):
        inject(model, replace(CONFIG, **{"target_modules": ["q", "k"]} | changes))
    assert dict(model.named_modules()) == before


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


class TwoLayers(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.q, self.v = quantised(kind), quantised(kind)

    def forward(self, x):
        return self.q(x) + self.v(x)


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao"])
def test_several_adapters(kind, tmp_path):
    """The bias of a layer that a later adapter wraps stays the first one's; nothing copies the weight."""
    model, x = TwoLayers(kind).eval(), torch.randn(M, K)
    config = LoRAConfig(r=R, target_modules=["q"], bias="all", init_lora_weights=False)
    base, codes = model(x), model.v.weight
    inject(model, config)
    with torch.no_grad():
        model.v.bias.fill_(3)
    first = model(x)
    inject(model, replace(config, target_modules=["q", "v"], bias="none"), "other")
    assert torch.equal(model(x), first)
    lorasp.set_adapter(model, "other")
    assert not torch.equal(model(x), first)
    lorasp.save_adapter(model, tmp_path, "default")
    with lorasp.disable_adapter(model):
        assert torch.equal(model(x), base)
    lorasp.set_adapter(model, "default")
    assert torch.equal(model(x), first)
    fresh = TwoLayers(kind).eval()
    lorasp.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), first)
    with pytest.raises(ValueError, match="the weight must not be quantised"):
        lorasp.merge(model)
    model.q.register_full_backward_hook(lambda *_: None)
    lorasp.unload(model)
    assert torch.equal(model(x), base)
    assert model.v.weight is codes
    assert len(model.q._backward_hooks) == 1
