"""What two processes must get right together: adapter files of sharded models, and what is refused."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_checks import VARIANTS, adapted, assert_equal, base, half, loss, sharded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lorasp
from lorasp import LoRAConfig, PartialConfig, check_processes, inject, load_adapter, save_adapter
from lorasp.files.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from lorasp.sharding import assign

SAVED = {
    "LoRA": {"bias": "all", "modules_to_save": ["embed", "lm_head", "score"], "r": 1},
    "LoRA-SP": {"partial": PartialConfig()},
    "LoRA-SP elements": {"partial": PartialConfig(granularity="element"), "freeze_A": True},
    "LoRA-SP resampled": {"partial": PartialConfig(granularity="rank", resample=2)},
    "LoRA-SP matrices": {"partial": PartialConfig(granularity="matrix")},
}


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (WEIGHTS_NAME, CONFIG_NAME)]


def evaluate(model: nn.Module) -> Tensor:
    """Leaves the parameters outside the layers gathered: fully_shard keeps those of the root until a backward."""
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model(half(0))])


def state(model: nn.Module) -> dict[str, Tensor]:
    values = model.state_dict().items()
    return {name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for name, value in values}


def on_one_rank(act: Callable[[], None]) -> None:
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def check_round_trip(scratch: Path, **arguments) -> None:
    """Shards write the bytes one process writes, and read them: into other values, another selection."""
    whole = adapted(**arguments)
    # Of a model that is sharded at its root only, the adapters too stay gathered after a forward.
    shard = sharded if "bias" in arguments else fully_shard
    model = shard(copy.deepcopy(whole))
    on_one_rank(lambda: save_adapter(whole, scratch / "one"))
    evaluate(model)
    save_adapter(model, scratch / "shards")
    assert files(scratch / "shards") == files(scratch / "one")

    if (partial := arguments.get("partial")) is not None and partial.granularity != "matrix":
        arguments = arguments | {
            "partial": PartialConfig(partial.trainable_ratio, partial.granularity, partial.resample, 9)
        }
    other = shard(adapted(seed=2, **arguments))
    assert not torch.equal(evaluate(other), evaluate(whole))
    load_adapter(other, scratch / "shards")
    assert_equal(state(other), state(whole))
    # Summed up by another process: the C++ kernels take rows in the same order in both.
    assert torch.equal(evaluate(other), evaluate(whole))
    load_adapter(plain := base(), scratch / "shards")
    assert torch.equal(evaluate(plain), evaluate(whole))


def check_made_on_meta(scratch: Path, **arguments) -> None:
    """As models too large for one process are: no values before the shards are there."""
    whole = adapted(**arguments)
    on_one_rank(lambda: save_adapter(whole, scratch / "one"))
    with torch.device("meta"):
        model = sharded(adapted(**arguments))
    model.to_empty(device="cpu")
    for key, value in whole.state_dict().items():
        if ".adapters." not in key:
            assign(model.get_parameter(key), value)
    torch.manual_seed(7)
    for module in (module for module in model.modules() if isinstance(module, lorasp.LoRALinear)):
        module.reset_lora_parameters()
    check_processes(model)
    assert evaluate(model).isfinite().all()
    load_adapter(model, scratch / "one")
    assert_equal(state(model), state(whole))


def check_replicas_of_shards(scratch: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    whole = adapted()
    save_adapter(sharded(copy.deepcopy(whole), mesh=mesh), scratch / "shards")
    load_adapter(other := sharded(adapted(seed=2), mesh=mesh), scratch / "shards")
    assert_equal(state(other), state(whole))


def check_values(scratch: Path) -> None:
    """set_lora, select and resample in shards; lora_A and lora_B put together from them."""
    whole, model = (adapted(partial=PartialConfig()) for _ in range(2))
    layers = [one.model.layers[0].up for one in (whole, sharded(model))]
    scores = torch.arange(24.0).reshape(3, 8), torch.arange(24.0).reshape(8, 3)
    for layer in layers:
        layer.set_lora(*scores)
        layer.select(*(-score for score in scores))
        assert torch.equal(layer.lora_A, scores[0])
        assert torch.equal(layer.lora_B, scores[1])
        layer.adapters.default.reset_parameters()
        assert layer.lora_A.isfinite().all()
    before = state(model)
    other = PartialConfig(trainable_ratio=0.25)
    on_one_rank(lambda: save_adapter(adapted(partial=other), scratch / "quarter"))
    with pytest.raises(ValueError, match=r"up: 2 columns where the sharded parameter holds 4, 2 rows where"):
        load_adapter(model, scratch / "quarter")
    assert_equal(state(model), before)


def check_same_path_at_once(scratch: Path) -> None:
    """Under DistributedDataParallel every process holds the whole adapter; all may save it to one folder."""
    model = DistributedDataParallel(adapted())
    for _ in range(20):
        save_adapter(model, scratch / "out")
    dist.barrier()
    on_one_rank(lambda: save_adapter(model, scratch / "one"))
    assert files(scratch / "out") == files(scratch / "one")


def check_failed_write(scratch: Path) -> None:
    """What only rank 0 sees, both raise."""
    on_one_rank(lambda: (scratch / "file").write_text(""))
    model = sharded(adapted())
    with pytest.raises(NotADirectoryError, match=r"save_adapter: cannot write to .*below: Not a directory"):
        save_adapter(model, scratch / "file" / "below")
    save_adapter(model, scratch / "out")


def check_failed_read(scratch: Path) -> None:
    """A file that one process lacks, is damaged or differs: both raise, nothing has changed, both go on."""
    rank, model = dist.get_rank(), sharded(adapted())
    before = state(model)
    for seed in range(2):
        on_one_rank(lambda seed=seed: save_adapter(adapted(seed=2 + seed), scratch / str(seed)))
    own = scratch / f"of {rank}"
    save_adapter(adapted(), own)
    if rank == 1:
        (own / WEIGHTS_NAME).write_bytes(b"\x08")
    cases = [
        (scratch / ("0" if rank == 0 else "nowhere"), FileNotFoundError, r"load_adapter: cannot read .*nowhere.*"),
        (own, ValueError, "load_adapter: .*of 1.* is damaged or truncated"),
        (scratch / str(rank), ValueError, "load_adapter: processes must hold the same adapters, got the file's .*_A"),
    ]  # fmt: skip
    for path, kind, message in cases:
        with pytest.raises(kind, match=message):
            load_adapter(model, path)
    assert_equal(state(model), before)
    load_adapter(model, scratch / "0")


MISMATCHES = {
    "rank": ({}, {"r": 4}, r"q_proj\.adapters\.default: Adapter\(r=3, .* on rank 0, Adapter\(r=4, .* on rank 1"),
    "scale": ({}, {"lora_alpha": 7}, r"Adapter\(r=3, lora_alpha=6,.* on rank 0, .* lora_alpha=7"),
    "dtype": ({}, {"dtype": torch.bfloat16}, r"dtype=torch\.float32\) on rank 0, .*dtype=torch\.bfloat16"),
    "layers": ({}, {"target_modules": ["q_proj", "up"], "share_input": False}, "k_proj.* on rank 0, nothing on rank 1"),
    "bias": ({}, {"bias": "all"}, r"bias: nothing on rank 0, \(8,\) torch\.float32"),
    "config": (
        {}, {"target_modules": r".*(q|k|v|o)_proj|.*up"}, r"config 'default', target_modules: \('q_proj', .* on rank 1$"
    ),
    "selection": (
        {"partial": PartialConfig()}, {"partial": PartialConfig(seed=3)}, r"default\.active_A: \(1, 8\) torch\.bool"
    ),
    "frozen A": ({"freeze_A": True}, {"freeze_A": True, "seed": 2}, r"lora_A: .* frozen with values \w{16} on"),
}  # fmt: skip


def check_mismatch(scratch: Path, arguments_by_rank: list[dict], message: str) -> None:
    """One error, the same on both, before fully_shard, from saving and from loading; nothing has changed."""
    model = adapted(**arguments_by_rank[dist.get_rank()])
    on_one_rank(lambda: save_adapter(model, scratch / "one"))
    with pytest.raises(ValueError, match=f"^check_processes: processes must hold the same adapters, got .*{message}"):
        check_processes(model)
    model = sharded(model)
    with pytest.raises(ValueError, match=f"^save_adapter: processes must hold the same adapters, got .*{message}"):
        save_adapter(model, scratch / "out")
    assert not (scratch / "out").exists()
    if "values" in message or "active" in message:
        return
    before = {name: value.to_local().clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=f"^load_adapter: processes must hold the same adapters, got .*{message}"):
        load_adapter(model, scratch / "one")
    assert_equal({name: value.to_local() for name, value in model.named_parameters()}, before)


def check_agreement(scratch: Path) -> None:
    """No complaint about what is alike, whatever it is wrapped in; a process without adapters is found out."""
    for arguments in (VARIANTS["LoRA"], VARIANTS["LoRA-SP resampled"]):
        check_processes(adapted(**arguments))
        check_processes(sharded(adapted(**arguments)))
    # What DistributedDataParallel has put right is right.
    check_processes(DistributedDataParallel(adapted(seed=dist.get_rank(), freeze_A=True)))
    with pytest.raises(ValueError, match=r"nothing on rank 1; and \d+ more"):
        check_processes(adapted() if dist.get_rank() == 0 else base())


def check_refused(scratch: Path) -> None:
    """What cannot work says so before anything has changed."""
    on_one_rank(lambda: save_adapter(adapted(), scratch / "out"))
    model, config = sharded(base()), LoRAConfig(target_modules=["q_proj"])
    for put in (lambda: inject(model, config), lambda: load_adapter(model, scratch / "out")):
        with pytest.raises(ValueError, match=r"must not be sharded yet; put adapters in first, then call fully_shard"):
            put()
    assert not any(isinstance(module, lorasp.LoRALinear) for module in model.modules())
    flat = FullyShardedDataParallel(adapted(), use_orig_params=True, device_id=torch.device("cpu"))
    for use in (save_adapter, load_adapter):
        with pytest.raises(ValueError, match=f"{use.__name__}: model must be sharded by fully_shard"):
            use(flat, scratch / "out")
    if lorasp.available_backends()["cpp"] is None:
        packed = sharded(adapted(prepack=True))
        with pytest.raises(ValueError, match="LoRALinear: prepack must be False under fully_shard"):
            loss(packed, half(0))


CHECKS = {
    **{f"files of {variant}": functools.partial(check_round_trip, **settings) for variant, settings in SAVED.items()},
    "a frozen A made on meta": functools.partial(check_made_on_meta, freeze_A=True),
    "a selection made on meta": functools.partial(check_made_on_meta, partial=PartialConfig()),
    "files of replicas of shards": check_replicas_of_shards,
    "values in shards": check_values,
    "one folder at once": check_same_path_at_once,
    "a failed write": check_failed_write,
    "a failed read": check_failed_read,
    **{
        f"another {what} in another process": functools.partial(
            check_mismatch, arguments_by_rank=by_rank, message=message
        )
        for what, (*by_rank, message) in MISMATCHES.items()
    },
    "processes that agree": check_agreement,
    "refused": check_refused,
}
