"""transformers' Trainer on an injected model: columns and labels, checkpointing, saving and loading, tied weights."""

import copy

import pytest
import torch
from hf_models import build, llama
from transformers import Trainer, TrainingArguments

from lorasp import LoRAConfig, PartialConfig, inject

CONFIG = LoRAConfig(r=4, target_modules="all-linear", lora_dropout=0.1, partial=PartialConfig())


def examples(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 48, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row, "note": "no argument of the model's forward"} for row in rows]


def collate(rows: list[dict]) -> dict:
    return {key: torch.stack([row[key] for row in rows]) if key != "note" else "" for key in rows[0]}


def tied_llama() -> torch.nn.Module:
    model = build(llama, tie_word_embeddings=True)
    torch.manual_seed(1)
    inject(model, CONFIG)
    return model


def trainer(model: torch.nn.Module, folder, **arguments) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        seed=0, **{"max_steps": 4, "save_steps": 2} | arguments,
    )  # fmt: skip
    return Trainer(model, arguments, data_collator=collate, train_dataset=examples(16), eval_dataset=examples(4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Four steps with a checkpoint in the middle: (its folder, the model)."""
    folder = tmp_path_factory.mktemp("trainer")
    whole = trainer(tied_llama(), folder)
    whole.train()
    return folder, whole.model


def test_it_sees_the_models_arguments_and_labels(tmp_path):
    ours, plain = trainer(tied_llama(), tmp_path), trainer(build(llama), tmp_path)
    assert ours.label_names == plain.label_names == ["labels"]
    assert ours.evaluate()["eval_loss"] > 0


def test_it_goes_on_from_its_checkpoint_to_the_same_weights(finished):
    folder, whole = finished
    resumed = trainer(tied_llama(), folder)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    state = resumed.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())


def test_it_loads_the_best_checkpoint_at_the_end(tmp_path):
    best = trainer(
        tied_llama(), tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    before = copy.deepcopy(best.model.state_dict())
    best.train()
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    middle = tied_llama()
    trainer(middle, tmp_path)._load_from_checkpoint(best.state.best_model_checkpoint)
    state = best.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in middle.state_dict().items())
    assert not all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_gradients_reach_every_adapter_through_checkpointed_layers(tmp_path):
    model = tied_llama()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer(model, tmp_path, gradient_checkpointing=True, max_steps=2, save_strategy="no").train()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not torch.equal(parameter, before[name])), name
