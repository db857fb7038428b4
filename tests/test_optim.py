"""PartialAdamW: AdamW where a selection is, over resamplings, saved and loaded."""

import copy
import io
import re

import pytest
import torch
from partial_oracle import BETAS, EPS, WEIGHT_DECAY, Oracle, batches, loss
from torch import nn

import lorasp
from lorasp import LoRAConfig, LoRALinear, PartialAdamW, PartialConfig, inject, testing

K, N, R = 40, 24, 4


def layer_that_resamples(granularity="feature", resample=3, **arguments) -> LoRALinear:
    torch.manual_seed(0)
    partial = PartialConfig(0.5, granularity, resample)
    return LoRALinear(K, N, r=R, lora_alpha=2 * R, init_lora_weights=False, partial=partial, **arguments)


def optimizer_of(layer: nn.Module, **arguments) -> PartialAdamW:
    return PartialAdamW(layer, **({"lr": 1e-2, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY} | arguments))


def train(layer: LoRALinear, optimizer: PartialAdamW, steps: int, seed: int = 0) -> None:
    for x, target in batches(steps + seed, 16, layer, layer.weight.dtype)[seed:]:
        loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(layer: LoRALinear) -> list[torch.Tensor]:
    return [layer.lora_A.detach().clone(), layer.lora_B.detach().clone()]


def masks(layer: LoRALinear) -> list[torch.Tensor]:
    return [layer.trainable_mask_A(), layer.trainable_mask_B()]


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("freeze_A", [False, True])
@pytest.mark.parametrize("granularity", ["feature", "element", "rank"])
def test_training_over_resamplings_is_dense_lora_with_everything_masked(granularity, freeze_A, dtype):
    layer = layer_that_resamples(granularity, freeze_A=freeze_A, dtype=dtype)
    check_against_oracle(layer, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrices_take_turns(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype).requires_grad_(False)
    config = LoRAConfig(r=R, init_lora_weights=False, partial=PartialConfig(0.5, "matrix", 3, seed=1))
    layer = LoRALinear.beside(linear, config, name="one", peers=("one", "other"))
    turns = check_against_oracle(layer, dtype)
    assert len(turns) == 2


def check_against_oracle(layer: LoRALinear, dtype: torch.dtype) -> set[bool]:
    """20 steps, another selection every 3; returns which states A's first entry was seen in."""
    optimizer, oracle, oracle64 = optimizer_of(layer), Oracle(layer, dtype), Oracle(layer, torch.float64)
    seen, turns = [], set()
    for x, target in batches(20, 32, layer, dtype):
        active, before = masks(layer), values(layer)
        loss(layer(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        oracle64.step(x, target, *active, 1e-2)
        # Rows in another order: what fp64's own rounding does to the plain computation.
        oracle.step(x.flip(0), target.flip(0), *active, 1e-2)
        for old, new, mask in zip(before, values(layer), active, strict=True):
            assert torch.equal(old[~mask], new[~mask])
        seen.append(active)
        turns.add(active[0].any().item())
    for name, index, one, one64 in (("lora_A", 0, oracle.A, oracle64.A), ("lora_B", 1, oracle.B, oracle64.B)):
        testing.assert_close(values(layer)[index], one.value, one64.value, dtype, name)
    changes = [i for i in range(1, 20) if not same(seen[i], seen[i - 1])]
    assert set(changes) <= {3, 6, 9, 12, 15, 18}
    assert len(changes) >= 2
    return turns


@pytest.mark.parametrize("partial", [None, PartialConfig(), PartialConfig(0.5, "element")])
def test_without_resampling_it_is_adamw(partial):
    torch.manual_seed(0)
    layer = LoRALinear(K, N, r=R, init_lora_weights=False, partial=partial)
    twin, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    own = optimizer_of(layer)
    others = [
        torch.optim.AdamW(
            [p for p in one.parameters() if p.requires_grad], lr=1e-2, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )
        for one in (twin, exact)
    ]
    for x, target in batches(20, 32, layer, torch.float32):
        for one, optimizer in zip((layer, twin, exact), (own, *others), strict=True):
            loss(one(x.to(one.weight.dtype)), target.to(one.weight.dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for tensors in zip(values(layer), values(twin), values(exact), strict=True):
        testing.assert_close(*tensors, torch.float32)


@pytest.mark.parametrize("granularity", ["feature", "element", "rank", "matrix"])
def test_training_goes_on_after_save_and_load(granularity):
    layer = layer_that_resamples(granularity)
    optimizer = optimizer_of(layer)
    train(layer, optimizer, 7)
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file := io.BytesIO())
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    fresh = layer_that_resamples(granularity)
    other = PartialAdamW(fresh, lr=1.0)
    fresh.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for one, its in ((layer, optimizer), (fresh, other)):
        train(one, its, 8, seed=7)
    assert same(values(layer), values(fresh))
    assert same(masks(layer), masks(fresh))
    assert {state["step"].dtype for state in other.state.values()} == {torch.int32}


def test_a_loaded_state_is_a_copy():
    layer = layer_that_resamples()
    optimizer = optimizer_of(layer)
    train(layer, optimizer, 1)
    state = optimizer.state_dict()
    steps = [entry["step"].clone() for entry in state["state"].values()]
    other = optimizer_of(twin := copy.deepcopy(layer))
    other.load_state_dict(state)
    train(layer, optimizer, 1)
    assert same(steps, [other.state[parameter]["step"] for parameter in twin.parameters() if parameter.requires_grad])


@pytest.mark.parametrize("partial", [PartialConfig(), PartialConfig(0.5, "element")])
def test_it_goes_on_from_the_state_of_torchs_adamw(partial):
    torch.manual_seed(0)
    layer = LoRALinear(K, N, r=R, init_lora_weights=False, partial=partial)
    before = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    train(layer, before, 3)
    twin, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    for one, kind in ((layer, PartialAdamW), (twin, torch.optim.AdamW), (exact, torch.optim.AdamW)):
        after = kind([p for p in one.parameters() if p.requires_grad])
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        train(one, after, 3)
    for tensors in zip(values(layer), values(twin), values(exact), strict=True):
        testing.assert_close(*tensors, torch.float32)


def test_the_state_of_another_granularity_is_refused():
    layer, other = layer_that_resamples("feature"), layer_that_resamples("element")
    optimizer = optimizer_of(layer)
    train(layer, optimizer, 1)
    message = re.escape(f"step in state_dict must be {(R, K)} like the selection, got {(1, K)}")
    with pytest.raises(ValueError, match=message):
        optimizer_of(other).load_state_dict(optimizer.state_dict())


def test_param_groups_schedulers_and_clipping():
    layer, plain = layer_that_resamples(), LoRALinear(K, N, r=R)
    adapter = layer.adapters.default
    groups = [
        {"params": [adapter.lora_A], "lr": 0.0, "weight_decay": 0.5},
        {"params": [adapter.lora_B, *(p for p in plain.parameters() if p.requires_grad)]},
    ]
    optimizer = PartialAdamW(groups, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    before = values(layer), values(plain)
    history = []
    for x, target in batches(4, 16, layer, torch.float32):
        loss(layer(x) + plain(x), target).backward()
        norm = nn.utils.clip_grad_norm_([*layer.parameters(), *plain.parameters()], 1e-3)
        assert norm > 1e-3
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        history.append([*values(layer), *values(plain)])
    assert torch.equal(history[-1][0], before[0][0])  # lr 0
    assert not torch.equal(history[0][1], before[0][1])
    assert not torch.equal(history[1][3], history[0][3])
    assert same(history[1], history[3])  # the scheduler's 0


def test_a_parameter_without_a_gradient_is_left_alone():
    layer = layer_that_resamples("element")
    optimizer = optimizer_of(layer)
    before = values(layer)
    ((x, target),) = batches(1, 8, layer, torch.float32)
    loss(layer(x), target).backward()
    layer.adapters.default.lora_A.grad = None
    optimizer.step()
    assert torch.equal(layer.lora_A, before[0])
    assert not torch.equal(layer.lora_B, before[1])
    assert layer.adapters.default.lora_A not in optimizer.state


def test_a_resting_matrix_keeps_its_bits_whatever_its_gradient_holds():
    layer = layer_that_resamples("matrix", "epoch")
    assert not layer.trainable_mask_A().any()
    optimizer, before = optimizer_of(layer), values(layer)
    for parameter in (layer.adapters.default.lora_A, layer.adapters.default.lora_B):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(layer.lora_A, before[0])
    assert not torch.equal(layer.lora_B, before[1])


def test_a_closure_is_called_with_gradients_on():
    layer = layer_that_resamples()
    optimizer = optimizer_of(layer)
    ((x, target),) = batches(1, 8, layer, torch.float32)
    before, expected = values(layer), loss(layer(x), target).detach()

    def closure():
        optimizer.zero_grad()
        value = loss(layer(x), target)
        value.backward()
        return value

    assert torch.equal(optimizer.step(closure), expected)
    assert not same(before, values(layer))


def test_a_model_resamples_as_a_whole():
    model = nn.Sequential(*(nn.Linear(K, K) for _ in range(3)))
    config = LoRAConfig(r=R, target_modules="all-linear", partial=PartialConfig(resample="epoch"))
    inject(model, config)
    optimizer = optimizer_of(model)
    before = [masks(layer) for layer in model]
    model(torch.randn(2, K)).sum().backward()
    optimizer.step()
    assert all(same(old, masks(layer)) for old, layer in zip(before, model, strict=True))
    lorasp.resample(model)
    assert not any(same(old, masks(layer)) for old, layer in zip(before, model, strict=True))


def test_the_moments_of_a_resting_entry_wait_for_it():
    layer = layer_that_resamples("element", "epoch")
    optimizer, adapter = optimizer_of(layer), layer.adapters.default
    train(layer, optimizer, 3)
    state = {name: value.clone() for name, value in optimizer.state[adapter.lora_A].items()}
    first = layer.trainable_mask_A()
    lorasp.resample(layer)
    resting = first & ~layer.trainable_mask_A()
    train(layer, optimizer, 2, seed=3)
    for name, value in optimizer.state[adapter.lora_A].items():
        assert torch.equal(value[resting], state[name][resting])
    assert (optimizer.state[adapter.lora_A]["step"][resting] == 3).all()
    assert state["exp_avg"][resting].any()


@pytest.mark.parametrize(
    "change", [lambda layer: layer.double(), copy.deepcopy, lambda layer: layer.to_empty(device="cpu")]
)
def test_the_selection_is_found_again_after(change):
    layer = layer_that_resamples("element")
    layer = change(layer) or layer
    layer.reset_parameters()
    optimizer, before, active = optimizer_of(layer), values(layer), masks(layer)
    layer(torch.randn(4, K, dtype=layer.weight.dtype)).square().sum().backward()
    for parameter in (layer.adapters.default.lora_A, layer.adapters.default.lora_B):
        parameter.grad.add_(1)
    optimizer.step()
    for old, new, mask in zip(before, values(layer), active, strict=True):
        assert torch.equal(old[~mask], new[~mask])
        assert not (old == new)[mask].any()


def test_a_prepacked_weight_that_trains_is_packed_again(monkeypatch):
    packs = []

    def pack(weight):
        packs.append(weight.clone())
        return lorasp.PackedWeight(weight.new_empty(0), weight.new_empty(0))

    monkeypatch.setattr("lorasp.layers.lora_linear.pack_weight", pack)
    layer = LoRALinear(K, N, r=R, prepack=True)
    layer.requires_grad_(True)
    optimizer = optimizer_of(layer)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    layer._operands()
    optimizer.step()
    layer._operands()
    assert len(packs) == 2
    assert torch.equal(packs[1], layer.weight)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number >= 0, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a finite number >= 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers in \[0, 1\), got \(0.9,\)"),
    ],
)
def test_refused(arguments, kind, message):
    with pytest.raises(kind, match=f"PartialAdamW: {message}"):
        PartialAdamW(LoRALinear(K, N), **arguments)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="PartialAdamW: gradients must be dense, got a sparse one"):
        PartialAdamW(embedding).step()
