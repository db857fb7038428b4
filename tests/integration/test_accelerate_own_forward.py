"""What accelerate() leaves to PEFT's own forward, per call, adapter and layer, with the reason in the report."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora.layer import Linear
from peft_net import HALF, LAYERS, K, N, Net, R, adapted, make_x, record_fused
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorasp import accelerate, restore, testing


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    return record_fused(monkeypatch)


def check(fused, change, model: PeftModel | None = None, x: Tensor | None = None, **arguments) -> None:
    model = adapted(lora_dropout=0.2).eval() if model is None else model
    model.add_adapter("other", LoraConfig(r=2, target_modules=["plain"], init_lora_weights=False))
    accelerate(model)
    layer, x = model.base_model.model.plain, make_x() if x is None else x
    layer(x)
    assert fused.pop() == 1
    change(layer)
    torch.manual_seed(4)
    y = layer(x.clone(), **arguments)
    assert fused == []
    restore(model)
    torch.manual_seed(4)
    assert torch.equal(y, layer(x.clone(), **arguments))


def test_disabled(fused):
    check(fused, lambda layer: layer.enable_adapters(False))


def test_merged(fused):
    check(fused, lambda layer: layer.merge())


def test_disabled_while_merged_unmerges(fused):
    def change(layer):
        layer.merge()
        layer.enable_adapters(False)

    check(fused, change)


def test_none_of_the_active_ones_here(fused):
    check(fused, lambda layer: layer.set_adapter(["elsewhere"]))


def test_a_batch_of_several_adapters(fused):
    check(fused, lambda layer: None, adapter_names=["other", "__base__"])


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_a_part(fused, part, kind):
    def hook(module, inputs, *outputs):
        return None if "backward" in kind else outputs[0] * 2 if outputs else (inputs[0] * 2,)

    check(fused, lambda layer: getattr(layer.get_submodule(part), f"register_{kind}_hook")(hook))


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default"])
def test_a_forward_of_a_parts_own(fused, part):
    def change(layer):
        module = layer.get_submodule(part)
        old = module.forward
        module.forward = lambda x: old(x) * 2

    check(fused, change)


@pytest.mark.parametrize("part", ["base_layer", "lora_A.default"])
def test_a_weight_computed_from_another(fused, part):
    def change(layer):
        nn.utils.parametrizations.weight_norm(layer.get_submodule(part))

    check(fused, change)


def test_a_scale_that_is_a_tensor(fused):
    check(fused, lambda layer: layer.scaling.update(default=torch.tensor(2.0)))


@pytest.mark.parametrize("change", [{"p": 1.0}, {"inplace": True}], ids=str)
def test_a_dropout_that_is_not_ours(fused, change):
    model = adapted(lora_dropout=0.2)
    check(fused, lambda layer: vars(layer.lora_dropout.default).update(change), model, make_x().detach())


def test_a_dropout_of_another_class(fused):
    check(fused, lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.2)}))


def test_factors_that_x_would_be_cast_for(fused):
    check(fused, lambda layer: layer.lora_A.to(HALF) and layer.lora_B.to(HALF))


def test_input_casting_switched_off(fused):
    model = adapted(dtype=HALF)
    accelerate(model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(make_x(HALF))
    assert fused == []


def test_a_tensor_of_another_class(fused):
    class Named(Tensor):
        pass

    def change(layer):
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().as_subclass(Named))

    check(fused, change)
    model = adapted()
    accelerate(model)
    fused.clear()
    assert isinstance(model.base_model.model.plain(make_x().as_subclass(Named)), Named)
    assert fused == []


def test_fake_tensors(fused):
    model = adapted()
    accelerate(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert model.base_model.model.plain(torch.empty((5, K))).shape == (5, N)
    assert fused == []


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "forward_ad"])
def test_function_transforms(fused, transform):
    model = adapted()
    layer, x = model.base_model.model.plain, make_x().detach()

    def compute():
        if transform == "vmap":
            return torch.func.vmap(layer)(x)
        if transform == "grad":
            return torch.func.grad(lambda t: layer(t).square().sum())(x)
        if transform == "jvp":
            return torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            return torch.autograd.forward_ad.unpack_dual(y).tangent

    expected = compute()
    accelerate(model)
    assert torch.equal(compute(), expected)
    assert fused == []


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Coded(nn.Parameter):
    pass


class Varied(nn.Module):
    """What can be adapted and not fused."""

    def __init__(self):
        super().__init__()
        self.embedding, self.convolution = nn.Embedding(5, K), nn.Conv2d(1, 1, 3, padding=1)
        self.doubled, self.computed = Doubled(K, K), nn.utils.parametrizations.weight_norm(nn.Linear(K, K))
        self.coded, self.replaced, self.plain = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)
        self.coded.weight = Coded(self.coded.weight.detach(), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.convolution(x[:, None])[:, 0]
        return self.plain(self.replaced(self.coded(self.computed(self.doubled(x)))))


STATIC = {
    "embedding": "Embedding is not PEFT's lora.Linear",
    "convolution": "Conv2d is not PEFT's lora.Linear",
    "doubled": "its base layer Doubled has a forward of its own",
    "computed": r"its base weight or bias is computed, not stored \(parametrised\)",
    "coded": "its base weight is a Coded of torch.float32",
    "replaced": "it was given a forward of its own",
}


def varied() -> PeftModel:
    model = adapted(Varied, target_modules=[*STATIC, "plain"])
    replaced = model.base_model.model.replaced
    replaced.forward = replaced.forward
    return model


def test_the_report_names_what_stays_pefts_own_and_why(fused):
    model, tokens = varied(), torch.arange(4).reshape(2, 2)
    expected = model(tokens)
    restored = copy.deepcopy(model)
    report = accelerate(model)
    assert report.accelerated == ("base_model.model.plain",)
    assert report.kept == {f"base_model.model.{name}": why.replace("\\", "") for name, why in STATIC.items()}
    shown = str(report)
    assert "1 layers accelerated: plain x1" in shown
    assert all(f"kept {name}: {why}" in shown for name, why in report.kept.items())
    for name in STATIC:
        assert type(model.get_submodule(f"base_model.model.{name}")) is type(
            restored.get_submodule(f"base_model.model.{name}")
        )
    testing.assert_close(model(tokens), expected, expected.double(), torch.float32)
    assert fused == [1]


@pytest.mark.parametrize("freeze_A", [None, True, False])
def test_the_report_says_whose_frozen_A_is_not_held(freeze_A):
    model = varied()
    for name in ("doubled", "convolution"):
        model.get_submodule(f"base_model.model.{name}").lora_A.default.weight.requires_grad_(False)
    kept = accelerate(model, freeze_A=freeze_A).kept
    unheld = {name for name in STATIC if kept[f"base_model.model.{name}"].endswith("; its A is not held frozen")}
    assert unheld == {None: {"doubled", "convolution"}, True: set(STATIC), False: set()}[freeze_A]


def cast_down(layer: Linear) -> None:
    layer.lora_A.second.to(HALF)
    layer.lora_B.second.to(HALF)


ADAPTERS = {
    "DoRA": ({"use_dora": True}, lambda layer: None, "DoraLinearVariant is not plain LoRA"),
    "bias": ({"lora_bias": True}, lambda layer: None, "lora_bias"),
    "dtype": ({}, cast_down, "PEFT casts x for its factors of torch.bfloat16 over torch.float32"),
    "hook": (
        {},
        lambda layer: layer.lora_B.second.register_forward_hook(lambda *a: None),
        "its lora_B has hooks or a forward of its own",
    ),
    "dropout": (
        {},
        lambda layer: layer.lora_dropout.update({"second": nn.AlphaDropout(0.2)}),
        r"its lora_dropout is AlphaDropout\(p=0.2, inplace=False\)",
    ),
    "factor": (
        {},
        lambda layer: layer.lora_A.update({"second": Doubled(K, R, bias=False)}),
        "its lora_A is a Doubled",
    ),
    "scaling": ({}, lambda layer: layer.scaling.update(second=float("inf")), "its scaling is inf"),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_the_report_names_an_adapter_that_stays_pefts_own(case, fused):
    """The layer's other adapter is fused; and the reason given is the reason kept to."""
    config, change, why = ADAPTERS[case]
    model, x = adapted(), make_x()
    layer = model.base_model.model.biased
    model.add_adapter("second", LoraConfig(r=R, target_modules=["biased"], init_lora_weights=False, **config))
    change(layer)
    report = accelerate(model)
    assert report.accelerated == tuple(f"base_model.model.{name}" for name in LAYERS)
    assert report.kept == {"base_model.model.biased": f"adapter 'second': {why}".replace("\\", "")}
    with torch.no_grad():
        layer(x)
        assert fused.pop() == 1
        model.set_adapter("second")
        torch.manual_seed(4)
        y = layer(x)
        assert fused == []
        restore(model)
        torch.manual_seed(4)
        assert torch.equal(y.nan_to_num(), layer(x).nan_to_num())


def test_adalora_is_not_lora():
    model = get_peft_model(Net(), AdaLoraConfig(target_modules=["plain"], total_step=10))
    report = accelerate(model)
    assert report.accelerated == ()
    assert report.kept == {"base_model.model.plain": "SVDLinear is not PEFT's lora.Linear"}
    assert str(report).splitlines()[0] == "lorasp: 0 layers accelerated"


def test_a_layer_without_adapters(fused):
    model, x = adapted(), make_x()
    accelerate(model)
    model.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(model.base_model.model.plain(x), model.base_model.model.plain.base_layer(x))
    assert set(accelerate(model).kept.values()) == {"it has no adapter"}
    assert fused == []
