"""SharedInput: layers called one by one with one input run as one group, and nobody can tell but by time and memory."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from shared_blocks import K_, RANKS, WIDTHS, Block, K, Q, V, check_same, computed_members, make_x
from torch import nn

from lorasp import PartialConfig, testing, use_backend


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    return computed_members(monkeypatch)


ORDERS = [order for size in (1, 2, 3) for order in itertools.permutations(range(3), size)]


class TestCalls:
    @pytest.mark.parametrize("order", ORDERS, ids=str)
    def test_any_order_and_any_subset(self, calls, order):
        check_same(lambda block, x: block(x, order).values())
        assert calls[0] == [0, 1, 2]
        assert calls[1:] == [[-1]] * 2 * len(order)

    @pytest.mark.parametrize("freeze_A", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    def test_kinds_of_members(self, bias, freeze_A):
        check_same(lambda block, x: block(x).values(), bias=bias, freeze_A=freeze_A)

    def test_a_new_input_is_a_new_round(self, calls):
        block = Block()
        for seed in (1, 2):
            block(make_x(seed=seed))
        assert calls == [[0, 1, 2]] * 2

    def test_a_member_used_twice(self, calls):
        check_same(lambda block, x: [block[i](x) for i in (Q, Q, K_, V, V)])
        assert calls[:3] == [[0, 1, 2]] * 3

    def test_another_input_in_between(self):
        check_same(lambda block, x: (block[Q](x), block[K_](x * 2), block[V](x), block[K_](x)))

    def test_input_written_to_in_between(self, calls):
        def function(block, x):
            x = x * 1
            with torch.no_grad():
                first = block[Q](x)
                x.mul_(2)
                second = block[K_](x)
            x.mul_(2)
            return first, second, block[V](x)

        check_same(function)
        assert calls[:2] == [[0, 1, 2]] * 2

    def test_outputs_can_be_written_to(self):
        check_same(lambda block, x: [y.mul_(3).add_(1) for y in block(x).values()])

    @pytest.mark.parametrize("shape", [(K,), (0, K), (7, K), (2, 0, K)], ids=str)
    def test_shapes(self, shape):
        x = torch.randn(shape, requires_grad=True)
        for index, y in Block()(x).items():
            assert y.shape == (*shape[:-1], WIDTHS[index])

    def test_members_must_be_alike_to_run_together(self, calls):
        block = Block(lora_dropout=0.2)
        block[K_].eval()
        block[V].to(torch.float64)
        x = make_x()
        block[Q](x), block[K_](x), block[V](x.double())
        assert calls == [[-1], [-1], [2]]

    def test_hooks_on_members(self):
        def function(block, x):
            seen = []
            block[Q].register_forward_hook(lambda module, inputs, y: y * 2)
            block[K_].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
            block[V].register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0]))
            return block(x).values()

        check_same(function)


class TestSurroundings:
    """What a call computes in changes between two calls: the second one computes anew."""

    @pytest.mark.parametrize(
        "context", [torch.no_grad, torch.inference_mode, torch.autocast, use_backend], ids=lambda c: c.__name__
    )
    def test_a_context_entered_in_between(self, calls, context):
        arguments = {torch.autocast: ("cpu", torch.bfloat16), use_backend: ("reference",)}.get(context, ())
        block, apart, exact, x = Block(), Block(grouped=False), Block(grouped=False).double(), make_x()
        block[Q](x)
        calls.clear()
        with context(*arguments):
            inside = block[K_](x)
            assert calls == [[-1] if context is torch.inference_mode else [Q, K_, V]]
            expected = apart[K_](x)
        testing.assert_close(inside, expected, exact[K_](x.double()), expected.dtype)
        assert inside.requires_grad == expected.requires_grad
        assert inside.is_inference() == expected.is_inference()
        assert inside.dtype == expected.dtype
        after = block[V](x)
        testing.assert_close(after, apart[V](x), exact[V](x.double()), torch.float32)
        assert after.requires_grad
        assert not after.is_inference()
        assert after.dtype == torch.float32

    def test_no_grad_and_inference_mode(self, calls):
        block, apart = Block(), Block(grouped=False)
        for context, x in ((torch.no_grad, make_x(False)), (torch.inference_mode, make_x(False))):
            with context():
                for y, other in zip(block(x).values(), apart(x).values(), strict=True):
                    testing.assert_close(y, other, other.double(), torch.float32)
        with torch.inference_mode():
            x = make_x(False)
            first = block[Q](x)
            x.mul_(2)
            testing.assert_close(block[K_](x), apart[K_](x), apart[K_](x).double(), torch.float32)
            assert first.is_inference()

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.lora_A.requires_grad_(False),
            lambda layer: layer.weight.requires_grad_(True),
            lambda layer: setattr(layer, "bias", nn.Parameter(layer.weight[:, 0].clone())),
            lambda layer: setattr(layer.adapters["default"], "scale", 3.0),
            lambda layer: layer.eval(),
        ],
        ids=["frozen", "unfrozen", "replaced", "scale", "eval"],
    )
    def test_a_member_changed_in_between(self, change):
        def function(block, x):
            first = block[Q](x)
            torch.manual_seed(3)
            change(block[K_])
            return first, block[K_](x)

        check_same(function)

    @pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "lora_B"])
    def test_a_tensor_written_to_in_between(self, name):
        def function(block, x):
            with torch.no_grad():
                first = block[Q](x)
                getattr(block[K_], name).mul_(2)
            return first, block[K_](x), block[V](x)

        check_same(function)
        with torch.no_grad():
            block, x = Block(), make_x(False)
            block[Q](x)
            getattr(block[K_], name).mul_(2)
            after = block[K_](x)
            assert torch.equal(after, block[K_](x.clone()))

    @pytest.mark.parametrize("which", range(3))
    def test_what_trains(self, which):
        def function(block, x):
            block[which].requires_grad_(False)
            ys = block(x.detach())
            assert [y.requires_grad for y in ys.values()] == [index != which for index in range(3)]
            return (*ys.values(), x)

        check_same(function)


class TestAdapting:
    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("order", [(Q,), (Q, V), (V,)], ids=str)
    def test_who_is_never_called_is_not_computed_for_long(self, calls, order, grad):
        block = Block()
        for seed in range(5):
            with torch.set_grad_enabled(grad):
                block(make_x(seed=seed), order)
        assert calls[0] == [0, 1, 2]
        assert calls[-1] == ([-1] if len(order) == 1 else sorted(order))

    def test_members_that_read_another_input(self, calls):
        """Named by mistake: queries of cross attention read something else."""
        block = Block()
        for seed in range(5):
            x, encoded = make_x(seed=seed), make_x(seed=seed + 10)
            block[Q](x), block[K_](encoded), block[V](encoded)
        assert calls[-2:] == [[-1], [1, 2]]

    def test_a_rare_miss_changes_nothing(self, calls):
        block = Block()
        for seed in range(12):
            block(make_x(seed=seed), (Q,) if seed % 6 == 3 else (Q, K_, V))
        assert calls == [[0, 1, 2]] * 12

    def test_apart_or_together_is_one_function(self):
        """With dropout too: a member's mask follows from the round's seed and the member's number."""
        block, x = Block(lora_dropout=0.3), make_x(False)
        results = []
        for _ in range(2):
            torch.manual_seed(4)
            results.append([*block(x.clone()).values(), torch.rand(1)])
            for seed in range(4):
                block(make_x(seed=seed), (V,))
        for first, second in zip(*results, strict=True):
            testing.assert_close(second, first, first.double(), torch.float32)


class TestDropout:
    def test_one_seed_and_a_mask_per_member(self):
        block = Block(lora_dropout=0.5)
        torch.manual_seed(2)
        block(make_x())
        after = torch.rand(1)
        torch.manual_seed(2)
        torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)
        assert torch.equal(after, torch.rand(1))

    def test_masks_differ(self):
        block = Block(lora_dropout=0.5)
        with torch.no_grad():
            for layer in block.layers:
                layer.weight.zero_()
                layer.bias.zero_()
                layer.set_lora(torch.ones_like(layer.lora_A), torch.ones_like(layer.lora_B))
        # Every output is s times the rank times the sum of what its mask leaves of x.
        ys = block(make_x()).values()
        ys = [y[..., 0] / (layer.scale * rank) for y, layer, rank in zip(ys, block.layers, RANKS, strict=True)]
        assert not torch.equal(ys[0], ys[1])
        assert not torch.equal(ys[1], ys[2])


def test_threads():
    """Every thread has its own rounds, on one x as well."""
    block, x = Block(), make_x()
    expected = [y.detach() for y in Block(grouped=False)(x).values()]
    exact = [y.detach() for y in Block(grouped=False).double()(x.double()).values()]
    orders = list(itertools.permutations(range(3)))
    all_here = threading.Barrier(len(orders))

    def work(order) -> int:
        all_here.wait()
        compared = 0
        for _ in range(20):
            ys = block(x, order)
            for index, y in ys.items():
                testing.assert_close(y, expected[index], exact[index], torch.float32)
                compared += 1
            torch.autograd.grad(sum(y.sum() for y in ys.values()), x)  # raises if another thread's graph is in it
        return compared

    with ThreadPoolExecutor(len(orders)) as threads:
        assert list(threads.map(work, orders)) == [20 * 3] * len(orders)


@pytest.mark.parametrize("partial", [None, PartialConfig()], ids=["plain", "LoRA-SP"])
def test_compiled_layers_compute_apart(partial):
    block, x = Block(partial=partial), make_x()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            x = make_x(seed=seed)
            for y, other in zip(compiled(x).values(), block(x).values(), strict=True):
                testing.assert_close(y, other, other.double(), torch.float32)
