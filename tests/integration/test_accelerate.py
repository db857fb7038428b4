"""PEFT's layers under accelerate(): the same function, LoRA-FA's line held, and the way back."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import Linear
from peft_net import HALF, LAYERS, K, M, N, Net, R, adapted, make_x, record_fused
from torch import Tensor, nn

import lorasp
from lorasp import LoRALinear, accelerate, lora_linear, restore, testing
from lorasp.integrations.peft_linear import FusedLinear
from lorasp.memory import saved_bytes


@pytest.fixture
def fused(monkeypatch) -> list[int]:
    return record_fused(monkeypatch)


def run(module: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = module(x)
    training = {name: p for name, p in module.named_parameters() if p.requires_grad}
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    found = torch.autograd.grad(y, [x, *training.values()], direction)
    return {"y": y.detach()} | dict(zip(("x", *training), found, strict=True))


KINDS = {
    "fp32": {},
    "fp64": {"dtype": torch.float64, "autocast_adapter_dtype": False},
    "bf16, masters": {"dtype": HALF},
    "bf16": {"dtype": HALF, "autocast_adapter_dtype": False},
    "fp16, masters": {"dtype": torch.float16},
    "biases train": {"bias": "lora_only"},
    "rslora": {"use_rslora": True, "rank_pattern": {"conv": 2}, "alpha_pattern": {"plain": 3}},
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", [*KINDS, "autocast", "autocast over bf16"])
def test_a_layer_computes_what_it_computed(kind, name, fused):
    config = {"autocast": {}, "autocast over bf16": {"dtype": HALF}}.get(kind) or KINDS.get(kind, {})
    autocast = HALF if "autocast" in kind else None
    model = adapted(**config)
    layer = model.get_submodule(f"base_model.model.{name}")
    x = make_x(layer.base_layer.weight.dtype)
    expected = run(layer, x, autocast)
    exact = run(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    accelerate(model)
    actual = run(layer, x, autocast)
    assert fused == [1]
    assert actual.keys() == expected.keys()
    for what, tensor in actual.items():
        assert tensor.dtype == expected[what].dtype
        testing.assert_close(tensor, expected[what], exact[what], autocast or x.dtype, what)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["fp32", "bf16, masters", "biases train"])
def test_several_adapters_at_once(kind, name, fused):
    model = adapted(**KINDS[kind])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        model.add_adapter("other", LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights=False))
    layer = model.get_submodule(f"base_model.model.{name}")
    layer.set_adapter(["default", "other"])
    x = make_x(layer.base_layer.weight.dtype)
    expected, exact = run(layer, x), run(copy.deepcopy(layer).double(), x.detach().double().requires_grad_())
    accelerate(model)
    actual = run(layer, x)
    assert fused == [1]
    assert actual.keys() == expected.keys()
    for what, tensor in actual.items():
        testing.assert_close(tensor, expected[what], exact[what], x.dtype, what)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_is_lora_linears(name, fused):
    model = adapted(lora_dropout=0.3)
    layer, x = model.get_submodule(f"base_model.model.{name}"), make_x()
    without = model.eval()(x)
    accelerate(model)
    testing.assert_close(model(x), without, copy.deepcopy(model).double()(x.double()), torch.float32)
    model.train()
    weight = layer.base_layer.weight.t() if name == "conv" else layer.base_layer.weight
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    expected = lora_linear(x, weight, *factors, layer.base_layer.bias, scale=7 / R, dropout_p=0.3)
    assert torch.equal(y, expected)
    layer.lora_dropout.eval()
    assert torch.equal(layer(x), lora_linear(x, weight, *factors, layer.base_layer.bias, scale=7 / R))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_what_backward_keeps(name, freeze_A, dropout):
    """x itself, not PEFT's fp32 copy of it, and xa; LoRA-FA xa alone; no mask."""
    model = adapted(dtype=HALF, lora_dropout=dropout)
    accelerate(model, freeze_A=freeze_A)
    layer, x = model.get_submodule(f"base_model.model.{name}"), make_x(HALF)
    expected = M * (K * (not freeze_A) + R) * HALF.itemsize + 8 * (dropout > 0)
    assert saved_bytes(lambda: layer(x), exclude=layer) == expected


def test_hooks_on_the_layer_itself_are_its_own(fused):
    model = adapted()
    layer, x = model.base_model.model.plain, make_x()
    accelerate(model)
    expected = layer(x)
    layer.register_forward_hook(lambda module, inputs, y: y * 2)
    assert torch.equal(layer(x), expected * 2)
    assert fused == [1, 1]


class TestGroup:
    """Three layers on one input; what differs from LoRALinear's groups."""

    @pytest.fixture
    def model(self):
        return adapted(lora_dropout=0.2).eval()

    def test_a_member_that_peft_serves(self, model, fused):
        model.base_model.model.biased.lora_B.default.register_forward_hook(lambda module, inputs, y: y * 2)
        x = make_x()
        expected, exact = run(model, x), run(copy.deepcopy(model).double(), x.detach().double().requires_grad_())
        assert accelerate(model, share_input=[LAYERS]).groups == (("base_model.model.plain", "base_model.model.conv"),)
        for what, tensor in run(model, x).items():
            testing.assert_close(tensor, expected[what], exact[what], torch.float32, what)
        assert fused == [2]

    def test_inference_mode(self, model, fused):
        accelerate(model, share_input=[LAYERS])
        expected = model(make_x())
        with torch.inference_mode():
            assert torch.equal(model(make_x()), expected)
        assert fused == [3, 1, 1, 1]

    def test_a_member_alone_drops_what_it_drops_in_the_group(self, model, fused):
        """As in a recompute (checkpointing) that groups otherwise than its forward did."""
        accelerate(model.train(), share_input=[LAYERS])
        plain, biased, conv = (model.get_submodule(f"base_model.model.{name}") for name in LAYERS)
        torch.manual_seed(3)
        x = make_x()
        *_, together = plain(x), conv(x), biased(x)
        biased.shared_input._together = [0b001, 0b010, 0b100]
        torch.manual_seed(3)
        apart = biased(make_x())
        assert fused == [3, 1]
        testing.assert_close(apart, together, together.double(), torch.float32)


class TestRestore:
    def test_leaves_nothing_behind(self):
        model, x = adapted(), make_x()
        expected, before = model(x), copy.deepcopy(model)
        accelerate(model, freeze_A=True)
        restore(model)
        assert torch.equal(model(x), expected)
        for (name, module), (_, old) in zip(model.named_modules(), before.named_modules(), strict=True):
            assert type(module) is type(old), name
            assert vars(module).keys() == vars(old).keys(), name
        flags = ({name: p.requires_grad for name, p in m.named_parameters()} for m in (model, before))
        assert next(flags) == next(flags)

    def test_what_was_frozen_before_stays_frozen(self):
        model = adapted()
        model.base_model.model.plain.lora_A.default.weight.requires_grad_(False)
        accelerate(model, freeze_A=True)
        restore(model)
        trains = {name: model.get_submodule(f"base_model.model.{name}").lora_A.default for name in LAYERS}
        assert {name: factor.weight.requires_grad for name, factor in trains.items()} == {
            "plain": False, "biased": True, "conv": True,
        }  # fmt: skip
        model.set_adapter("default")
        assert trains["plain"].weight.requires_grad

    def test_nothing_to_restore(self):
        model = adapted()
        restore(model)
        restore(nn.Linear(2, 2))
        assert type(model.base_model.model.plain) is Linear

    def test_a_class_made_of_ours_is_refused(self):
        model = adapted()
        accelerate(model)
        layer = model.base_model.model.conv
        layer.__class__ = type("FSDPFusedLinear", (FusedLinear,), {})
        with pytest.raises(ValueError, match=r"restore: base_model.model.conv must be .*, got FSDPFusedLinear"):
            restore(model)
        assert type(model.base_model.model.plain) is FusedLinear


class TestCopies:
    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_deepcopy_and_pickle(self, again, fused):
        model, x = adapted(), make_x()
        accelerate(model, freeze_A=True, share_input=[["plain", "biased", "conv"]])
        expected = model(x)
        fused.clear()
        other = again(model)
        assert torch.equal(other(x), expected)
        assert fused == [3]
        other.set_adapter("default")
        layers = [other.get_submodule(f"base_model.model.{name}") for name in LAYERS]
        assert layers[0].shared_input.members == tuple(layers)
        assert not any(layer.lora_A.default.weight.requires_grad for layer in layers)
        restore(other)
        assert all(type(layer) is Linear for layer in layers)
        assert all(isinstance(layer, FusedLinear) for layer in model.modules() if isinstance(layer, Linear))


class TestSecondCall:
    def test_takes_in_new_layers_and_keeps_the_line(self, fused):
        model, x = adapted(target_modules=["plain"]), make_x()
        accelerate(model, freeze_A=True)
        model.add_adapter("wide", LoraConfig(r=R, target_modules=list(LAYERS), init_lora_weights=False))
        assert type(model.base_model.model.conv) is Linear
        report = accelerate(model, share_input=[["plain", "biased", "conv"]])
        assert report.accelerated == tuple(f"base_model.model.{name}" for name in LAYERS)
        assert report.groups == (report.accelerated,)
        assert report.frozen_A == dict.fromkeys(("default", "wide"), ("base_model.model.plain",))
        assert "LoRA-FA: A of adapter 'default' stays frozen in 1 layers" in str(report)
        model.set_adapter("wide")
        fused.clear()
        model(x)
        assert fused == [3]
        report = accelerate(model, freeze_A=False, share_input=False)
        assert report.groups == ()
        assert report.frozen_A == {}
        assert model.base_model.model.plain.lora_A.wide.weight.requires_grad
        model(x)
        assert fused == [3, 1, 1, 1]


def disable_for_a_while(model: PeftModel) -> None:
    with model.disable_adapter():
        assert not any("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def load_again(model: PeftModel, folder) -> None:
    model.save_pretrained(folder)
    model.load_adapter(folder, "default", is_trainable=True)


PEFT_TOGGLES = {
    "set_adapter": lambda model, folder: model.set_adapter("default"),
    "set_adapter to another and back": lambda model, folder: (
        model.set_adapter("second"),
        model.set_adapter("default"),
    ),
    "disable_adapter": lambda model, folder: disable_for_a_while(model),
    "disable and enable layers": lambda model, folder: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "set_requires_grad": lambda model, folder: model.set_requires_grad("default"),
    "add_adapter": lambda model, folder: model.add_adapter("third", LoraConfig(target_modules=list(LAYERS))),
    "delete_adapter": lambda model, folder: model.delete_adapter("second"),
    "delete the active one": lambda model, folder: (model.set_adapter("second"), model.delete_adapter("second")),
    "load_adapter": load_again,
    "merge_adapter": lambda model, folder: (model.merge_adapter(), model.unmerge_adapter()),
    "everything": lambda model, folder: model.requires_grad_(True).base_model.model.requires_grad_(True),
}


class TestLoRAFA:
    """PEFT alone gives A its gradient back at the first of these (peft#3447)."""

    @pytest.mark.parametrize("freeze_A", [None, True])
    @pytest.mark.parametrize("toggle", PEFT_TOGGLES)
    def test_stays_frozen_whatever_peft_toggles(self, toggle, freeze_A, tmp_path):
        model, x = adapted(dtype=HALF, lora_dropout=0.2), make_x(HALF)
        model.add_adapter("second", LoraConfig(r=2, target_modules=list(LAYERS)))
        factors = [model.get_submodule(f"base_model.model.{name}").lora_A.default.weight for name in LAYERS]
        for factor in factors:
            factor.requires_grad_(freeze_A is not None)
        report = accelerate(model, freeze_A=freeze_A)
        assert report.frozen_A["default"] == report.accelerated
        PEFT_TOGGLES[toggle](model, tmp_path)
        # Set past PEFT, it goes back at the next forward.
        assert {factor.requires_grad for factor in factors} == {toggle == "everything"}
        for name in LAYERS:
            layer = model.get_submodule(f"base_model.model.{name}")
            layer.base_layer.requires_grad_(False)
            y = []
            assert saved_bytes(lambda layer=layer, y=y: y.append(layer(x)), exclude=layer) == M * R * HALF.itemsize + 8
            y[0].sum().backward()
            assert layer.lora_A.default.weight.grad is None
            assert not layer.lora_A.default.weight.requires_grad
            assert layer.lora_B.default.weight.grad is not None

    @pytest.mark.parametrize("freeze_A", [None, True])
    def test_of_which_adapters(self, freeze_A):
        model = adapted()
        for name in LAYERS:
            model.get_submodule(f"base_model.model.{name}").lora_A.default.weight.requires_grad_(False)
        accelerate(model, freeze_A=freeze_A)
        model.add_adapter("second", LoraConfig(r=2, target_modules=list(LAYERS)))
        model.set_adapter("second")
        layer = model.base_model.model.plain
        assert layer.lora_A.second.weight.requires_grad == (freeze_A is None)
        assert layer.lora_B.second.weight.requires_grad
        model.delete_adapter("default")
        model.add_adapter("default", LoraConfig(r=2, target_modules=list(LAYERS)))
        model.set_adapter("default")
        assert layer.lora_A.default.weight.requires_grad == (freeze_A is None)

    def test_pefts_own_forward_gives_it_no_gradient_either(self):
        model, x = adapted(), make_x()
        model.add_adapter("second", LoraConfig(r=2, target_modules=list(LAYERS)))
        accelerate(model, freeze_A=True)
        model.base_model.set_adapter(["default", "second"])
        model.requires_grad_(True)
        model(x).sum().backward()
        assert all(p.grad is None for name, p in model.named_parameters() if "lora_A" in name)

    def test_the_optimizer_finds_it(self):
        model = adapted()
        accelerate(model, freeze_A=True)
        optimizer = lorasp.LoRAFAAdamW(model, lr=1e-2)
        before = [p.clone() for p in model.parameters()]
        model(make_x()).sum().backward()
        optimizer.step()
        changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
        assert changed == ["lora_B" in name for name, _ in model.named_parameters()]


class TestCompile:
    @pytest.mark.parametrize("config", [{}, {"dtype": HALF, "lora_dropout": 0.5}], ids=["plain", "masters, dropout"])
    @pytest.mark.parametrize("name", ["biased", "conv"])
    def test_in_one_graph(self, name, config, fused):
        model = adapted(**config)
        accelerate(model, freeze_A=True, share_input=[["plain", "biased", "conv"]])
        layer, dtype = model.get_submodule(f"base_model.model.{name}"), config.get("dtype", torch.float32)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(make_x(dtype)).sum().backward()
        assert fused == [1]
        assert layer.lora_B.default.weight.grad.isfinite().all()
        assert layer.lora_A.default.weight.grad is None
        layer.eval()
        x = make_x(dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer.compute(x, layer._operands()))

    def test_what_is_not_fused_and_what_changes(self):
        model, x = adapted(), make_x().detach()
        accelerate(model)
        layer = model.base_model.model.plain
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        model.add_adapter("second", LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights=False))
        for change in (
            lambda: None,
            lambda: layer.set_adapter("second"),
            lambda: layer.set_adapter(["default", "second"]),
            lambda: layer.enable_adapters(False),
        ):
            change()
            assert torch.equal(compiled(x), layer(x))


REFUSED = [
    (lambda: accelerate([]), TypeError, "accelerate: model must be a torch.nn.Module, got list"),
    (lambda: restore(None), TypeError, "restore: model must be a torch.nn.Module, got NoneType"),
    (lambda: accelerate(Net()), ValueError, "accelerate: model must have LoRA layers of PEFT's, Net has none"),
    (lambda: accelerate(LoRALinear(K, N)), ValueError, "accelerate: model must have LoRA layers of PEFT's"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_refused_models(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"freeze_A": "all"}, TypeError, "accelerate: freeze_A must be None, True or False, got 'all'"),
        ({"share_input": "plain"}, TypeError, "share_input must be a bool or a list of lists of str, got 'plain'"),
        ({"share_input": [["plain", "none"]]}, ValueError, "accelerate: share_input name 'none' fits no adapted layer"),
    ],
)
def test_refused_arguments_change_nothing(arguments, kind, message):
    model = adapted()
    with pytest.raises(kind, match=message):
        accelerate(model, **{"freeze_A": True} | arguments)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    assert {type(m) for m in model.modules() if isinstance(m, Linear)} == {Linear}


def test_a_wrapped_model(process_group):
    model = adapted()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for function in (accelerate, restore):
        with pytest.raises(ValueError, match=f"{function.__name__}: model must not be wrapped in Distributed"):
            function(wrapped)
    assert accelerate(torch.compile(model)).accelerated == tuple(f"base_model.model.{name}" for name in LAYERS)
