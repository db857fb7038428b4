"""inject() into models with quantised layers: PEFT's numbers and files, several adapters, what is refused."""

import copy
import warnings
from dataclasses import replace
from functools import partial as part

import pytest
import torch
import transformers
from quantized_layers import (
    CONFIG,
    KINDS,
    LINEAR,
    TARGETS,
    K,
    M,
    N,
    R,
    bnb,
    dequantised,
    quantised,
    torchao,
    weight_only,
)
from torch import Tensor, nn

import lorasp
from lorasp import (
    LoRAConfig,
    PartialConfig,
    QuantizedLoRALinear,
    frozen_base,
    inject,
    testing,
    use_backend,
)
from lorasp.models.inject import adapted_layers


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


def test_the_bias_trains_where_it_should():
    module = QuantizedLoRALinear.from_linear(quantised("nf4"), replace(CONFIG, bias="lora_only"))
    y = module(torch.randn(2, 5, K))
    (gradient,) = torch.autograd.grad(y, module.bias, torch.ones_like(y))
    assert torch.equal(gradient, torch.full((N,), 10.0))


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
