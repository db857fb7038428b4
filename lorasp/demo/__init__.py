"""`lorasp demo`: one base model, adapted to another domain six ways, on text every machine has.

A byte-level Llama-style decoder learns English prose (CPython's documentation topics) for a short while. From those
weights full fine-tuning, PEFT LoRA, lorasp LoRA, lorasp LoRA-FA, LoRA-SP and HiddenKey each learn Python source (the
standard library) on the same batches; the LoRA methods start from the same A and B. The methods take turns, step by
step, so that a busy moment of the machine hits all of them alike.
"""

import copy
import math
import pydoc_data.topics
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import lorasp
from lorasp import info
from lorasp.memory import saved_bytes

RANK, ALPHA = 16, 32
HIDDENKEY = lorasp.HiddenKeyConfig(attention_p=0.1, hidden_p=0.1)
_HELD_OUT = 0.1
_SOURCE_BYTES = 2_000_000


@dataclass(frozen=True)
class Size:
    """A model and how long it trains; `context` bytes per sequence, `base_batch` and `batch` sequences per step."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    context: int
    base_steps: int
    base_batch: int
    steps: int
    batch: int
    base_lr: float
    full_lr: float
    lora_lr: float


SIZES = {
    "tiny": Size(64, 2, 4, 176, 64, 10, 8, 6, 8, 4e-3, 2e-3, 1e-2),
    "small": Size(512, 4, 8, 1408, 128, 140, 8, 24, 16, 2e-3, 6e-4, 4e-3),
    "medium": Size(1024, 8, 16, 2816, 512, 400, 8, 100, 16, 1e-3, 2e-4, 1e-3),
    "large": Size(2048, 8, 16, 5632, 1024, 400, 8, 100, 16, 6e-4, 1e-4, 5e-4),
}


def choose_size(device: torch.device) -> str:
    """small on a CPU; on a GPU by its memory: medium from 12 GB, large from 40 GB."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return "large" if memory > 40e9 else "medium" if memory > 12e9 else "small"


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, float32 elsewhere."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16", "bf16"} & set(info.cpu_features()) else torch.float32


@dataclass
class Corpus:
    """Bytes of one domain; batches come from `train`, held-out losses from `held_out`."""

    name: str
    train: Tensor
    held_out: Tensor

    @classmethod
    def of(cls, name: str, text: bytes) -> "Corpus":
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = int(len(data) * (1 - _HELD_OUT))
        return cls(name, data[:cut], data[cut:])

    def batch(self, count: int, size: Size, generator: torch.Generator, device: torch.device) -> Tensor:
        starts = torch.randint(len(self.train) - size.context, (count,), generator=generator)
        return self._rows(self.train, starts, size, device)

    def held_out_batch(self, size: Size, device: torch.device, count: int = 32) -> Tensor:
        starts = torch.linspace(0, len(self.held_out) - size.context - 1, count).long()
        return self._rows(self.held_out, starts, size, device)

    @staticmethod
    def _rows(data: Tensor, starts: Tensor, size: Size, device: torch.device) -> Tensor:
        return torch.stack([data[start : start + size.context + 1] for start in starts]).long().to(device)


def prose() -> Corpus:
    topics = pydoc_data.topics.topics
    return Corpus.of("English prose (pydoc_data.topics)", "\n\n".join(topics[k] for k in sorted(topics)).encode())


def source() -> Corpus:
    """The standard library's top-level modules in an order that mixes them, up to 2 MB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (path.name[::-1], path.name))
    text = b"\n".join(path.read_bytes() for path in files)
    return Corpus.of("Python source (standard library)", text[:_SOURCE_BYTES])


def make_model(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=size.context,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device, dtype)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-byte cross-entropy, in nats."""
    logits = model(input_ids=rows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@dataclass
class Method:
    """One way to adapt the base model, and what was measured of it."""

    name: str
    model: nn.Module
    lr: float
    hiddenkey: bool = False
    ms: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    saved: int = 0

    def __post_init__(self):
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0.0)

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        tensors = (t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
        return sum(t.nbytes for t in tensors if t.ndim)

    @property
    def median_ms(self) -> float:
        """Without the first steps, which allocate and compile."""
        return statistics.median(self.ms[min(3, len(self.ms) // 2) :])

    def set_lr(self, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share

    def loss(self, rows: Tensor) -> Tensor:
        """What a step descends; with HiddenKey over one byte less, as transformers shifts the labels itself."""
        if self.hiddenkey:
            return lorasp.hiddenkey_step(self.model, {"input_ids": rows[:, :-1], "labels": rows[:, :-1]}).loss
        return loss_of(self.model, rows)

    def step(self, rows: Tensor) -> None:
        self.loss(rows).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self, step: int, rows: Tensor) -> None:
        self.held_out.append((step, loss_of(self.model.eval(), rows).item()))
        self.model.train()


def make_methods(base: nn.Module, size: Size) -> list[Method]:
    """Six copies of the base; the LoRA methods start from one A and one B, written and read as PEFT's files."""
    from peft import LoraConfig, get_peft_model

    full = copy.deepcopy(base).requires_grad_(True)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute that transformers is renaming.
        warnings.simplefilter("ignore", FutureWarning)
        peft_model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    lora, fa, sp, hiddenkey = (copy.deepcopy(base) for _ in range(4))
    # Masters, as PEFT's files bring them to the others.
    masters = torch.float32 if base.dtype.itemsize == 2 else None
    lorasp.inject(sp, lorasp.LoRAConfig(partial=lorasp.PartialConfig(), adapter_dtype=masters, **settings))
    with tempfile.TemporaryDirectory() as folder:
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        for model in (lora, fa, hiddenkey):
            lorasp.load_adapter(model, folder, freeze_A=model is fa)
        lorasp.load_adapter(sp, folder)
    lorasp.apply_hiddenkey(hiddenkey, HIDDENKEY)
    return [
        Method("full fine-tuning", full, size.full_lr),
        Method("PEFT LoRA", peft_model, size.lora_lr),
        Method("lorasp LoRA", lora, size.lora_lr),
        Method("lorasp LoRA-FA", fa, size.lora_lr),
        Method("lorasp LoRA-SP", sp, size.lora_lr),
        Method("lorasp HiddenKey", hiddenkey, size.lora_lr, hiddenkey=True),
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_base(model: nn.Module, corpus: Corpus, size: Size, device: torch.device, seed: int) -> Iterator[float]:
    """Yields the training loss of every step; cosine schedule with a warm-up of a tenth."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.base_lr, weight_decay=0.0, betas=(0.9, 0.95))
    for step in range(size.base_steps):
        warm = min(1.0, (step + 1) / (0.1 * size.base_steps))
        for group in optimizer.param_groups:
            group["lr"] = size.base_lr * warm * (0.55 + 0.45 * math.cos(math.pi * step / size.base_steps))
        loss = loss_of(model, corpus.batch(size.base_batch, size, generator, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def adapt(
    methods: list[Method], corpus: Corpus, size: Size, steps: int, device: torch.device, seed: int
) -> Iterator[float]:
    """Train all methods in turn on the same batches, learning rates falling linearly, and fill in what was measured.

    Yields, after every step, the mean of the methods' last held-out losses.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    held_out = corpus.held_out_batch(size, device)
    every = max(1, steps // 8)
    for method in methods:
        method.evaluate(0, held_out)
    for step in range(1, steps + 1):
        rows = corpus.batch(size.batch, size, generator, device)
        for method in methods:
            method.set_lr(1 - (step - 1) / steps)
        turn = step % len(methods)
        for method in (*methods[turn:], *methods[:turn]):
            _synchronize(device)
            start = time.perf_counter()
            method.step(rows)
            _synchronize(device)
            method.ms.append(1e3 * (time.perf_counter() - start))
        if step % every == 0 or step == steps:
            for method in methods:
                method.evaluate(step, held_out)
        yield statistics.fmean(method.held_out[-1][1] for method in methods)
    for method in methods:
        method.saved = saved_bytes(lambda method=method: method.loss(rows), exclude=method.model)


def run(
    *, device: torch.device, size: str = "auto", steps: int | None = None, seed: int = 0, out: Path = Path(".")
) -> list[Method]:
    """Train, adapt, print the table and write `out`/lorasp-demo.png; returns what was measured."""
    from transformers.utils import logging

    from lorasp.demo import report

    logging.set_verbosity_error()
    start = time.perf_counter()
    size_name = choose_size(device) if size == "auto" else size
    chosen, dtype = SIZES[size_name], choose_dtype(device)
    steps = steps or chosen.steps
    english, python = prose(), source()
    model = make_model(chosen, dtype, device, seed)
    report.print_start(model, size_name, dtype, device, english, python)
    with report.progress() as bar:
        _drive(bar, "learning English prose", train_base(model, english, chosen, device, seed), chosen.base_steps)
        torch.manual_seed(seed)
        methods = make_methods(model, chosen)
        _drive(bar, "six ways to learn Python", adapt(methods, python, chosen, steps, device, seed), steps)
    path = out / "lorasp-demo.png"
    report.plot(path, methods, info.device_name(device), dtype)
    report.print_end(methods, path, time.perf_counter() - start)
    return methods


def _drive(bar, text: str, losses: Iterator[float], total: int) -> None:
    task = bar.add_task(text, total=total, loss="")
    for loss in losses:
        bar.update(task, advance=1, loss=f"loss {loss:.2f}")
