"""SharedInput: layers called one by one with one input run as one group, and nobody can tell but by time and memory."""

import copy
import gc
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorasp import LoRALinear, PartialConfig, resample, testing, use_backend
from lorasp.layers.shared_input import SharedInput
from lorasp.memory import saved_bytes
from lorasp.ops import lora_linear, lora_linear_group

K, RANKS, WIDTHS = 12, (2, 3, 4), (8, 5, 6)
Q, K_, V = range(3)


class Block(nn.Module):
    """q, k, v on one input, apart or as a group."""

    def __init__(self, grouped: bool = True, widths=WIDTHS, **arguments):
        super().__init__()
        torch.manual_seed(0)
        arguments = {"init_lora_weights": False} | arguments
        layers = [LoRALinear(K, n, r=r, **arguments) for n, r in zip(widths, RANKS, strict=True)]
        self.layers = nn.ModuleList(layers)
        if grouped:
            SharedInput(layers)

    def __getitem__(self, index: int) -> LoRALinear:
        return self.layers[index]

    def forward(self, x: Tensor, order=(Q, K_, V)) -> dict[int, Tensor]:
        return {index: self.layers[index](x) for index in order}


def make_x(requires_grad: bool = True, seed: int = 1) -> Tensor:
    x = torch.randn((2, 3, K), generator=torch.Generator().manual_seed(seed))
    return (x.requires_grad_() if requires_grad else x).view_as(x)


@pytest.fixture
def calls(monkeypatch) -> Iterator[list[list[int]]]:
    """The members of every forward that was computed: [[0, 1, 2]] is one group of three, [[-1]] one plain layer."""
    found = []

    def record(table: dict, members: Callable) -> None:
        for backend, op in list(table.items()):
            monkeypatch.setitem(table, backend, lambda *a, op=op: (found.append(members(a)), op(*a))[1])

    record(lora_linear_group.forward_ops, lambda arguments: list(arguments[14]))
    record(lora_linear.forward_ops, lambda arguments: [-1])
    return found


def run(function: Callable, block: Block, x: Tensor) -> list[Tensor | None]:
    """Outputs of function(block, x), then the gradients of a loss over them: x's, then the parameters'."""
    ys = [y for y in function(block, x) if isinstance(y, Tensor)]
    weights = torch.linspace(0.5, 2, sum(y.numel() for y in ys), dtype=x.dtype).split([y.numel() for y in ys])
    loss = sum((y.flatten() * w).sum() for y, w in zip(ys, weights, strict=True))
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    return ys + list(torch.autograd.grad(loss, wanted, allow_unused=True))


def check_same(function: Callable, **arguments) -> None:
    """function(block, x) -> outputs: a group gives what separate layers give, to rounding, gradients included."""
    results = []
    for grouped, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64)):
        block = Block(grouped, **arguments).to(dtype)
        results.append(run(function, block, make_x().to(dtype).detach().requires_grad_()))
    for new, old, exact in zip(*results, strict=True):
        assert (new is None) == (old is None)
        if new is not None:
            testing.assert_close(new, old, exact, torch.float32)


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
    def test_a_context_entered_in_between(self, context):
        arguments = {torch.autocast: ("cpu", torch.bfloat16), use_backend: ("reference",)}.get(context, ())
        block, apart, x = Block(), Block(grouped=False), make_x()
        block[Q](x)
        with context(*arguments):
            inside, expected = block[K_](x), apart[K_](x)
        assert inside.requires_grad == expected.requires_grad
        assert inside.is_inference() == expected.is_inference()
        assert inside.dtype == expected.dtype
        after = block[V](x)
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


class TestLinks:
    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
    def test_copies_are_linked_among_themselves(self, calls, clone):
        block = Block()
        block(make_x())
        other = clone(block)
        assert other[Q].shared_input is other[V].shared_input is not block[Q].shared_input
        assert other[Q].shared_input.members == tuple(other.layers)
        other(make_x()), block(make_x())
        assert calls == [[0, 1, 2]] * 3

    @pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
    def test_a_layer_copied_alone_is_alone(self, calls, clone):
        block = Block()
        alone, x = clone(block[Q]), make_x()
        alone(x)
        assert calls == [[-1]]
        block(x)
        assert calls == [[-1], [0, 1, 2]]

    def test_no_trace_in_the_state_dict(self):
        assert list(Block().state_dict()) == list(Block(grouped=False).state_dict())
        assert len(list(Block().modules())) == len(list(Block(grouped=False).modules()))

    def test_a_replaced_member(self, calls):
        block = Block()
        block.layers[K_] = nn.Linear(K, 5)
        block(make_x())
        assert calls == [[0, 2]]

    def test_a_member_taken_out(self, calls):
        block = Block()
        block[K_].shared_input = None
        block(make_x())
        assert calls == [[0, 2], [-1]]
        assert block[Q].shared_input.members == (block[Q], block[V])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_a_converted_model(self, calls, dtype):
        block = Block().to(dtype)
        assert all(y.dtype == dtype for y in block(make_x().to(dtype)).values())
        assert calls == [[0, 1, 2]]

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            (lambda a: [a], "two or more different layers, got 1"),
            (lambda a: [a, a], "two or more different layers"),
            (lambda a: [a, LoRALinear(K + 1, 3)], r"the same in_features, got \[12, 13\]"),
            (lambda a: [a, Block()[Q]], "belong to another"),
        ],
    )
    def test_layers_that_cannot(self, layers, message):
        layer = LoRALinear(K, 3)
        with pytest.raises(ValueError, match=message):
            SharedInput(layers(layer))
        assert layer.shared_input is None


def test_threads():
    """Every thread has its own rounds, on one x as well."""
    block, x = Block(), make_x()
    expected = [y.detach() for y in Block(grouped=False)(x).values()]
    wrong = []

    def work(order):
        for _ in range(20):
            for index, y in block(x, order).items():
                if not torch.allclose(y, expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(order,)) for order in itertools.permutations(range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


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


class TestPartial:
    def grouped(self, **arguments) -> Block:
        block = Block(partial=PartialConfig(**arguments))
        for layer in block.layers:
            layer.share_selection("qkv")
        return block

    def test_one_copy_of_the_selected_features(self, calls):
        block, x = self.grouped(), make_x()
        rows = x.numel() // K
        assert saved_bytes(lambda: block(x), exclude=block) == rows * (K // 2 + sum(RANKS)) * 4
        assert calls == [[0, 1, 2]]

    def test_an_input_kept_anyway_is_not_copied(self):
        block, x = self.grouped(), make_x()
        block[K_].keep_input = True
        rows = x.numel() // K
        assert saved_bytes(lambda: block(x), exclude=[block, x]) == rows * sum(RANKS) * 4

    @pytest.mark.parametrize("granularity", ["feature", "element", "rank", "matrix"])
    def test_granularities(self, calls, granularity):
        block = self.grouped(granularity=granularity)
        apart = copy.deepcopy(block)
        for layer in apart.layers:
            layer.shared_input = None
        exact = copy.deepcopy(apart).double()
        results = [
            run(lambda b, x: b(x).values(), b, make_x().to(dtype).detach().requires_grad_())
            for b, dtype in ((block, torch.float32), (apart, torch.float32), (exact, torch.float64))
        ]
        for new, old, other in zip(*results, strict=True):
            testing.assert_close(new, old, other, torch.float32)
        assert calls[0] == [0, 1, 2]

    def test_other_features_run_apart(self, calls):
        block = Block(partial=PartialConfig())
        block[K_].share_selection("another")
        block[V].share_selection("third")
        block(make_x())
        assert calls == [[0], [0], [0]]

    def test_another_selection_while_a_graph_holds_the_last_one(self, calls):
        block = self.grouped()
        first = block(make_x())
        for layer in block.layers:
            layer.select(torch.arange(K).expand(layer.lora_A.shape), torch.ones_like(layer.lora_B))
        block(make_x(seed=2))
        assert first
        assert calls == [[0, 1, 2], [0, 1, 2]]

    @pytest.mark.parametrize("every", ["never", "epoch"])
    def test_what_a_state_dict_selects_decides(self, calls, every):
        block, other = (self.grouped(resample=every, seed=seed) for seed in (0, 1))
        block[K_].load_state_dict(other[K_].state_dict())
        block(make_x())
        block.load_state_dict(other.state_dict())
        block(make_x(seed=2))
        assert calls == [[0, 2], [0], [0, 1, 2]]  # alone, without dropout, a layer is its own group's first

    def test_layers_resampled_together_stay_together(self, calls):
        block = self.grouped(resample="epoch")
        resample(block)
        block(make_x())
        block[V].adapters["default"].resample()
        block(make_x(seed=2))
        assert calls == [[0, 1, 2], [0, 1], [0]]

    def test_features_stay_shared_when_moved(self, calls):
        block = self.grouped().to(torch.float64)
        block(make_x().double())
        assert calls == [[0, 1, 2]]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_no_more_is_saved_than_by_separate_layers(freeze_A, dropout):
    block, x = Block(freeze_A=freeze_A, lora_dropout=dropout), make_x()
    rows = x.numel() // K
    expected = rows * (K * (not freeze_A) + sum(RANKS)) * 4 + 8 * (dropout > 0)
    assert saved_bytes(lambda: block(x), exclude=block) == expected
