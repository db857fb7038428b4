"""Fine-tune a small Llama in plain PyTorch: LoRA, or LoRA-FA with its own optimizer; stop, resume, generate.

    python examples/finetune_decoder.py                    # LoRA; about half a minute on two cores
    python examples/finetune_decoder.py --freeze-A         # LoRA-FA: backward keeps x A^T instead of x
    python examples/finetune_decoder.py --stop-at 60       # as if killed there ...
    python examples/finetune_decoder.py --resume           # ... and on to the same result

Nothing is downloaded: a byte-level model first learns English (CPython's documentation) for a moment, which stands for
the pretrained model you have; the adapters then learn Python (the standard library).
"""

import argparse
import pydoc_data.topics
import sysconfig
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import lorasp

BATCH, LENGTH = 16, 64


def make_base(hidden_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bytes_of(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def loss_at(model: torch.nn.Module, text: torch.Tensor, step: int) -> torch.Tensor:
    """Next-byte loss on the batch of this step, the same one in every run."""
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    rows = torch.stack([text[start : start + LENGTH + 1] for start in starts]).long()
    logits = model(input_ids=rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def pretrain(model: torch.nn.Module, text: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        loss_at(model, text, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, model: torch.nn.Module, step: int, **stateful) -> None:
    """The adapter in PEFT's files, what else training needs beside it; never the base."""
    lorasp.save_adapter(model, folder)
    torch.save({"step": step} | {name: it.state_dict() for name, it in stateful.items()}, folder / "training.pt")


def restore(folder: Path, model: torch.nn.Module, **stateful) -> int:
    lorasp.load_adapter(model, folder)
    state = torch.load(folder / "training.pt", weights_only=True)
    for name, it in stateful.items():
        it.load_state_dict(state[name])
    return state["step"]


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--freeze-A", action="store_true", help="LoRA-FA")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--base-steps", type=int, default=200)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--sample", type=int, default=80, metavar="BYTES", help="how much to generate at the end")
    parser.add_argument("--stop-at", type=int, help="stop after this step")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("decoder"), help="folder of the checkpoint")
    options = parser.parse_args(argv)

    english = bytes_of("\n".join(pydoc_data.topics.topics.values()))
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    python = bytes_of("\n".join(path.read_text(encoding="utf-8") for path in files))
    train, held_out = python[: len(python) * 9 // 10], python[len(python) * 9 // 10 :]
    model = make_base(options.hidden_size)
    pretrain(model, english, options.base_steps)

    config = lorasp.LoRAConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", freeze_A=options.freeze_A
    )
    print(lorasp.inject(model, config))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.freeze_A:
        optimizer = lorasp.LoRAFAAdamW(model, lr=4e-3)  # corrects B's gradient for the A that stands still
    else:
        optimizer = torch.optim.AdamW(parameters, lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, options.steps, pct_start=0.1, cycle_momentum=False)
    begin = 0
    if options.resume:
        begin = restore(options.out, model, optimizer=optimizer, schedule=schedule)

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        loss = sum(loss_at(model, held_out, step).item() for step in range(4)) / 4
        model.train()
        return loss

    before = evaluate()
    end = min(options.steps, options.stop_at or options.steps)
    for step in range(begin, end):
        torch.manual_seed(step)  # dropout's masks: the same whether resumed or not
        loss = loss_at(model, train, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    save(options.out, model, end, optimizer=optimizer, schedule=schedule)

    after = evaluate()
    prompt = bytes_of("def ").long()[None]
    written = model.eval().generate(prompt, max_new_tokens=options.sample, do_sample=True, pad_token_id=0)
    print(bytes(written[0].tolist()).decode(errors="replace"))
    print(f"held-out loss on Python: {before:.3f} at step {begin}, {after:.3f} at step {end}; adapter in {options.out}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
