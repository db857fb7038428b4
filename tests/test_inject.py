"""inject: what is adapted, what trains, what is shared; and that a refusal changes nothing."""

import copy
import warnings

import pytest
import torch
from tiny_model import TOKENS, WIDTH, Model
from torch import nn

from lorasp import LoRAConfig, LoRALinear, inject, testing
from lorasp.config import ALL_LINEAR

EVERY_BLOCK = [f"model.layers.{i}.{name}" for i in range(3) for name in (
    "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "up"
)]  # fmt: skip


def config(**arguments) -> LoRAConfig:
    return LoRAConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"]} | arguments))


def snapshot(model: nn.Module) -> tuple:
    """Everything a refused inject must leave alone."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]
    parameters = [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, hasattr(model, "lorasp_configs")


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("arguments", "adapted"),
    [
        ({}, [name for name in EVERY_BLOCK if name.endswith(("q_proj", "v_proj"))]),
        ({"target_modules": ["0.attention.q_proj"]}, ["model.layers.0.attention.q_proj"]),
        ({"target_modules": r".*\.[12]\..*(q_proj|up)"}, [
            "model.layers.1.attention.q_proj", "model.layers.1.up", "model.layers.2.attention.q_proj",
            "model.layers.2.up",
        ]),
        ({"target_modules": ["up"], "exclude_modules": ["1.up"]}, ["model.layers.0.up", "model.layers.2.up"]),
        ({"target_modules": ["up"], "exclude_modules": r".*layers\.[02].*"}, ["model.layers.1.up"]),
        ({"target_modules": ["up"], "layers_to_transform": [0, 2]}, ["model.layers.0.up", "model.layers.2.up"]),
        ({"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": "layers"}, ["model.layers.1.up"]),
        ({"target_modules": ALL_LINEAR}, [*EVERY_BLOCK, "score"]),
        ({"target_modules": ALL_LINEAR, "modules_to_save": ["score"]}, EVERY_BLOCK),
        ({"target_modules": ["lm_head"]}, ["lm_head"]),
    ],
)  # fmt: skip
def test_targets(arguments, adapted):
    model = Model()
    report = inject(model, config(**arguments))
    assert list(report.adapted) == adapted
    assert [name for name, module in model.named_modules() if isinstance(module, LoRALinear)] == adapted


def test_a_fresh_adapter_changes_nothing_but_which_parameters_train():
    model = Model()
    before = model(TOKENS)
    weights = dict(model.named_parameters(remove_duplicate=False))
    inject(model, config(target_modules=ALL_LINEAR))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert ".adapters." in name or parameter is weights[name]
    exact = copy.deepcopy(model).double()(TOKENS)
    for old, new, reference64 in zip(before, model(TOKENS), exact, strict=True):
        testing.assert_close(new, old, reference64, torch.float32)


@pytest.mark.parametrize("freeze_A", [False, True])
def test_only_the_adapters_train(freeze_A):
    model = Model()
    inject(model, config(freeze_A=freeze_A))
    parts = ["lora_B"] if freeze_A else ["lora_A", "lora_B"]
    targets = [name for name in EVERY_BLOCK if name.endswith(("q_proj", "v_proj"))]
    assert trainable(model) == {f"{name}.adapters.default.{part}" for name in targets for part in parts}
    sum(y.sum() for y in model(TOKENS)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trainable(model)


@pytest.mark.parametrize(
    ("bias", "biases"),
    [
        ("none", set()),
        ("lora_only", {f"model.layers.{i}.attention.{n}.bias" for i in range(3) for n in ("q_proj", "v_proj")}),
        ("all", {name for name, _ in Model().named_parameters() if name.endswith(".bias")}),
    ],
)
def test_bias(bias, biases):
    model = Model()
    inject(model, config(bias=bias))
    assert {name for name in trainable(model) if ".adapters." not in name} == biases


def test_modules_to_save_train_where_they_stand():
    model = Model()
    score = model.score
    inject(model, config(modules_to_save=["score"]))
    assert model.score is score
    assert {"score.weight", "score.bias"} <= trainable(model)


def test_ranks_and_alphas_by_pattern():
    model = Model()
    inject(model, config(rank_pattern={r"layers\.0\..*q_proj": 1, "v_proj": 4}, alpha_pattern={"v_proj": 2}))
    attention = model.model.layers[0].attention
    assert (attention.q_proj.lora_A.shape[0], attention.q_proj.scale) == (1, 8.0)
    assert (attention.v_proj.lora_A.shape[0], attention.v_proj.scale) == (4, 0.5)
    assert model.model.layers[1].attention.q_proj.lora_A.shape[0] == 2


def test_tied_weights_stay_tied():
    model = Model()
    inject(model, config(target_modules=["lm_head"]))
    assert model.lm_head.weight is model.model.embed.weight


def test_training_mode_and_hooks_survive():
    model, calls = Model(), []
    model.eval()
    model.model.layers[1].train()
    q_proj = model.model.layers[1].attention.q_proj
    handle = q_proj.register_forward_hook(lambda *_: calls.append("forward"))
    q_proj.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    q_proj.register_full_backward_hook(lambda *_: calls.append("backward"))
    inject(model, config())
    assert [block.attention.q_proj.training for block in model.model.layers] == [False, True, False]
    model(TOKENS)[0].sum().backward()
    assert calls == ["pre", "forward", "backward"]
    handle.remove()
    model(TOKENS)
    assert calls[3:] == ["pre"]


def test_a_layer_under_two_names_is_adapted_once_under_both():
    model = Model()
    model.model.layers[2].attention.v_proj = model.model.layers[0].attention.v_proj
    model.model.extra = model.model.layers[1]
    report = inject(model, config())
    assert model.model.layers[2].attention.v_proj is model.model.layers[0].attention.v_proj
    assert isinstance(model.model.extra.attention.q_proj, LoRALinear)
    assert report.skipped == {
        "model.layers.2.attention.v_proj": "the same module as model.layers.0.attention.v_proj",
        "model.extra.attention.q_proj": "the same module as model.layers.1.attention.q_proj",
        "model.extra.attention.v_proj": "the same module as model.layers.1.attention.v_proj",
    }
    assert len(report.adapted) == 5


def test_report_counts_each_parameter_once_and_reads_well():
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    report = inject(model, config(target_modules=ALL_LINEAR, freeze_A=True, exclude_modules=["score"]))
    low_rank = len(EVERY_BLOCK) * 2 * WIDTH
    assert (report.trainable, report.total) == (low_rank, total + 2 * low_rank)
    assert report.skipped == {"lm_head": "output head", "score": "in exclude_modules"}
    text = str(report)
    for words in ("15 layers adapted", "q_proj x3", "240 of", "skipped lm_head: output head"):
        assert words in text


class Quantised(nn.Linear):
    """Stands for the layers of quantisation libraries: a Linear by name, with a forward of its own."""

    def forward(self, x):
        return super().forward(x)


def quantised(model):
    model.model.layers[1].attention.q_proj = Quantised(WIDTH, WIDTH)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].attention.q_proj)


def hooked_forward(model):
    q_proj = model.model.layers[1].attention.q_proj
    q_proj.forward = lambda x: nn.Linear.forward(q_proj, x)


def float8(model):
    model.model.layers[1].attention.q_proj.to(torch.float8_e4m3fn)


class SubclassedParameter(nn.Parameter):
    """Stands for Params4bit and tensor subclasses."""


def subclassed(model):
    q_proj = model.model.layers[1].attention.q_proj
    q_proj.weight = SubclassedParameter(q_proj.weight.detach())


OBSTACLES = {
    quantised: "Quantised has a forward of its own",
    parametrised: r"its weight is computed, not stored \(parametrised\)",
    hooked_forward: "Linear has a forward of its own",
    float8: "its weight is a Parameter of torch.float8_e4m3fn",
    subclassed: "its weight is a SubclassedParameter of torch.float32",
}


@pytest.mark.parametrize("spoil", OBSTACLES)
def test_layers_that_cannot_be_adapted_are_skipped_or_refused_by_name(spoil):
    model = Model()
    spoil(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"cannot carry an adapter: model\.layers\.1\.attention\.q_proj: {OBSTACLES[spoil]}$"
    ):
        inject(model, config())
    assert snapshot(model) == before
    report = inject(model, config(target_modules=ALL_LINEAR))
    assert set(report.skipped) == {"model.layers.1.attention.q_proj", "lm_head"}


def test_torch_modules_that_read_the_weight_themselves_are_left_alone():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer)
    report = inject(model, config(target_modules=ALL_LINEAR))
    assert report.adapted == ("0",)
    assert set(report.skipped) == {"1.linear1", "1.linear2", "1.self_attn.out_proj"}
    with pytest.raises(ValueError, match="MultiheadAttention reads its weight directly"):
        inject(nn.Sequential(layer), config(target_modules=["out_proj"]))


EXIST = "its linear layers are named: k_proj, lm_head, o_proj, q_proj, score, up, v_proj"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": None}, f"target_modules is not set; {EXIST}"),
        ({"target_modules": ["q_proj", "w_proj"]}, rf"\['w_proj'\] name no module of Model; {EXIST}"),
        ({"target_modules": "q_proj"}, f"no layer is left to adapt: target_modules 'q_proj'; {EXIST}"),
        ({"target_modules": ["up"], "layers_to_transform": 7}, "no layer is left .*, 3 not in layers_to_transform"),
        ({"target_modules": ["embed"]}, "model.embed: Embedding is not a linear layer"),
        ({"target_modules": ["attention"]}, "model.layers.0.attention: Attention is not a linear layer; model"),
        ({"modules_to_save": ["scores"]}, r"\['scores'\] name no module of Model; its parts: model, lm_head, score"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is also model.embed.weight"),
        ({"rank_pattern": {"k_proj": 4}}, r"rank_pattern keys \['k_proj'\] fit no adapted layer"),
        ({"alpha_pattern": {"layers": 4}}, r"alpha_pattern keys \['layers'\] fit no adapted layer"),
        ({"adapter_dtype": torch.float32, "target_modules": ["score"]}, "adapter_dtype must be None for torch.float64"),
    ],
)
def test_refusals_change_nothing(arguments, message):
    model = Model()
    model.score.double()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inject(model, config(**arguments))
    assert snapshot(model) == before


def test_a_module_of_integers_cannot_train():
    model = Model()
    model.score.weight = nn.Parameter(torch.zeros(2, WIDTH, dtype=torch.uint8), requires_grad=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"modules_to_save must be able to train: score\.weight is torch\.uint8"):
        inject(model, config(modules_to_save=["score"]))
    assert snapshot(model) == before


def test_a_second_injection_is_refused():
    model = Model()
    inject(model, config())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"has an adapter .default. already, in 6 layers such as model\.layers\.0"):
        inject(model, config(target_modules=["up"]))
    assert snapshot(model) == before


def test_both_ends_of_a_tie_may_be_saved():
    model = Model()
    inject(model, config(modules_to_save=["embed", "lm_head"]))
    assert model.lm_head.weight is model.model.embed.weight
    assert model.lm_head.weight.requires_grad


def test_wrong_types():
    with pytest.raises(TypeError, match=r"inject: model must be a torch\.nn\.Module, got str"):
        inject("model", config())
    with pytest.raises(TypeError, match="inject: config must be a LoRAConfig, got dict"):
        inject(Model(), {"r": 2})
    with pytest.raises(ValueError, match=r"1 is the model itself \(use LoRALinear\.from_linear\)"):
        inject(nn.Linear(2, 2), config(target_modules=ALL_LINEAR))


def test_an_exclusion_that_names_nothing_is_warned_of():
    with pytest.warns(UserWarning, match=r"exclude_modules \['w_proj'\] name no module of Model"):
        inject(Model(), config(exclude_modules=["w_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(Model(), config(exclude_modules=["0.attention.q_proj"]))


def test_a_compiled_model_is_adapted_below_its_wrapper():
    model = Model()
    report = inject(torch.compile(model, backend="eager"), config())
    assert report.adapted[0] == "model.layers.0.attention.q_proj"
    assert model.lorasp_configs["default"] == config()


def test_an_injected_model_can_be_copied_and_keeps_its_record():
    model = Model()
    inject(model, config())
    twin = copy.deepcopy(model)
    assert twin.lorasp_configs == model.lorasp_configs
    assert trainable(twin) == trainable(model)
    assert torch.equal(twin(TOKENS)[0], model(TOKENS)[0])


class TestSharedInput:
    SIDE_BY_SIDE = (("q_proj", "k_proj", "v_proj"),)

    def groups(self, **arguments) -> tuple:
        return inject(Model(), config(**arguments)).groups

    @pytest.mark.parametrize(
        ("targets", "members"),
        [
            (["q_proj", "k_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"]),
            (["q_proj", "v_proj", "up"], ["q_proj", "v_proj"]),
            (ALL_LINEAR, ["q_proj", "k_proj", "v_proj"]),
        ],
    )
    def test_named_layers_side_by_side(self, targets, members):
        share = [["q_proj", "k_proj", "v_proj"]] if "k_proj" in members else [["q_proj", "v_proj"]]
        groups = self.groups(target_modules=targets, share_input=share)
        assert groups == tuple(tuple(f"model.layers.{i}.attention.{m}" for m in members) for i in range(3))

    def test_names_may_have_several_parts(self):
        groups = self.groups(target_modules=ALL_LINEAR, share_input=[["1.attention.q_proj", "1.up"]])
        assert groups == (("model.layers.1.attention.q_proj", "model.layers.1.up"),)

    def test_only_adapted_layers_take_part(self):
        model = Model()
        report = inject(
            model, config(target_modules=["0.attention.q_proj", "v_proj"], share_input=[["q_proj", "v_proj"]])
        )
        assert report.groups == (("model.layers.0.attention.q_proj", "model.layers.0.attention.v_proj"),)
        assert model.model.layers[1].attention.v_proj.shared_input is None

    @pytest.mark.parametrize("share", [True, False])
    def test_unknown_models_have_none(self, share):
        assert self.groups(target_modules=ALL_LINEAR, share_input=share) == ()

    def test_the_report_names_them(self):
        report = inject(Model(), config(share_input=[["q_proj", "v_proj"]]))
        assert "one operator per input: q_proj+v_proj x3" in str(report)

    def test_a_model_with_groups_is_the_model_without(self):
        results = []
        for share in ([["q_proj", "k_proj", "v_proj"]], False):
            model = Model()
            torch.manual_seed(1)
            inject(model, config(target_modules=ALL_LINEAR, share_input=share, init_lora_weights=False))
            exact = copy.deepcopy(model).double()(TOKENS)
            results.append((*model(TOKENS), *exact))
        new, old = results
        for y, other, reference64 in zip(new[:2], old[:2], old[2:], strict=True):
            testing.assert_close(y, other, reference64, torch.float32)

    @pytest.mark.parametrize(
        ("share", "message"),
        [
            ([["q_proj", "query"]], "share_input name 'query' fits no adapted layer"),
            ([["q_proj", "k_proj"]], "share_input name 'k_proj' fits no adapted layer"),
            ([["0.attention.q_proj", "1.attention.v_proj"]], None),
            ([["q_proj", "v_proj"], ["v_proj", "q_proj"]], "share_input must name model.layers.0.attention"),
        ],
    )
    def test_groups_that_cannot_be(self, share, message):
        model = Model()
        before = snapshot(model)
        if message is None:
            assert inject(model, config(share_input=share)).groups == (
                ("model.layers.0.attention.q_proj", "model.layers.1.attention.v_proj"),
            )
            return
        with pytest.raises(ValueError, match=message):
            inject(model, config(share_input=share))
        assert snapshot(model) == before

    def test_layers_of_different_width(self):
        model = nn.Module()
        model.a, model.b = nn.Linear(8, 8), nn.Linear(9, 8)
        with pytest.raises(ValueError, match=r"share_input 'a\+b': the layers must have the same in_features"):
            inject(model, config(target_modules=["a", "b"], share_input=[["a", "b"]]))

    @pytest.mark.parametrize("share", ["q_proj", 1, [], [["q_proj"]], [["q_proj", "q_proj"]], ["q_proj", "v_proj"]])
    def test_what_is_no_group(self, share):
        with pytest.raises((TypeError, ValueError), match="share_input"):
            config(share_input=share)


class TestRecompute:
    @pytest.mark.parametrize("mode", [True, "full"])
    def test_mlps_recompute_as_the_config_says(self, mode):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, **sizes))
        inject(model, LoRAConfig(target_modules="all-linear", recompute_mlp=mode))
        modes = {layer.mlp.lorasp_recompute for layer in model.layers}
        assert modes == {"activation" if mode is True else mode}

    def test_a_model_without_known_mlps_stays_as_it_was(self):
        model = Model()
        before = snapshot(model)
        with pytest.raises(ValueError, match="recompute_mlp: model must have MLPs of a known kind"):
            inject(model, LoRAConfig(target_modules=["q_proj"], recompute_mlp=True))
        assert snapshot(model) == before
