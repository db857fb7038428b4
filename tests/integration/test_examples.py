"""The example programs, run at a tiny size in this process."""

import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CLASSIFIER = ["--steps", "4", "--lines", "160", "--hidden-size", "32"]
DECODER = ["--steps", "4", "--base-steps", "1", "--hidden-size", "32", "--sample", "4"]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def classifier() -> ModuleType:
    return example("finetune_classifier")


@pytest.fixture(scope="module")
def decoder() -> ModuleType:
    return example("finetune_decoder")


class TestClassifier:
    @pytest.mark.parametrize("freeze_A", [False, True])
    def test_the_saved_adapter_is_the_trained_one(self, classifier, freeze_A, tmp_path, capsys):
        flags = ["--freeze-A", "--gradient-checkpointing"] * freeze_A
        accuracy = classifier.main([*CLASSIFIER, *flags, "--out", str(tmp_path)])
        assert accuracy["reloaded"] == accuracy["after"]
        assert 0 < accuracy["before"] < 1
        assert f"{accuracy['after']:.3f} after, {accuracy['reloaded']:.3f} reloaded" in capsys.readouterr().out
        saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert {key.split(".")[2] for key in saved} == {"roberta", "classifier"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert PeftModel.from_pretrained(classifier.make_base(32), tmp_path / "adapter")

    def test_trainer_goes_on_from_its_checkpoint(self, classifier, tmp_path):
        """The second half of a run, from a checkpoint of Trainer's, ends where the whole run did."""
        classifier.main([*CLASSIFIER, "--out", str(tmp_path)])
        whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        last = tmp_path / "checkpoint-4"
        assert (last / "model.safetensors").exists()
        for file in last.iterdir():
            file.unlink()
        last.rmdir()
        classifier.main([*CLASSIFIER, "--resume", "--out", str(tmp_path)])
        resumed = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


class TestDecoder:
    @pytest.mark.parametrize("freeze_A", [False, True])
    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, decoder, freeze_A, tmp_path, capsys):
        arguments = [*DECODER, *["--freeze-A"] * freeze_A, "--out"]
        whole = decoder.main([*arguments, str(tmp_path / "whole")])
        decoder.main([*arguments, str(tmp_path / "parts"), "--stop-at", "2"])
        resumed = decoder.main([*arguments, str(tmp_path / "parts"), "--resume"])
        assert resumed["after"] == whole["after"] < whole["before"]
        files = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("whole", "parts")]
        assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
        shown = capsys.readouterr().out
        assert "def " in shown
        assert f"{whole['after']:.3f} at step 4" in shown


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_read_as_documentation(path):
    text = path.read_text()
    assert len(text.splitlines()) < 150
    assert text.startswith('"""')
    assert f"examples/{path.name}" in text.split('"""')[1]
