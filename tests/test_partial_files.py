"""Adapter files of LoRA-SP: dense tensors as PEFT has them, what trains beside them, and what does not fit."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import PREFIX, adapted, killed_at, outputs, state, unchanged
from tiny_model import WIDTH, Model
from torch import nn

from lorasp import LoRALinear, PartialConfig, load_adapter, resample, save_adapter
from lorasp.files.adapter_files import WEIGHTS_NAME

METADATA = "lorasp.partial"
EVERY = [(g, r) for g in ("feature", "element", "rank", "matrix") for r in ("never", 2, "epoch")]


def layers(model: nn.Module) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def same_selection(model: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a.trainable_mask_A(), b.trainable_mask_A())
        and torch.equal(a.trainable_mask_B(), b.trainable_mask_B())
        for a, b in zip(layers(model), layers(other), strict=True)
    )


def metadata(folder) -> dict[str, str]:
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return file.metadata()


def rewrite(folder, change) -> None:
    """Change the selection as another tool would: no digest."""
    found = metadata(folder)
    text = change(json.loads(found[METADATA]))
    save_file(load_file(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME, {"format": "pt", METADATA: text})


@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize(("granularity", "again"), EVERY)
def test_round_trip(granularity, again, freeze_A, tmp_path):
    freeze_A = freeze_A and granularity != "matrix"
    model = adapted(partial=PartialConfig(0.5, granularity, again), freeze_A=freeze_A)
    if again != "never":
        resample(model)
    save_adapter(model, tmp_path)
    report = load_adapter(fresh := Model(), tmp_path)
    # Matrices of a fixed selection differ in which module they are frozen in.
    seed = 0 if (granularity, again) == ("matrix", "never") else 7
    prepared = adapted(seed=2, partial=PartialConfig(0.5, granularity, again, seed=seed), freeze_A=freeze_A)
    load_adapter(prepared, tmp_path)
    for other in (fresh, prepared):
        assert torch.equal(outputs(other), outputs(model))
        assert same_selection(other, model)
    trainable = [sum(p.numel() for p in one.parameters() if p.requires_grad) for one in (fresh, model)]
    assert trainable == [report.trainable] * 2

    save_adapter(fresh, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()
    if again != "never":
        for one in (fresh, model):
            resample(one)
        assert same_selection(fresh, model)


def test_numbers_may_be_of_any_kind(tmp_path):
    model = adapted(partial=PartialConfig(Fraction(1, 2)), lora_alpha=Fraction(4))
    save_adapter(model, tmp_path)
    load_adapter(other := Model(), tmp_path)
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("granularity", ["feature", "element", "rank"])
def test_scores_cannot_be_drawn_again_but_are_stored(granularity, tmp_path):
    model = adapted(partial=PartialConfig(0.5, granularity))
    drawn = adapted(partial=PartialConfig(0.5, granularity))
    for layer in layers(model):
        layer.select(torch.randn(2, WIDTH), torch.randn(WIDTH, 2))
    assert not same_selection(model, drawn)
    save_adapter(model, tmp_path)
    load_adapter(fresh := Model(), tmp_path)
    assert same_selection(model, fresh)
    assert torch.equal(outputs(fresh), outputs(model))


def test_the_tensors_are_those_of_a_dense_adapter(tmp_path):
    save_adapter(model := adapted(partial=PartialConfig()), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert {key.rpartition(".lora_")[2] for key in tensors} == {"A.weight", "B.weight"}
    layer = model.model.layers[1].attention.v_proj
    assert torch.equal(tensors[f"{PREFIX}model.layers.1.attention.v_proj.lora_A.weight"], layer.lora_A)
    assert torch.equal(tensors[f"{PREFIX}model.layers.1.attention.v_proj.lora_B.weight"], layer.lora_B)


@pytest.mark.parametrize("granularity", ["feature", "element", "rank"])
def test_a_dense_adapter_brings_frozen_entries_that_count(granularity, tmp_path):
    save_adapter(dense := adapted(), tmp_path)
    model = adapted(seed=2, partial=PartialConfig(0.5, granularity), init_lora_weights=True)
    load_adapter(model, tmp_path)
    layer = model.model.layers[0].attention.q_proj
    assert layer.adapters.default.frozen_B.any()
    assert torch.equal(outputs(model), outputs(dense))
    load_adapter(model, tmp_path)
    assert torch.equal(outputs(model), outputs(dense))


def test_an_adapter_of_a_part_loads_where_all_of_it_trains(tmp_path):
    save_adapter(part := adapted(partial=PartialConfig()), tmp_path)
    whole = adapted(seed=2)
    load_adapter(whole, tmp_path)
    assert torch.equal(outputs(whole), outputs(part))
    assert all(layer.trainable_mask_A().all() for layer in layers(whole))


def without_a_layer(found):
    found["layers"].pop("model.layers.0.attention.q_proj")
    return json.dumps(found)


def with_another_layer(found):
    found["layers"]["elsewhere"] = found["layers"]["model.layers.0.attention.q_proj"]
    return json.dumps(found)


def with_field(value, field="active_B"):
    def change(found):
        found["layers"]["model.layers.0.attention.q_proj"][field] = value
        return json.dumps(found)

    return change


MISFITS = {
    "a layer is missing": (without_a_layer, "q_proj: no selection in the file$"),
    "a layer is unknown": (with_another_layer, "elsewhere: no such layer in the model$"),
    "too few bits": (with_field(""), r"q_proj: active_B is not a mask of shape \(8, 1\)$"),
    "not base64": (with_field("?"), r"active_B is not a mask of shape \(8, 1\)$"),
    "not text": (with_field(7), r"active_B is not a mask of shape \(8, 1\)$"),
    "nothing trains": (with_field("AA=="), "active_B leaves nothing to train$"),
    "draws": (with_field(-1, "draws"), "draws is -1$"),
    "another granularity": (
        lambda found: json.dumps(found | {"partial": found["partial"] | {"granularity": "element"}}),
        "granularity 'element' in the file, 'feature' in the model$|is not a mask of shape",
    ),
    "an invalid config": (
        lambda found: json.dumps(found | {"partial": {"trainable_ratio": 2}}),
        r"PartialConfig: trainable_ratio must be in \(0, 1\], got 2$",
    ),
    "an unknown field": (lambda found: json.dumps(found | {"partial": {"half": 1}}), "its selection is not readable"),
    "no layers": (lambda found: json.dumps({"partial": found["partial"]}), "its selection is not readable"),
    "not JSON": (lambda found: "{", "Expecting property name"),
}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("misfit", list(MISFITS))
def test_a_selection_that_does_not_fit_is_refused_and_changes_nothing(misfit, prepared, tmp_path):
    change, message = MISFITS[misfit]
    save_adapter(adapted(partial=PartialConfig()), tmp_path)
    rewrite(tmp_path, change)
    model = adapted(seed=2, partial=PartialConfig(seed=7)) if prepared else Model()
    before, modules = state(model), [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)
    assert [id(module) for module in model.modules()] == modules


def test_fixed_matrices_that_stand_the_other_way_round_are_refused(tmp_path):
    save_adapter(adapted(partial=PartialConfig(0.5, "matrix")), tmp_path)
    other = adapted(seed=2, partial=PartialConfig(0.5, "matrix", seed=5))
    before = state(other)
    with pytest.raises(ValueError, match=r"active_A is (True|False) in the file, (True|False) in the model"):
        load_adapter(other, tmp_path)
    assert unchanged(other, before)


def test_a_changed_selection_does_not_pass_for_the_saved_one(tmp_path):
    save_adapter(adapted(partial=PartialConfig()), tmp_path)
    found = metadata(tmp_path)
    first = json.loads(found[METADATA])
    first["partial"]["seed"] = 1
    save_file(load_file(tmp_path / WEIGHTS_NAME), tmp_path / WEIGHTS_NAME, found | {METADATA: json.dumps(first)})
    with pytest.raises(ValueError, match="were not saved together, or one was changed since"):
        load_adapter(Model(), tmp_path)


def test_a_killed_save_leaves_the_old_selection_or_the_new_one(tmp_path):
    models = [adapted(seed=s, partial=PartialConfig(seed=s)) for s in (1, 2)]
    expected = [outputs(model) for model in models]
    seen = []
    for step in range(100):
        save_adapter(models[0], folder := tmp_path / str(step))
        killed = killed_at(step, models[1], folder)
        load_adapter(fresh := Model(), folder)
        which = [torch.equal(outputs(fresh), one) for one in expected].index(True)
        assert same_selection(fresh, models[which])
        seen.append(which)
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}
