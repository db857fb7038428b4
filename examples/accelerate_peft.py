"""Speed up an existing PEFT checkpoint: two lines between loading it and training on.

    model = PeftModel.from_pretrained(base, checkpoint, is_trainable=True)
    print(lorasp.accelerate(model))

Here the checkpoint is made first: a byte-level Llama with random weights, to which PEFT gives a LoRA adapter and trains
it for two steps on text this machine has. The program then loads it, measures a training step and what backward keeps,
with PEFT and accelerated, trains on, saves with PEFT, and shows that PEFT alone reads the file and computes the same.

    python examples/accelerate_peft.py [--hidden 256] [--layers 4] [--steps 10] [--dropout 0.05] [--freeze-A]
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lorasp
from lorasp.memory import saved_bytes

ROWS, CONTEXT, RANK = 4, 128, 16


def make_base(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_batches(count: int) -> list[Tensor]:
    """Rows of bytes of the standard library's own source."""
    text = Path(statistics.__file__).read_bytes()
    starts = torch.arange(count * ROWS) * (len(text) - CONTEXT) // (count * ROWS)
    rows = [torch.frombuffer(bytearray(text[start : start + CONTEXT]), dtype=torch.uint8) for start in starts.tolist()]
    return list(torch.stack(rows).long().split(ROWS))


def train(model: nn.Module, batches: list[Tensor]) -> float:
    """The median time of a step, in milliseconds."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    times = []
    for rows in batches:
        start = time.perf_counter()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def make_checkpoint(base: nn.Module, folder: Path, batches: list[Tensor], dropout: float) -> None:
    """What you have already."""
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    train(model, batches)
    model.save_pretrained(folder)


def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=rows, labels=rows).loss.item()


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--freeze-A", action="store_true", help="LoRA-FA: train B only, for memory")
    options = parser.parse_args(argv)
    # PEFT asks transformers for an attribute that transformers is renaming.
    warnings.simplefilter("ignore", FutureWarning)
    *batches, held_out = make_batches(options.steps + 1)
    base = make_base(options.hidden, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, trained = Path(folder) / "checkpoint", Path(folder) / "trained"
        make_checkpoint(copy.deepcopy(base), checkpoint, batches[:2], options.dropout)

        model = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint, is_trainable=True).train()
        slow = PeftModel.from_pretrained(copy.deepcopy(base), checkpoint, is_trainable=True).train()
        print(lorasp.accelerate(model, freeze_A=options.freeze_A or None))

        kept = [
            saved_bytes(lambda m=m: m(input_ids=held_out, labels=held_out), exclude=m) / 2**20 for m in (slow, model)
        ]
        at_first = held_out_loss(model, held_out)
        ms_before = train(slow.train(), batches)
        ms_after = train(model.train(), batches)
        print(f"step:                {ms_before:7.1f} ms with PEFT, {ms_after:7.1f} ms accelerated")
        print(f"kept for backward:   {kept[0]:7.1f} MiB with PEFT, {kept[1]:7.1f} MiB accelerated")

        model.save_pretrained(trained)
        again = PeftModel.from_pretrained(copy.deepcopy(base), trained)
        ours, theirs = held_out_loss(model, held_out), held_out_loss(again, held_out)
        print(f"held-out loss:       {at_first:.4f}, then {ours:.4f}; with PEFT, from the file it saved, {theirs:.4f}")
    return {
        "ms_before": ms_before, "ms_after": ms_after, "kept_before": kept[0], "kept_after": kept[1],
        "held_out_at_first": at_first, "held_out": ours, "held_out_again": theirs,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
