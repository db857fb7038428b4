"""Adapter files: what is written, what is refused, and what a save leaves when it is killed at any step."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import TOKENS, WIDTH, Model
from torch import nn

from lorasp import LoRAConfig, inject, load_adapter, save_adapter
from lorasp.config import ALL_LINEAR
from lorasp.files.adapter_files import CONFIG_NAME, WEIGHTS_NAME

PREFIX = "base_model.model."


def config(**arguments) -> LoRAConfig:
    defaults = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return LoRAConfig(**(defaults | arguments))


def adapted(seed: int = 1, **arguments) -> nn.Module:
    """A model whose adapter, biases and saved modules have moved away from where they started."""
    model = Model()
    inject(model, config(**arguments))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


def saved(folder: Path, **arguments) -> nn.Module:
    model = adapted(**arguments)
    save_adapter(model, folder)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    return torch.cat([y.flatten() for y in model.eval()(TOKENS)])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


VARIANTS = {
    "lora": {},
    "lora_fa": {"freeze_A": True},
    "all_linear": {"target_modules": ALL_LINEAR},
    "regex": {"target_modules": r".*layers\.[02].*(q_proj|up)", "exclude_modules": r".*0\.up"},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "patterns": {"rank_pattern": {r"layers\.0\..*q_proj": 1, "q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
    "rslora": {"use_rslora": True, "r": 4},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["score", "norm"]},
    "tied_modules_to_save": {"modules_to_save": ["embed", "lm_head"], "bias": "all"},
    "dropout": {"lora_dropout": 0.25},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant, tmp_path):
    model = saved(tmp_path, **VARIANTS[variant])
    fresh = Model()
    report = load_adapter(fresh, tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))
    assert {n for n, p in fresh.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert report.trainable == sum(p.numel() for p in fresh.parameters() if p.requires_grad)

    prepared = adapted(seed=2, **VARIANTS[variant])
    assert not torch.equal(outputs(prepared), outputs(model))
    load_adapter(prepared, tmp_path)
    assert torch.equal(outputs(prepared), outputs(model))

    second = tmp_path / "again"
    save_adapter(fresh, second)
    assert (second / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()


@pytest.mark.gpu
def test_files_travel_between_devices(tmp_path):
    model = saved(tmp_path, modules_to_save=["score"])
    load_adapter(on_gpu := Model().cuda(), tmp_path)
    save_adapter(on_gpu, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (tmp_path / WEIGHTS_NAME).read_bytes()
    load_adapter(back := Model(), tmp_path / "again")
    assert torch.equal(outputs(back), outputs(model))


def test_files_are_pefts(tmp_path):
    saved(tmp_path, target_modules=["up"], bias="lora_only", modules_to_save=["score"], freeze_A=True)
    names = [f"model.layers.{i}.up" for i in range(3)]
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        **{f"{PREFIX}{name}.lora_A.weight": (2, WIDTH) for name in names},
        **{f"{PREFIX}{name}.lora_B.weight": (WIDTH, 2) for name in names},
        **{f"{PREFIX}{name}.base_layer.bias": (WIDTH,) for name in names},
        f"{PREFIX}score.weight": (2, WIDTH),
        f"{PREFIX}score.bias": (2,),
    }
    written = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert list(written) == sorted(written)
    expected = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["up"], "modules_to_save": ["score"],
        "fan_in_fan_out": False, "bias": "lora_only", "use_rslora": False, "inference_mode": True,
    }  # fmt: skip
    assert expected.items() <= written.items()
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]


def test_all_linear_is_written_as_the_names_it_stood_for(tmp_path):
    model = saved(tmp_path, target_modules=ALL_LINEAR, exclude_modules=["score"])
    names = json.loads((tmp_path / CONFIG_NAME).read_text())["target_modules"]
    assert names == [name for name, module in model.named_modules() if hasattr(module, "adapters")]
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("base", "in_file", "loaded"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),  # PEFT's default: masters over a half-precision base
        (torch.bfloat16, torch.float16, torch.float32),  # neither half holds the other
        (torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_the_files_dtype_is_kept_where_it_can_be(base, in_file, loaded, tmp_path):
    model = Model()
    inject(model, config())
    save_adapter(model.to(in_file), tmp_path)
    fresh = Model().to(base)
    load_adapter(fresh, tmp_path)
    q_proj = fresh.model.layers[0].attention.q_proj
    assert (q_proj.weight.dtype, q_proj.lora_A.dtype, q_proj.lora_B.dtype) == (base, loaded, loaded)
    assert torch.equal(q_proj.lora_A, model.model.layers[0].attention.q_proj.lora_A.to(loaded))


@pytest.mark.parametrize(("marked", "asked", "frozen"), [(True, None, True), (False, True, True), (True, False, False)])
def test_freeze_A_is_remembered_and_can_be_overridden(marked, asked, frozen, tmp_path):
    saved(tmp_path, freeze_A=marked)
    model = Model()
    load_adapter(model, tmp_path, freeze_A=asked)
    assert model.model.layers[0].attention.q_proj.lora_A.requires_grad is not frozen


def test_a_compiled_model_saves_under_its_own_names(tmp_path):
    model = adapted()
    save_adapter(torch.compile(model, backend="eager"), tmp_path)
    load_adapter(fresh := Model(), tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a pair as another tool would: no digest."""
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME, {"format": "pt"})


def rename_key(tensors):
    tensors[f"{PREFIX}model.layers.0.attention.w_proj.lora_A.weight"] = tensors.pop(
        f"{PREFIX}model.layers.0.attention.q_proj.lora_A.weight"
    )


def reshape(tensors):
    key = f"{PREFIX}model.layers.1.attention.v_proj.lora_B.weight"
    tensors[key] = tensors[key][:3].contiguous()


def edit_config(**changes):
    def spoil(folder: Path) -> None:
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        rewrite(folder, lambda tensors: None)

    return spoil


def truncate(folder: Path, keep: float) -> None:
    file = folder / WEIGHTS_NAME
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)


def swap_config(folder: Path) -> None:
    saved(other := folder / "other", lora_alpha=7)
    (other / CONFIG_NAME).replace(folder / CONFIG_NAME)


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")


DAMAGE = {
    "missing and unknown keys": (
        lambda folder: rewrite(folder, rename_key), ValueError,
        r"1 missing: base_model\.model\.model\.layers\.0\.attention\.q_proj\.lora_A\.weight; "
        r"1 unknown: base_model\.model\.model\.layers\.0\.attention\.w_proj\.lora_A\.weight$",
    ),
    "wrong shape": (
        lambda folder: rewrite(folder, reshape), ValueError,
        r"1 of another shape: \S*\.1\.attention\.v_proj\.lora_B\.weight \(3, 2\) in the file, \(8, 2\) in the model$",
    ),
    "truncated header": (lambda folder: truncate(folder, 0.1), ValueError, "is damaged or truncated"),
    "truncated data": (lambda folder: truncate(folder, 0.9), ValueError, "is damaged or truncated"),
    "empty": (lambda folder: truncate(folder, 0), ValueError, "is damaged or truncated"),
    "a flipped bit": (flip_a_bit, ValueError, "were not saved together, or one was changed since"),
    "another save's config": (swap_config, ValueError, "were not saved together"),
    "no weights": (lambda folder: (folder / WEIGHTS_NAME).unlink(), FileNotFoundError, "cannot read .*safetensors"),
    "no config": (lambda folder: (folder / CONFIG_NAME).unlink(), FileNotFoundError, "cannot read .*config.json"),
    "only a pickle": (only_a_pickle, FileNotFoundError, "adapter_model.bin is a pickle: not opened"),
    "config is not JSON": (lambda folder: (folder / CONFIG_NAME).write_text("{"), ValueError, "is not JSON"),
    "another method": (edit_config(peft_type="IA3"), ValueError, "peft_type must be LORA in .*, got 'IA3'"),
    "another feature": (edit_config(use_dora=True), ValueError, "asks for what lorasp does not do: use_dora=True"),
    "another init": (edit_config(init_lora_weights="pissa"), ValueError, "does not do: init_lora_weights='pissa'"),
    "an invalid field": (edit_config(r=0), ValueError, r"config\.json: LoRAConfig: r must be an int >= 1, got 0"),
    "another rank": (edit_config(r=3), ValueError, "12 of another shape|r=3, .* in the file, r=2"),
}  # fmt: skip


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("damage", list(DAMAGE))
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(damage, prepared, tmp_path):
    spoil, kind, message = DAMAGE[damage]
    saved(tmp_path)
    spoil(tmp_path)
    model = adapted(seed=2) if prepared else Model()
    before, modules = state(model), [id(module) for module in model.modules()]
    with pytest.raises(kind, match=message):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)
    assert [id(module) for module in model.modules()] == modules
    assert all(p.requires_grad for p in model.parameters()) is not prepared


def test_an_adapter_for_another_model_lists_what_exists(tmp_path):
    saved(tmp_path)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
    with pytest.raises(ValueError, match=r"no layer is left to adapt: .*; its linear layers are named: 0$"):
        load_adapter(model, tmp_path)
    inject(model, config(target_modules=["0"]))
    unknown = re.escape(", ".join(sorted(load_file(tmp_path / WEIGHTS_NAME))[:8])) + ", and 4 more"
    with pytest.raises(ValueError, match=rf"2 missing: \S*model\.0\.lora_A\.weight, .*; 12 unknown: {unknown}"):
        load_adapter(model, tmp_path)


def test_an_adapter_for_another_width_lists_shapes(tmp_path):
    saved(tmp_path)
    model = Model()
    model.model.layers[0].attention.q_proj = nn.Linear(WIDTH, 2 * WIDTH)
    with pytest.raises(ValueError, match=r"q_proj\.lora_B\.weight \(8, 2\) in the file, \(16, 2\) in the model"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("change", [{"lora_alpha": 7}, {"use_rslora": True}, {"alpha_pattern": {"1.*q_proj": 7}}])
def test_a_prepared_model_with_another_scale_is_refused(change, tmp_path):
    saved(tmp_path)
    model = adapted(seed=2, **change)
    before = state(model)
    with pytest.raises(ValueError, match=r"does not fit the model's adapters: .*q_proj: r=2, .* in the file, r="):
        load_adapter(model, tmp_path)
    assert unchanged(model, before)


def test_two_values_for_a_tied_tensor_are_refused(tmp_path):
    saved(tmp_path, modules_to_save=["embed", "lm_head"])
    rewrite(tmp_path, lambda tensors: tensors[f"{PREFIX}lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match="two values for one tied tensor"):
        load_adapter(Model(), tmp_path)


def test_saving_needs_an_injected_adapter(tmp_path):
    with pytest.raises(ValueError, match="Model has no adapter of its own; pass the model given to inject"):
        save_adapter(Model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_meta_tensors_are_neither_saved_nor_loaded_into(tmp_path):
    saved(tmp_path)
    model = Model().to("meta")
    with pytest.raises(ValueError, match="must be on a real device"):
        load_adapter(model, tmp_path)
    inject(model, config())
    with pytest.raises(ValueError, match=r"hold no data \(meta device\): .*, and 4 more"):
        save_adapter(model, tmp_path)


def test_unwritable_folders(tmp_path, monkeypatch):
    model = saved(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"save_adapter: cannot write to .*file: "):
        save_adapter(model, tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=r"save_adapter: cannot write to .*below: Not a directory"):
        save_adapter(model, tmp_path / "file" / "below")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"save_adapter: cannot write to .*: No space left on device"):
        save_adapter(adapted(seed=3, r=4), tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME, "file"]
    load_adapter(fresh := Model(), tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))


def killed_at(step: int, model: nn.Module, folder: Path) -> bool:
    """Save in a child process that dies, without any clean-up, right before its step-th write, sync or rename."""
    child = os.fork()
    if child == 0:
        remaining = step

        def dying(function):
            def call(*arguments, **keywords):
                nonlocal remaining
                if remaining == 0:
                    os._exit(9)
                remaining -= 1
                return function(*arguments, **keywords)

            return call

        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            save_adapter(model, folder)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("new", [{"r": 4}, {"lora_alpha": 7}, {}])
def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(new, tmp_path):
    old_model, new_model = adapted(seed=1), adapted(seed=2, **new)
    expected = [outputs(copy.deepcopy(model)) for model in (old_model, new_model)]
    seen = []
    for step in range(100):
        folder = tmp_path / str(step)
        save_adapter(old_model, folder)
        killed = killed_at(step, new_model, folder)
        load_adapter(fresh := Model(), folder)
        seen.append([torch.equal(outputs(fresh), model) for model in expected].index(True))
        # The next save succeeds over whatever was left, and the one after it has nothing to tidy.
        save_adapter(old_model, folder)
        load_adapter(fresh := Model(), folder)
        assert torch.equal(outputs(fresh), expected[0])
        save_adapter(old_model, folder)
        assert sorted(os.listdir(folder)) == [CONFIG_NAME, WEIGHTS_NAME]
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("times", [1, 2, 7])
def test_a_save_ends_however_often_others_tidy_its_files_away(times, tmp_path, monkeypatch):
    """Processes that save to one folder take each other's drafts for what a killed save left."""
    replace, tidied = os.replace, []

    def after_somebody_else(source, target):
        if tidied.count(target) < times:
            tidied.append(target)
            os.unlink(source)
        replace(source, target)

    save_adapter(adapted(seed=1), tmp_path)
    monkeypatch.setattr(os, "replace", after_somebody_else)
    save_adapter(model := adapted(seed=2), tmp_path)
    assert len(tidied) == 3 * times
    load_adapter(fresh := Model(), tmp_path)
    assert torch.equal(outputs(fresh), outputs(model))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_NAME, WEIGHTS_NAME]


def test_a_save_into_a_folder_that_goes_away_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda source, target: shutil.rmtree(tmp_path / "gone") or os.stat(source))
    with pytest.raises(FileNotFoundError, match=r"save_adapter: cannot write to .*gone: No such file"):
        save_adapter(adapted(), tmp_path / "gone")


def test_a_first_save_that_is_killed_leaves_nothing_that_loads_wrongly(tmp_path):
    model = adapted()
    for step in range(100):
        folder = tmp_path / str(step)
        killed = killed_at(step, model, folder)
        fresh = Model()
        try:
            load_adapter(fresh, folder)
        except FileNotFoundError:
            assert not (folder / WEIGHTS_NAME).exists()
        else:
            assert torch.equal(outputs(fresh), outputs(model))
        if not killed:
            break
    assert not killed
