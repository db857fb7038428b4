"""Several adapters in one model: switched, disabled, deleted, saved and loaded by name."""

import copy

import pytest
import torch
from adapted_models import FIRST, IN, SECOND, Model, X, alone, base, both, step, trainable
from torch import nn

import lorasp
from lorasp import LoRAConfig, PartialConfig, inject, testing
from lorasp.models.adapted import adapted_layers


def test_the_first_acts_until_another_is_set():
    model = both()
    assert torch.equal(model(X), alone(FIRST, model, "default")(X))
    assert trainable(model) == {f"blocks.{i}.{n}.adapters.default.lora_B" for i in (0, 1) for n in FIRST.target_modules}
    lorasp.set_adapter(model, "second")
    assert torch.equal(model(X), alone(SECOND, model, "second")(X))
    layers = [f"blocks.{i}.{n}" for i in (0, 1) for n in SECOND.target_modules]
    factors = {f"{layer}.adapters.second.{factor}" for layer in layers for factor in ("lora_A", "lora_B")}
    whole = {"head.weight", "head.bias", *(f"blocks.{i}.norm.{n}" for i in (0, 1) for n in ("weight", "bias"))}
    assert trainable(model) == factors | whole | {f"{layer}.bias" for layer in layers}


def test_switching_copies_nothing_of_the_base():
    model = both()
    before, storages = base(model), {t.untyped_storage()._cdata for t in model.state_dict().values()}
    for name in ("second", "default", "second"):
        lorasp.set_adapter(model, name)
        assert base(model) == before
    lorasp.set_adapter(model, "default")
    assert {t.untyped_storage()._cdata for t in model.state_dict().values()} == storages


def test_an_optimizer_goes_on_with_an_adapter_that_comes_back():
    """Three steps of one adapter, with and without steps of the other in between, end in the same values."""
    model, reference = both(), both()
    optimizers = {}
    for name in ("second", "default"):
        for m in (model, reference):
            lorasp.set_adapter(m, name)
            optimizers[m, name] = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1)
    for name in ("second", "default", "second", "default", "second"):
        lorasp.set_adapter(model, name)
        step(model, optimizers[model, name])
    lorasp.set_adapter(reference, "second")
    for _ in range(3):
        step(reference, optimizers[reference, "second"])
    actual, expected = model.state_dict(), reference.state_dict()
    mine = [key for key in actual if ".adapters.default." not in key]
    assert all(torch.equal(actual[key], expected[key]) for key in mine)
    assert not torch.equal(actual["head.weight"], Model().head.weight)
    moved = "blocks.0.q_proj.adapters.default.lora_B"
    assert not torch.equal(actual[moved], expected[moved])
    lorasp.set_adapter(model, "default")
    assert torch.equal(model.head.weight, Model().head.weight)


def test_disabled_is_the_base_to_the_bit():
    model, plain = both(), Model().eval()
    lorasp.set_adapter(model, "second")
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    model.train()
    model(X)  # the norm's own buffers move too
    model.eval()
    expected, flags = model(X), trainable(model)
    with lorasp.disable_adapter(model):
        assert torch.equal(model(X), plain(X))
        with lorasp.disable_adapter(model):
            assert torch.equal(model(X), plain(X))
        assert torch.equal(model(X), plain(X))
    assert torch.equal(model(X), expected)
    assert trainable(model) == flags
    with pytest.raises(KeyError), lorasp.disable_adapter(model):
        raise KeyError
    assert torch.equal(model(X), expected)


def test_a_frozen_A_survives_everything():
    model = both()
    with lorasp.disable_adapter(model):
        pass
    for name in ("second", "default"):
        lorasp.set_adapter(model, name)
    lorasp.merge(model)
    lorasp.unmerge(model)
    model.requires_grad_(True)
    for layer in adapted_layers(model).values():
        if "default" in layer.adapters:
            assert not layer.adapters["default"].lora_A.requires_grad
            assert "lora_A" not in dict(layer.adapters["default"].named_parameters())


def test_deleted_adapters_leave_the_others():
    model = both()
    expected = model(X)
    lorasp.delete_adapter(model, "second")
    assert torch.equal(model(X), expected)
    assert not [key for key in model.state_dict() if ".second." in key]
    inject(model, SECOND, "second")
    with pytest.raises(ValueError, match="must not be the active one"):
        lorasp.delete_adapter(model, "default")


@pytest.mark.parametrize("name", ["default", "second"])
def test_files_by_name(name, tmp_path):
    """Whichever adapter is active, a file holds the named one's values; loading adds it, or fills it."""
    model = both()
    lorasp.set_adapter(model, "second")
    step(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    lorasp.set_adapter(model, name)
    expected = model(X)
    lorasp.set_adapter(model, "default" if name == "second" else "second")
    lorasp.save_adapter(model, tmp_path, name)
    fresh = Model().eval()
    inject(fresh, LoRAConfig(r=1, target_modules=["out"]), "other")
    kept = fresh(X)
    lorasp.load_adapter(fresh, tmp_path, "loaded")
    assert torch.equal(fresh(X), kept)
    lorasp.set_adapter(fresh, "loaded")
    assert torch.equal(fresh(X), expected)
    lorasp.set_adapter(fresh, "other")
    assert torch.equal(fresh(X), kept)
    filled = both()
    lorasp.load_adapter(filled, tmp_path, name)
    lorasp.set_adapter(filled, name)
    assert torch.equal(filled(X), expected)


def test_layers_on_one_input_share_it_where_the_active_adapter_has_them():
    config = LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], share_input=[["q_proj", "v_proj"]])
    model = Model().eval()
    inject(model, config)
    wider = LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], share_input=[["q_proj", "k_proj", "v_proj"]])
    report = inject(model, wider, "wider")
    assert [len(group) for group in report.groups] == [3, 3]
    for name in ("default", "wider"):
        lorasp.set_adapter(model, name)
        with torch.no_grad():
            for layer in adapted_layers(model).values():
                for parameter in layer.parameters():
                    if parameter.requires_grad:
                        parameter.normal_()
        grouped = model(X)
        single = copy.deepcopy(model)
        for layer in adapted_layers(single).values():
            layer.shared_input = None
        testing.assert_close(grouped, single(X), copy.deepcopy(single).double()(X.double()), torch.float32)


def test_each_adapter_has_its_own_selection():
    model = Model().eval()
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], partial=PartialConfig(seed=1)))
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], partial=PartialConfig(seed=2)), "other")
    layer = model.blocks[0].q_proj
    assert not torch.equal(layer.adapters["default"].active_A, layer.adapters["other"].active_A)
    lorasp.select(model, {"blocks.0.q_proj": (torch.arange(IN).expand(2, IN), torch.ones(IN, 2))})
    assert layer.adapters["default"].active_A.flatten().nonzero().flatten().tolist() == list(range(IN // 2, IN))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: lorasp.set_adapter(m, "third"), "set_adapter: adapter_name must be one of default, second"),
        (lambda m: lorasp.delete_adapter(m, "third"), "delete_adapter: adapter_name must be one of default, second"),
        (lambda m: lorasp.save_adapter(m, "unused", "third"), "save_adapter: adapter_name must be one of"),
        (lambda m: inject(m, FIRST), "has an adapter 'default' already"),
        (lambda m: inject(m, FIRST, "a.b"), "name must be a str without dots"),
        (lambda m: inject(m, FIRST, "keys"), "no name nn.ModuleDict uses"),
        (lambda m: inject(m, LoRAConfig(target_modules=["head"]), "x"), "must not name what another adapter trains"),
        (
            lambda m: inject(m, LoRAConfig(target_modules=["k_proj"], modules_to_save=["out"]), "x"),
            "must not hold layers that another adapter adapts",
        ),
        (lorasp.unmerge, "an adapter must be merged"),
        (lambda m: m.blocks[0].q_proj.add_adapter("second", FIRST), "adapter_name must be new"),
        (lambda m: m.blocks[0].k_proj.lora_A, "active_adapter must be one of second here, got 'default'"),
    ],
)
def test_bad_calls_change_nothing(call, message):
    model = both()
    before, expected = trainable(model), model(X)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert trainable(model) == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: lorasp.set_adapter(m, "second"),
        lorasp.merge,
        lambda m: inject(m, SECOND, "third"),
        lambda m: lorasp.load_adapter(m, "unused"),
    ],
)
def test_not_while_merged(call, tmp_path, monkeypatch):
    model = both()
    lorasp.save_adapter(model, tmp_path / "unused")
    monkeypatch.chdir(tmp_path)
    lorasp.merge(model)
    with pytest.raises(ValueError, match=r"must not be merged|no adapter must be merged"):
        call(model)


@pytest.mark.parametrize("call", [lorasp.merge, lorasp.unmerge, lorasp.unload, lambda m: lorasp.set_adapter(m, "x")])
def test_a_model_without_adapters(call):
    with pytest.raises(ValueError, match="has no adapter of its own"):
        call(Model())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        call(3)


def test_a_second_adapter_leaves_the_first_one_s_flags_alone():
    model = both()
    model.requires_grad_(False)
    inject(model, LoRAConfig(target_modules=["q_proj"], prepack=False), "third")
    assert not trainable(model)


def test_all_linear_is_saved_so_that_it_loads(tmp_path):
    """The output head, which "all-linear" skips, ends as an adapted layer does."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(IN, IN)
            self.top = nn.ModuleDict({"out": nn.Linear(IN, 2)})

        def get_output_embeddings(self):
            return self.top["out"]

        def forward(self, x):
            return self.top["out"](self.out(x))

    model = Nested()
    report = inject(model, LoRAConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert report.adapted == ("out",)
    lorasp.save_adapter(model, tmp_path)
    fresh = Nested()
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "adapters" not in key})
    assert lorasp.load_adapter(fresh, tmp_path).adapted == ("out",)
    assert torch.equal(fresh(X), model(X))


class TestDistributed:
    @pytest.fixture
    def wrapped(self, tmp_path, monkeypatch):
        model = both()
        monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", lambda self, m: nn.Module.__init__(self))
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.module = model
        lorasp.save_adapter(model, tmp_path)
        return wrapped

    def test_adapters_do_not_change_under_ddp(self, wrapped, tmp_path):
        with pytest.raises(ValueError, match="set_adapter: model must not be wrapped in DistributedDataParallel"):
            lorasp.set_adapter(wrapped, "second")
        with pytest.raises(ValueError, match="load_adapter: model must not be wrapped in DistributedDataParallel"):
            lorasp.load_adapter(wrapped, tmp_path, "new")
        lorasp.load_adapter(wrapped, tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: lorasp.set_adapter(m, ["default"]), "set_adapter: adapter_name must be one of"),
        (lambda m: inject(m, FIRST, "training"), "no name nn.ModuleDict uses"),
        (lambda m: inject(m, FIRST, "own"), "has an adapter 'own' already"),
    ],
)
def test_names_that_cannot_be(call, message):
    model = both()
    model.blocks[0].q_proj.add_adapter("own", FIRST)
    with pytest.raises(ValueError, match=message):
        call(model)
