"""SharedInput: what waits for whom, and for how long; checkpointing; what backward keeps."""

import gc
import weakref

import pytest
import torch
from shared_blocks import K_, RANKS, Block, K, Q, V, computed_members, make_x
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lorasp.memory import saved_bytes


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    return computed_members(monkeypatch)


class TestLifetime:
    """Nothing waits longer than its input or its graph, without the help of the garbage collector."""

    @pytest.fixture(autouse=True)
    def no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def test_outputs_not_taken_do_not_keep_the_graph(self):
        block, x = Block(), make_x()
        y = block[Q](x)
        node, input_alive = weakref.ref(y.grad_fn.next_functions[0][0]), weakref.ref(x)
        assert node() is not None
        del y, x
        assert node() is None
        assert input_alive() is None

    def test_outputs_not_taken_die_with_the_input(self):
        block, x = Block(), make_x(False)
        with torch.no_grad():
            block[Q](x)
        waiting = block[Q].shared_input._here.round.outputs()
        assert list(waiting) == [K_, V]
        del x
        assert not waiting

    def test_outputs_not_taken_die_with_the_round(self):
        block, x = Block(), make_x()
        y = block[Q](x)
        waiting = block[Q].shared_input._here.round.outputs()
        block[Q](make_x())
        assert not waiting
        assert y.grad_fn is not None

    def test_a_first_output_thrown_away(self, calls):
        block, x = Block(), make_x()
        block[Q](x)
        block[K_](x)
        assert calls == [[0, 1, 2], [1, 2]]

    def test_layers_die(self):
        block = Block()
        alive = [weakref.ref(layer) for layer in block.layers]
        block(make_x())
        del block
        assert [layer() for layer in alive] == [None] * 3


def gated(block: Block, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.tanh(y) for y in block(x).values())


def first_outside(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return torch.tanh(block[V](x)), *checkpoint(lambda x: gated_pair(block, x), x, **kind)


def last_outside(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return *checkpoint(lambda x: gated_pair(block, x), x, **kind), torch.tanh(block[V](x))


def gated_pair(block: Block, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(block[Q](x)), torch.tanh(block[K_](x))


def all_inside(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return checkpoint(gated, block, x, **kind)


def behind_a_norm(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return checkpoint(lambda x: gated(block, torch.nn.functional.layer_norm(x, (K,))), x, **kind)


def one_never_called(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return checkpoint(lambda x: gated_pair(block, x), x, **kind)


def nested(block: Block, x: Tensor, **kind) -> tuple[Tensor, ...]:
    return checkpoint(lambda x: behind_a_norm(block, x, **kind), x, **kind)


class TestCheckpointing:
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize(
        "function", [all_inside, behind_a_norm, first_outside, last_outside, one_never_called, nested]
    )
    def test_a_recompute_is_the_forward_again(self, function, reentrant, dropout):
        """The gradient must belong to the masks the outputs were computed with: compare with finite differences."""
        block = Block(lora_dropout=dropout).double()
        block.requires_grad_(True)
        x = make_x().double().detach().requires_grad_()
        direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))

        def loss(x: Tensor) -> Tensor:
            torch.manual_seed(7)
            return sum(y.sum() for y in function(block, x, use_reentrant=reentrant))

        step = 1e-6
        for _ in range(4):
            (dx,) = torch.autograd.grad(loss(x), x) if not reentrant else self.reentrant_gradient(loss(x), x)
            slope = ((loss(x + step * direction) - loss(x - step * direction)) / (2 * step)).detach()
            assert abs((dx * direction).sum() - slope) <= 10 * step * slope.abs()

    @staticmethod
    def reentrant_gradient(loss: Tensor, x: Tensor) -> tuple[Tensor]:
        x.grad = None
        loss.backward()
        return (x.grad,)

    def test_pipelined_micro_batches_keep_their_grouping(self, calls):
        """A member that is never called is set apart, but not between a forward and its recompute."""
        block = Block()
        batches = [make_x(seed=seed) for seed in range(5)]
        losses = [sum(y.sum() for y in one_never_called(block, x, use_reentrant=False)) for x in batches]
        assert calls == [[0, 1, 2]] * 5
        for loss in losses:
            loss.backward()
        assert calls == [[0, 1, 2]] * 10
        del loss, losses
        for _ in range(3):
            sum(y.sum() for y in one_never_called(block, batches[0], use_reentrant=False)).backward()
        assert calls[-2:] == [[0, 1]] * 2

    def test_two_recomputes(self):
        block, x = Block(), make_x().detach().requires_grad_()
        loss = sum(y.sum() for y in all_inside(block, x, use_reentrant=False))
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_no_more_is_saved_than_by_separate_layers(freeze_A, dropout):
    block, x = Block(freeze_A=freeze_A, lora_dropout=dropout), make_x()
    rows = x.numel() // K
    expected = rows * (K * (not freeze_A) + sum(RANKS)) * 4 + 8 * (dropout > 0)
    assert saved_bytes(lambda: block(x), exclude=block) == expected
