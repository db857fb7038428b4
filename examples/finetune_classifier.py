"""Fine-tune a RoBERTa classifier with transformers' Trainer: is this line English or Python?

    python examples/finetune_classifier.py                 # about half a minute on two cores
    python examples/finetune_classifier.py --freeze-A --gradient-checkpointing

Nothing is downloaded: the lines come from CPython's own documentation and standard library, and the base model is made
from a config. With a model of yours, replace make_base() by AutoModelForSequenceClassification.from_pretrained(...) and
encode() by its tokenizer; the rest stays.
"""

import argparse
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification, Trainer, TrainingArguments

import lorasp

BOS, PAD, EOS, FIRST_BYTE = 0, 1, 2, 3
LENGTH = 64
NAMES = {0: "English", 1: "Python"}


def encode(line: str) -> list[int]:
    """One token per byte, between a first and a last one."""
    return [BOS, *(FIRST_BYTE + byte for byte in line.encode()[: LENGTH - 2]), EOS]


def make_lines(count: int) -> list[dict]:
    """`count` labelled lines, half of each kind, in an order that mixes them."""
    english = "\n".join(pydoc_data.topics.topics.values()).splitlines()
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    python = "\n".join(path.read_text(encoding="utf-8") for path in files).splitlines()
    chooser, examples = random.Random(0), []
    for label, lines in ((0, english), (1, python)):
        lines = sorted({line.strip() for line in lines if len(line.strip()) > 20})
        examples += [{"input_ids": encode(line), "labels": label} for line in chooser.sample(lines, count // 2)]
    chooser.shuffle(examples)
    return examples


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right."""
    longest = max(len(example["input_ids"]) for example in examples)
    input_ids = torch.tensor([e["input_ids"] + [PAD] * (longest - len(e["input_ids"])) for e in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": input_ids, "attention_mask": (input_ids != PAD).long(), "labels": labels}


def make_base(hidden_size: int) -> RobertaForSequenceClassification:
    """The same model at every call: what an adapter is loaded into must be what it was trained on."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=FIRST_BYTE + 256, hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=LENGTH + 2, bos_token_id=BOS, pad_token_id=PAD,
        eos_token_id=EOS, id2label=NAMES, initializer_range=0.1,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lines", type=int, default=4000, help="an eighth of them is held out")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--freeze-A", action="store_true", help="LoRA-FA: less memory for backward")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("classifier"), help="folder of checkpoints and adapter")
    options = parser.parse_args(argv)

    examples = make_lines(options.lines)
    held_out, train = examples[: len(examples) // 8], examples[len(examples) // 8 :]
    model = make_base(options.hidden_size)
    config = lorasp.LoRAConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"], freeze_A=options.freeze_A,
    )  # fmt: skip
    print(lorasp.inject(model, config))
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def make_trainer(model: torch.nn.Module) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(options.out), max_steps=options.steps, per_device_train_batch_size=32,
            per_device_eval_batch_size=128, learning_rate=3e-3, warmup_steps=10, max_grad_norm=1.0,
            save_steps=max(1, options.steps // 2), logging_steps=max(1, options.steps // 4), report_to=[],
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        return Trainer(
            model, arguments, data_collator=collate, train_dataset=train, eval_dataset=held_out,
            compute_metrics=accuracy,
        )  # fmt: skip

    trainer = make_trainer(model)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=options.resume)
    after = trainer.evaluate()["eval_accuracy"]

    # A few hundred kB, in PEFT's format: the adapter and the classifier, not the base.
    lorasp.save_adapter(model, options.out / "adapter")
    fresh = make_base(options.hidden_size)
    lorasp.load_adapter(fresh, options.out / "adapter")
    reloaded = make_trainer(fresh).evaluate()["eval_accuracy"]
    print(f"accuracy on held-out lines: {before:.3f} before, {after:.3f} after, {reloaded:.3f} reloaded from its files")
    return {"before": before, "after": after, "reloaded": reloaded}


if __name__ == "__main__":
    main()
