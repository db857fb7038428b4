"""accelerate() in whole models: training as PEFT trains, PEFT's files and every PEFT call afterwards."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter
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


@pytest.fixture(scope="module")
def twins() -> tuple[PeftModel, PeftModel]:
    """A PEFT model with two adapters, and the same model accelerated; in fp64, where rounding hides nothing."""
    peft = peft_model(build(llama, torch.float64), **arguments(llama))
    peft.add_adapter("second", config(r=2, lora_alpha=3))
    fused = copy.deepcopy(peft)
    accelerate(fused)
    return peft, fused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = peft_model(build(llama, torch.float64), **arguments(llama) | {"r": 3})
    move(model)
    model.save_pretrained(folder)
    return folder


# What a PEFT user does to a model, m; the result is what it returns, or else the model's logits and gradients after it.
def set_adapter(m, saved):
    m.set_adapter("second")


def two_active(m, saved):
    m.base_model.set_adapter(["default", "second"])


def add_adapter(m, saved, **changes):
    torch.manual_seed(7)
    m.add_adapter("third", config(**changes))
    m.set_adapter("third")


def add_adapter_with_dora(m, saved):
    add_adapter(m, saved, use_dora=True)


def add_adapter_to_other_layers(m, saved):
    add_adapter(m, saved, target_modules=["lm_head", "q_proj"])


def load_adapter_(m, saved):
    m.load_adapter(saved, "loaded", is_trainable=True)
    m.set_adapter("loaded")


def load_adapter_by_meta(m, saved):
    m.load_adapter(saved, "loaded", low_cpu_mem_usage=True)
    m.set_adapter("loaded")


def load_into_an_adapter(m, saved):
    load_adapter_(m, saved)
    with torch.no_grad():
        m.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.loaded.weight").zero_()
    m.load_adapter(saved, "loaded", is_trainable=True)


def hotswap(m, saved):
    m.load_adapter(saved, "loaded", is_trainable=True)
    m.set_adapter("loaded")
    hotswap_adapter(m, saved, "loaded")
    return m(**batch(m)).logits


def delete_adapter(m, saved):
    m.delete_adapter("second")


def delete_active_adapter(m, saved):
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        m.delete_adapter("default")


def disable_adapter(m, saved):
    with m.disable_adapter():
        return m(**batch(m)).logits


def disable_adapter_and_return(m, saved):
    with m.disable_adapter():
        m(**batch(m))


def merge_adapter(m, saved):
    m.merge_adapter()
    return m(**batch(m)).logits


def merge_named_adapter(m, saved):
    m.merge_adapter(["second"], safe_merge=True)
    return m(**batch(m)).logits


def unmerge_adapter(m, saved):
    m.merge_adapter()
    m.unmerge_adapter()


def merge_and_unload(m, saved):
    merged = m.merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())
    return merged(**batch(merged)).logits


def unload(m, saved):
    base = m.unload()
    return base(**batch(base)).logits


def add_weighted_adapter(m, saved, kind="linear"):
    m.add_weighted_adapter(["default", "third"], [0.5, -2.0], "sum", combination_type=kind)
    m.set_adapter("sum")


def add_weighted_adapter_linear(m, saved):
    add_adapter(m, saved)
    add_weighted_adapter(m, saved)


def add_weighted_adapter_cat(m, saved):
    add_adapter(m, saved, r=3)
    add_weighted_adapter(m, saved, "cat")


def add_weighted_adapter_svd(m, saved):
    add_adapter(m, saved, r=3)
    add_weighted_adapter(m, saved, "svd")


def mixed_batch(m, saved):
    m.eval()
    return m(**batch(m), adapter_names=["second", "__base__"]).logits


def scale(m, saved):
    for module in m.modules():
        if isinstance(module, Linear):
            module.set_scale("default", 3.0)
            module.scale_layer(0.5)
            module.unscale_layer(0.25)


def rescale(m, saved):
    with rescale_adapter_scale(m, 0.3):
        return m(**batch(m)).logits


def generate(m, saved):
    return m.generate(torch.arange(3, 9)[None], max_new_tokens=4, min_new_tokens=4)


def get_state_dict(m, saved):
    return torch.cat([tensor.flatten() for _, tensor in sorted(get_peft_model_state_dict(m).items())])


def gradient_checkpointing(m, saved):
    m.train()
    m.gradient_checkpointing_enable()
    m.enable_input_require_grads()


CALLS = (
    set_adapter, two_active, add_adapter, add_adapter_with_dora, add_adapter_to_other_layers, load_adapter_,
    load_adapter_by_meta, load_into_an_adapter, hotswap, delete_adapter, delete_active_adapter, disable_adapter,
    disable_adapter_and_return, merge_adapter, merge_named_adapter, unmerge_adapter, merge_and_unload, unload,
    add_weighted_adapter_linear, add_weighted_adapter_cat, add_weighted_adapter_svd, mixed_batch, scale, rescale,
    generate, get_state_dict, gradient_checkpointing,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.rstrip("_"))
def test_every_call_of_pefts_gives_what_peft_gives(call, twins, saved):
    results = []
    for model in twins:
        model = copy.deepcopy(model)
        found = call(model, saved)
        if found is None:
            outputs = model(**batch(model))
            outputs.loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found = {"logits": outputs.logits.detach()} | gradients
            assert model.get_nb_trainable_parameters()[0] > 0
        results.append(found if isinstance(found, dict) else {"found": found.detach()})
    expected, actual = results
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, expected[name], expected[name], torch.float32, name)


def test_what_peft_says_and_writes(twins, capsys, tmp_path):
    written = []
    for model, folder in zip(twins, ("peft", "fused"), strict=True):
        model.print_trainable_parameters()
        model.save_pretrained(tmp_path / folder)
        files = {}
        for path in (tmp_path / folder).rglob("adapter_*"):
            name, content = str(path.relative_to(tmp_path / folder)), path.read_bytes()
            if path.suffix == ".json":
                content = json.loads(content)
                content["target_modules"].sort()  # a set in PEFT
            files[name] = content
        written.append(files)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert written[0] == written[1]
    assert len(written[0]) == 4
    statuses = [[(s.name, s.active_adapters, s.requires_grad) for s in model.get_layer_status()] for model in twins]
    assert statuses[0] == statuses[1]


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


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
