"""Several adapters in one model: switched, disabled, merged, taken out, saved and loaded by name."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialConfig, inject, testing
from lorasp.models.adapted import adapted_layers

IN, OUT = 12, 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(IN, IN) for _ in range(3))
        self.norm = nn.BatchNorm1d(IN)
        self.out = nn.Linear(IN, IN, bias=False)

    def forward(self, x):
        return self.out(self.norm(self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x)))


class Model(nn.Module):
    """Two blocks, an embedding tied to an adapted layer, and a head that an adapter may have in full."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embedding = nn.Embedding(IN, IN)
        self.embedding.weight = self.blocks[1].out.weight
        self.head = nn.Linear(IN, OUT)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.embedding(torch.zeros(len(x), dtype=torch.long)))


FIRST = LoRAConfig(r=3, target_modules=["q_proj", "v_proj", "out"], init_lora_weights=False, freeze_A=True)
SECOND = LoRAConfig(
    r=2, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, use_rslora=True,
    modules_to_save=["head", "norm"], bias="lora_only",
)  # fmt: skip
X = torch.randn(5, IN, generator=torch.Generator().manual_seed(1))


def both() -> Model:
    model = Model().eval()
    torch.manual_seed(2)
    inject(model, FIRST)
    inject(model, SECOND, "second")
    return model


def alone(config: LoRAConfig, model: nn.Module, name: str) -> Model:
    """A model with this adapter only, with the values it has in `model`."""
    single = Model().eval()
    inject(single, config)
    layers = adapted_layers(single)
    for path, layer in adapted_layers(model).items():
        if name in layer.adapters:
            layers[path].adapters["default"].load_state_dict(layer.adapters[name].state_dict())
    return single


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def base(model: nn.Module) -> dict[str, tuple[nn.Parameter, int]]:
    """The frozen model's Parameters, whatever else trains: the objects and where their bytes are."""
    layers = adapted_layers(model).items()
    return {name: (layer.weight, layer.weight.data_ptr(), layer.weight._version) for name, layer in layers}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().sum().backward()
    optimizer.step()


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


def test_whole_tensors_in_shards_do_not_change():
    model = both()
    model.head.weight.placements = ()  # what a DTensor is known by
    before = trainable(model)
    with pytest.raises(ValueError, match=r"sharded model: head\.weight"):
        lorasp.set_adapter(model, "second")
    assert trainable(model) == before
    assert {layer.active_adapter for layer in adapted_layers(model).values()} == {"default"}


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
