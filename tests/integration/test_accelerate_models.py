"""accelerate() in whole models: training as PEFT trains, what it keeps, files both ways, Trainer, sharding."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from test_peft import TARGETS, arguments, build, gpt2, llama, low_rank, move, peft_model, roberta, t5
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh

import lorasp
from lorasp import LoRAConfig, accelerate, inject, load_adapter, restore, save_adapter, testing, use_backend
from lorasp.integrations.peft_linear import FusedLinear
from lorasp.memory import saved_bytes

STEPS = 10
BACKENDS = [name for name in ("reference", "cpp") if lorasp.available_backends()[name] is None]


def batch(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 48, (2, 7), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "labels": torch.randint(3, 48, (2, 5), generator=generator)}
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if model.config.model_type == "roberta" else ids}


def train(model: nn.Module, backend: str = "auto") -> Tensor:
    """The losses of STEPS steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(STEPS):
        with use_backend(backend):
            loss = model(**batch(model)).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def injected(make, peft: PeftModel, freeze_A: bool = False) -> nn.Module:
    """lorasp's own layers with the A and B of PEFT's."""
    model = build(make)
    inject(model, LoRAConfig(**arguments(make), freeze_A=freeze_A))
    theirs = low_rank(peft)
    with torch.no_grad():
        for name, tensor in low_rank(model).items():
            tensor.copy_(theirs[name])
    return model


RUNS = [pytest.param(make, False, id=make.__name__) for make in TARGETS]


@pytest.mark.parametrize(("make", "freeze_A"), [*RUNS, pytest.param(roberta, True, id="roberta, LoRA-FA")])
def test_ten_steps_of_training(make, freeze_A):
    """The vector of losses, against the same run in fp64: with PEFT, with accelerated PEFT, with lorasp's layers."""
    peft = peft_model(build(make), **arguments(make))
    for name, parameter in peft.named_parameters():
        if freeze_A and "lora_A" in name:
            parameter.requires_grad_(False)
    exact, expected = train(copy.deepcopy(peft).double()), train(copy.deepcopy(peft))
    assert expected[-1] < expected[0]
    for backend in BACKENDS:
        fused = copy.deepcopy(peft)
        assert accelerate(fused).kept == {}
        for model in (fused, injected(make, peft, freeze_A)):
            actual = train(model, backend)
            testing.assert_close(actual, expected, exact, torch.float32, f"{type(model).__name__} {backend}")


@pytest.mark.parametrize("make", [llama, roberta, t5, gpt2])
def test_layers_on_one_input_are_those_inject_groups(make):
    peft = peft_model(build(make), **arguments(make))
    own = inject(build(make), LoRAConfig(**arguments(make)))
    report = accelerate(peft)
    prefix = "base_model.model."
    assert report.accelerated == tuple(prefix + name for name in own.adapted)
    assert report.groups == tuple(tuple(prefix + name for name in group) for group in own.groups)
    restore(peft)
    report = accelerate(peft, share_input=False)
    assert report.groups == ()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_backward_keeps_what_it_keeps_under_inject(freeze_A, dropout):
    """bf16 base, fp32 adapters."""
    base = build(llama, torch.bfloat16)
    own = copy.deepcopy(base)
    config = arguments(llama) | {"lora_dropout": dropout}
    inject(own, LoRAConfig(**config, freeze_A=freeze_A, adapter_dtype=torch.float32))
    peft = peft_model(base, **config)
    accelerate(peft, freeze_A=freeze_A)
    peft.set_adapter("default")
    x = torch.randn((2, 9, 32), dtype=torch.bfloat16, requires_grad=True)
    bytes_of = {m: saved_bytes(lambda m=m: m(inputs_embeds=x), exclude=m) for m in (own.train(), peft.train())}
    assert bytes_of[peft] == bytes_of[own]
    restore(peft)
    assert bytes_of[peft] < saved_bytes(lambda: peft(inputs_embeds=x), exclude=peft)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_files_interchange_after_training(make, tmp_path):
    fused = peft_model(build(make), **arguments(make))
    accelerate(fused)
    move(fused)
    fused.save_pretrained(tmp_path / "peft")
    plain = PeftModel.from_pretrained(build(make), tmp_path / "peft")
    assert not any(isinstance(module, FusedLinear) for module in plain.modules())
    own = build(make)
    load_adapter(own, tmp_path / "peft")
    factors = low_rank(fused)
    for other in (plain, own):
        assert all(torch.equal(tensor, factors[name]) for name, tensor in low_rank(other).items())
    move(own, seed=2)
    save_adapter(own, tmp_path / "lorasp")
    fused.load_adapter(tmp_path / "lorasp", "trained")
    fused.set_adapter("trained")
    with use_backend("reference"):
        actual, expected = (m(**batch(m)).logits for m in (fused, own))
    assert torch.equal(actual, expected)


def config(**changes) -> LoraConfig:
    return LoraConfig(**arguments(llama) | changes)


@pytest.mark.parametrize("freeze_A", [None, True])
def test_transformers_trainer(freeze_A, tmp_path):
    """Two steps, with gradient accumulation and a checkpoint that PEFT reads."""
    results = []
    for fused in (False, True):
        model = peft_model(build(llama), **arguments(llama))
        for name, parameter in model.named_parameters():
            if freeze_A and "lora_A" in name:
                parameter.requires_grad_(False)
        if fused:
            assert accelerate(model, freeze_A=freeze_A).kept == {}
        arguments_ = transformers.TrainingArguments(
            output_dir=tmp_path / str(fused), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            gradient_accumulation_steps=2, logging_steps=1, save_steps=2, learning_rate=1e-3, disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 43).reshape(8, 5)]
        with use_backend("reference"):
            trainer = transformers.Trainer(model=model, args=arguments_, train_dataset=rows)
            trainer.train()
        results.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        resumed = PeftModel.from_pretrained(build(llama), tmp_path / str(fused) / "checkpoint-2")
        factors = low_rank(model)
        assert all(torch.equal(tensor, factors[name]) for name, tensor in low_rank(resumed).items())
    theirs, ours = (torch.tensor(losses) for losses in results)
    assert len(theirs) == 2
    testing.assert_close(ours, theirs, theirs.double(), torch.float32)


def test_adapters_without_a_peft_model():
    """As transformers' and diffusers' own add_adapter puts them in."""
    model = build(llama, torch.float64)
    torch.manual_seed(3)
    inject_adapter_in_model(config(), model)
    expected = model(**batch(model)).logits
    report = accelerate(model)
    assert report.accelerated[0] == "model.layers.0.self_attn.q_proj"
    testing.assert_close(model(**batch(model)).logits, expected, expected, torch.float32)


@pytest.mark.parametrize("order", ["accelerate, shard", "shard, accelerate"])
def test_fully_shard_before_or_after(order, process_group):
    """The layers of a sharded model run fused, on the plain weights that stand there while forward runs."""
    ours = peft_model(build(llama), **arguments(llama))
    plain = copy.deepcopy(ours)
    accelerate(plain, freeze_A=True)
    mesh = DeviceMesh("cpu", [0])
    if order == "accelerate, shard":
        accelerate(ours, freeze_A=True)
    for layer in (*ours.base_model.model.model.layers, ours):
        fully_shard(layer, mesh=mesh)
    if order == "shard, accelerate":
        assert accelerate(ours, freeze_A=True).kept == {}
    for model in (ours, plain):
        model.set_adapter("default")
        model(**batch(model)).loss.backward()
    for (name, sharded), expected in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (sharded.grad is None) == (expected.grad is None) == ("lora_B" not in name)
        if expected.grad is not None:
            assert torch.equal(sharded.grad.full_tensor(), expected.grad), name
    saved = [saved_bytes(lambda m=m: m(**batch(m)), exclude=m) for m in (ours, plain)]
    assert saved[0] == saved[1]
