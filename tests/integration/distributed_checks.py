"""What two processes must get right together: gradients, checkpointing, accumulation, optimizers."""

import copy
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_model import Model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lorasp
from lorasp import LoRAConfig, LoRAFAAdamW, LoRALinear, PartialAdamW, PartialConfig, testing

# Three ranks over two processes: the shards are not even.
CONFIG = {
    "r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up"],
    "init_lora_weights": False, "share_input": [["q_proj", "k_proj", "v_proj"]],
}  # fmt: skip
VARIANTS = {
    "LoRA": {"bias": "all", "modules_to_save": ["score"]},
    "LoRA-FA": {"freeze_A": True},
    "LoRA-SP": {"partial": PartialConfig()},
    "LoRA-SP elements": {"partial": PartialConfig(granularity="element")},
    "LoRA-SP resampled": {"partial": PartialConfig(resample=2)},
    "LoRA-SP resampled matrices": {"partial": PartialConfig(granularity="matrix", resample=2)},
}


def base() -> nn.Module:
    model = Model()
    del model.model.layers[2]
    return model


def adapted(seed: int = 1, dtype: torch.dtype = torch.float32, **arguments) -> nn.Module:
    model = base().to(dtype)
    torch.manual_seed(seed)
    lorasp.inject(model, LoRAConfig(**(CONFIG | arguments)))
    return model


def sharded(model: nn.Module, **arguments) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def parallel(strategy: str, model: nn.Module) -> nn.Module:
    return sharded(model) if strategy == "fully_shard" else DistributedDataParallel(model)


def half(rank: int, step: int = 0) -> Tensor:
    """One process's part of a batch."""
    return torch.randint(16, (2, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return sum(y.float().square().mean() for y in model(tokens))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone() for name, grad in found.items()
    }


def alone(model: nn.Module, backward: Callable[[nn.Module, int], None], cast=lambda grad: grad) -> dict[str, Tensor]:
    """What one process gets: the mean of the gradients of both halves, one after the other."""
    found = []
    for rank in range(2):
        twin = copy.deepcopy(model)
        backward(twin, rank)
        found.append({name: cast(grad) for name, grad in gradients(twin).items()})
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])
    return {name: found[0][name] / 2 + found[1][name] / 2 for name in found[0]}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    assert found
    wrong = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not wrong, wrong


def one_backward(model: nn.Module, rank: int) -> None:
    torch.manual_seed(100 + rank)
    loss(model, half(rank)).backward()


def check_gradients(scratch: Path, strategy: str, **arguments) -> None:
    model = adapted(**arguments)
    expected, whole = alone(model, one_backward), []
    for twin in (copy.deepcopy(model), copy.deepcopy(model).double()):
        loss(twin, torch.cat([half(0), half(1)])).backward()
        whole.append(gradients(twin))
    one_backward(parallel(strategy, model), dist.get_rank())
    found = gradients(model)
    assert_equal(found, expected)
    for name, grad in found.items():
        testing.assert_close(grad, whole[0][name], whole[1][name], torch.float32, name)


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    def forward(self, tokens):
        x = self.embed(tokens).requires_grad_(True)
        for layer in self.layers:
            x = checkpoint(layer.__call__, x, use_reentrant=reentrant)
        return x

    model.model.forward = types.MethodType(forward, model.model)
    return model


def check_checkpointing(scratch: Path, strategy: str, reentrant: bool) -> None:
    model = adapted(lora_dropout=0.3)
    expected = alone(model, one_backward)
    one_backward(parallel(strategy, checkpointed(model, reentrant)), dist.get_rank())
    assert_equal(gradients(model), expected)


def check_accumulation(scratch: Path, strategy: str) -> None:
    model, rank = adapted(), dist.get_rank()

    def two_backwards(twin: nn.Module, rank: int) -> None:
        for step in range(2):
            loss(twin, half(rank, step)).backward()

    expected = alone(model, two_backwards)
    wrapped = parallel(strategy, model)
    if strategy == "fully_shard":
        model.set_requires_gradient_sync(False)
        loss(model, half(rank, 0)).backward()
        model.set_requires_gradient_sync(True)
    else:
        with wrapped.no_sync():
            loss(wrapped, half(rank, 0)).backward()
    loss(wrapped, half(rank, 1)).backward()
    assert_equal(gradients(model), expected)


def check_two_forwards(scratch: Path, strategy: str) -> None:
    """DistributedDataParallel sends buffers, a frozen A too, in every forward: backward must not trip over it."""
    model = adapted(freeze_A=True)

    def one_of_two(twin: nn.Module, rank: int) -> None:
        first = loss(twin, half(rank))
        (first + loss(twin, half(rank, 1))).backward()

    expected = alone(model, one_of_two)
    one_of_two(parallel(strategy, model), dist.get_rank())
    assert_equal(gradients(model), expected)


def check_every_layer_sharded(scratch: Path) -> None:
    """Members of a group whose parameters are gathered one after the other compute apart."""
    model = adapted()
    expected = [alone(twin, one_backward) for twin in (model, copy.deepcopy(model).double())]
    for module in model.modules():
        if isinstance(module, LoRALinear):
            fully_shard(module)
    one_backward(sharded(model), dist.get_rank())
    for name, grad in gradients(model).items():
        testing.assert_close(grad, expected[0][name], expected[1][name], torch.float32, name)


def check_masters(scratch: Path, **arguments) -> None:
    """float32 adapters over a bfloat16 base keep their dtypes in shards."""
    model = adapted(dtype=torch.bfloat16, adapter_dtype=torch.float32, **arguments)
    expected = alone(model, one_backward)
    one_backward(sharded(model), dist.get_rank())
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert_equal(gradients(model), expected)


def check_mixed_precision(scratch: Path, **arguments) -> None:
    """MixedPrecisionPolicy casts parameters and leaves buffers alone: a frozen A, or part of A, stays float32."""
    model = adapted(**arguments)

    def backward(twin: nn.Module, rank: int) -> None:
        for parameter in twin.parameters():
            parameter.data = parameter.data.bfloat16()
        one_backward(twin, rank)

    expected = alone(model, backward, Tensor.float)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    one_backward(sharded(model, mp_policy=policy), dist.get_rank())
    assert_equal(gradients(model), expected)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int) -> None:
    for step in steps:
        loss(model, half(rank, step)).backward()
        optimizer.step()
        optimizer.zero_grad()


def check_resampled(scratch: Path, **arguments) -> None:
    """Three steps in shards, on the same batches in both processes, are those of one process, to the bit."""
    # The C++ kernel rounds the last numbers of a tensor otherwise than those it takes eight at a time.
    with lorasp.use_backend("reference"):
        model = adapted(**arguments)
        single, trained = copy.deepcopy(model), sharded(model)
        for one in (single, trained):
            train(one, PartialAdamW(one, lr=1e-2, weight_decay=0.1), range(3), 0)
        assert_equal({name: p.full_tensor() for name, p in trained.named_parameters()}, dict(single.named_parameters()))


def check_corrected(scratch: Path) -> None:
    model = adapted(freeze_A=True)
    models = copy.deepcopy(model).double(), copy.deepcopy(model), sharded(model)
    for one in models:
        train(one, LoRAFAAdamW(one, lr=1e-2, weight_decay=0.1), range(3), 0)
    double, single, model = (dict(one.named_parameters()) for one in models)
    for name, parameter in model.items():
        testing.assert_close(parameter.full_tensor(), single[name], double[name], torch.float32, name)


def check_resume(scratch: Path, make: Callable[[nn.Module], torch.optim.Optimizer], **arguments) -> None:
    """Two steps, torch's distributed checkpoint into another model and optimizer, one step: as three steps."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)

    model = sharded(adapted(**arguments))
    optimizer = make(model)
    train(model, optimizer, range(2), dist.get_rank())
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))
    assert not any(key.endswith(("q_proj.weight", "embed.weight")) for key in state["model"])
    dcp.save(state, checkpoint_id=scratch)
    fresh = sharded(adapted(seed=2, **arguments))
    its = make(fresh)
    state = dict(zip(("model", "optimizer"), get_state_dict(fresh, its, options=options), strict=True))
    dcp.load(state, checkpoint_id=scratch)
    set_state_dict(fresh, its, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    for one, own in ((model, optimizer), (fresh, its)):
        train(one, own, range(2, 4), dist.get_rank())
    assert_equal(*({n: p.full_tensor() for n, p in one.named_parameters()} for one in (fresh, model)))


# A matrix that rests has no gradient, which DistributedDataParallel does not expect.
ONLY_SHARDED = ("LoRA-SP elements", "LoRA-SP resampled matrices")
CHECKS: dict[str, Callable[[Path], None]] = {}


def register(name: str, check: Callable, *arguments, **keywords) -> None:
    CHECKS[name] = lambda scratch: check(scratch, *arguments, **keywords)


for strategy in ("DistributedDataParallel", "fully_shard"):
    for variant, settings in VARIANTS.items():
        if variant not in ONLY_SHARDED or strategy == "fully_shard":
            register(f"gradients of {variant} under {strategy}", check_gradients, strategy, **settings)
    for reentrant in (False, True):
        kind = "reentrant" if reentrant else "other"
        register(f"{kind} checkpointing under {strategy}", check_checkpointing, strategy, reentrant)
    register(f"accumulation under {strategy}", check_accumulation, strategy)
    register(f"two forwards under {strategy}", check_two_forwards, strategy)
register("every layer sharded", check_every_layer_sharded)
for variant in ("LoRA-FA", "LoRA-SP"):
    register(f"masters of {variant}", check_masters, **VARIANTS[variant])
    register(f"mixed precision of {variant}", check_mixed_precision, **VARIANTS[variant])
for granularity in ("feature", "element", "matrix"):
    partial = PartialConfig(granularity=granularity, resample=2)
    register(f"steps of LoRA-SP by {granularity}", check_resampled, partial=partial)
register("steps of LoRAFAAdamW", check_corrected)
register("resumed LoRAFAAdamW", check_resume, LoRAFAAdamW, partial=PartialConfig(), freeze_A=True)
register("resumed PartialAdamW", check_resume, PartialAdamW, partial=PartialConfig(resample=2))
