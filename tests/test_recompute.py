"""recompute_mlp on one MLP: the same numbers to the bit, the stated bytes, the stated work."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from recompute_mlps import KINDS, MODES, SEED, Block, H, I, M, R, TinyMLP, assert_same, kept, make_x, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from lorasp import recompute_mlp
from lorasp.memory import saved_bytes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
class TestKinds:
    def test_forward_and_gradients_are_the_same(self, kind, mode):
        model = TinyMLP(kind)
        x = make_x((KINDS[kind] or {}).get("dtype", torch.float32))
        expected = run(model, x)
        recompute_mlp(model, mode)
        assert_same(run(model, x), expected)

    def test_bytes(self, kind, mode):
        model = TinyMLP(kind)
        x = make_x((KINDS[kind] or {}).get("dtype", torch.float32))
        layers = [] if kind == "frozen" else [model.gate_proj, model.down_proj]
        # What of x, of h trains in A decides whether, and how much of, it is kept.
        share = {"frozen": 0, "LoRA-FA": 0, "LoRA-SP": 0.5}.get(kind, 1)
        low_rank, seed = len(layers) > 0, SEED * (kind == "dropout")
        plain = M * (3 * I + share * (H + I) + 3 * R * low_rank)
        expected = {"activation": M * (2 * I + share * H + 3 * R * low_rank), "full": M * (H + R * low_rank)}[mode]
        seeds = {"activation": 2, "full": 1}[mode] * seed
        assert kept(model, x) == plain * x.itemsize + 2 * seed
        recompute_mlp(model, mode)
        assert kept(model, x) == expected * x.itemsize + seeds

    def test_checkpointed_around_it(self, kind, mode):
        block = Block(kind)
        x = make_x((KINDS[kind] or {}).get("dtype", torch.float32))
        expected = run(block, x)
        recompute_mlp(block, mode)
        for reentrant in (False, True):
            assert_same(run(block, x, lambda x, r=reentrant: checkpoint(block, x, use_reentrant=r)), expected)
        outer = lambda: checkpoint(block, x, use_reentrant=False)  # noqa: E731
        assert saved_bytes(outer, exclude=[block, x]) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["frozen", "LoRA"])
@pytest.mark.parametrize(
    "make",
    [lambda: torch.ones(H), lambda: torch.ones(0, H), lambda: torch.randn(H, 5).t(), lambda: torch.randn(3, 2, 1, H)],
    ids=["one", "none", "transposed", "four dimensions"],
)
def test_shapes_and_strides(make, kind, mode):
    model, x = TinyMLP(kind), make().requires_grad_()
    expected = run(model, x)
    recompute_mlp(model, mode)
    assert_same(run(model, x), expected)


ACTIVATIONS = (
    nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.Tanh(), nn.Mish(), nn.Hardswish(), nn.Sigmoid(),
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations(act, dtype, mode):
    model, x = TinyMLP("LoRA", act).to(dtype), make_x(dtype)
    expected = run(model, x)
    recompute_mlp(model, mode)
    assert_same(run(model, x), expected)


class TestWork:
    @pytest.fixture
    def counts(self, monkeypatch) -> Counter:
        from lorasp.ops import lora_linear, lora_linear_group

        found = Counter()
        for table, name in ((lora_linear.forward_ops, "down"), (lora_linear_group.forward_ops, "gate and up")):
            for backend, op in list(table.items()):
                monkeypatch.setitem(table, backend, lambda *a, op=op, name=name: (found.update([name]), op(*a))[1])
        return found

    @pytest.mark.parametrize(("mode", "again"), [("activation", 0), ("full", 1)])
    @pytest.mark.parametrize("kind", ["LoRA", "LoRA-FA"])
    def test_products(self, counts, kind, mode, again):
        model, x = TinyMLP(kind), make_x()
        recompute_mlp(model, mode)
        y = model(x).sum()
        assert counts == {"gate and up": 1, "down": 1}
        y.backward(retain_graph=True)
        assert counts == {"gate and up": 1 + again, "down": 1}
        y.backward()
        assert counts == {"gate and up": 1 + 2 * again, "down": 1}

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("kind", "calls"), [("LoRA-FA", 1), ("LoRA", 2)])
    def test_the_activation_runs_once_and_once_more_for_h(self, monkeypatch, kind, calls, mode):
        """Under the autocast of the forward, which is over in backward."""
        model, x, seen = TinyMLP(kind), make_x(), []
        recompute_mlp(model, mode)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)

        def forward(self, gate):
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return nn.functional.silu(gate)

        monkeypatch.setattr(nn.SiLU, "forward", forward)
        y.sum().backward()
        assert seen == [torch.bfloat16] * calls

    @pytest.mark.parametrize("mode", MODES)
    def test_without_grad_mode_it_is_the_old_forward(self, monkeypatch, mode):
        model, x = TinyMLP(), make_x()
        expected = model(x)
        recompute_mlp(model, mode)
        monkeypatch.setattr("lorasp.models.mlps.hidden", None)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(model(x), expected)
        with pytest.raises(TypeError):
            model(x)

    @pytest.mark.parametrize("mode", MODES)
    def test_what_is_recomputed_is_freed(self, mode):
        model, x, made = TinyMLP("frozen"), make_x(), []
        recompute_mlp(model, mode)
        for layer in (model.gate_proj, model.up_proj):
            layer.register_forward_hook(lambda layer, args, y: made.append(weakref.ref(y.untyped_storage())))
        gc.disable()
        try:
            y = model(x)
            alive = sum(one() is not None for one in made)
            y.sum().backward(retain_graph=True)
            assert sum(one() is not None for one in made) == alive == {"activation": 2, "full": 0}[mode]
            assert len(made) == {"activation": 2, "full": 4}[mode]
            assert hidden_node(y.grad_fn).taken is None
        finally:
            gc.enable()


@pytest.mark.parametrize("mode", MODES)
class TestAutograd:
    def test_backward_twice(self, mode):
        model, x = TinyMLP(), make_x()
        recompute_mlp(model, mode)
        y, leaves = model(x), [x, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(y, leaves, y.detach(), retain_graph=True)
        assert_same(list(torch.autograd.grad(y, leaves, y.detach())), list(first))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y, leaves, y.detach())

    @pytest.mark.parametrize("wanted", ["down_proj", "gate_proj", "x"])
    def test_a_part_of_the_gradients(self, mode, wanted):
        model, x = TinyMLP(), make_x()
        leaves = [x] if wanted == "x" else [p for p in getattr(model, wanted).parameters() if p.requires_grad]
        expected = torch.autograd.grad(model(x).sum(), leaves)
        recompute_mlp(model, mode)
        y = model(x).sum()
        assert_same(list(torch.autograd.grad(y, leaves, retain_graph=True)), list(expected))
        assert_same(list(torch.autograd.grad(y, leaves)), list(expected))

    @pytest.mark.parametrize("trains", ["gate_proj", "up_proj", "down_proj"])
    def test_an_input_without_gradient(self, mode, trains):
        model = TinyMLP("frozen")
        getattr(model, trains).requires_grad_(True)
        x, leaves = make_x().detach(), [getattr(model, trains).weight]
        expected = torch.autograd.grad(model(x).square().sum(), leaves)
        recompute_mlp(model, mode)
        assert_same(list(torch.autograd.grad(model(x).square().sum(), leaves)), list(expected))

    def test_second_derivatives(self, mode):
        """Through h's own derivative they raise; through h, of a trained down projection's gradient, they are right."""

        def twice(of):
            (gradient,) = torch.autograd.grad(model(x).square().sum(), [of], create_graph=True)
            return list(torch.autograd.grad(gradient.square().sum(), [x]))

        model, x = TinyMLP("frozen"), make_x()
        model.down_proj.requires_grad_(True)
        expected = twice(model.down_proj.weight)
        recompute_mlp(model, mode)
        assert_same(twice(model.down_proj.weight), expected)
        (gradient,) = torch.autograd.grad(model(x).square().sum(), [x], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_hooks_around_it_see_what_is_kept(self, mode):
        model, x = TinyMLP(), make_x()
        expected = run(model, x)
        recompute_mlp(model, mode)
        seen, back = [], []

        def call(x):
            pack, unpack = lambda t: (seen.append(t.shape), t.numpy(force=True).copy())[1], lambda a: torch.tensor(a)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: (back.append(1), unpack(a))[1]):
                return model(x)

        assert_same(run(model, x, call), expected)
        assert sum(shape == (2, M // 2, I) for shape in seen) == {"activation": 2, "full": 0}[mode]
        with torch.autograd.graph.save_on_cpu():
            offloaded = model(x)
        assert torch.equal(offloaded, expected[0])

    @pytest.mark.parametrize("kind", ["frozen", "dropout"])
    def test_autocast(self, mode, kind):
        model, x = TinyMLP(kind), make_x()

        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        expected = run(model, x, call)
        plain = saved_bytes(lambda: call(x), exclude=model)
        recompute_mlp(model, mode)
        assert_same(run(model, x, call), expected)
        assert saved_bytes(lambda: call(x), exclude=model) < plain

    def test_what_a_layer_casts_is_not_kept(self, mode):
        """PEFT's default: fp32 adapters on a half-precision base read a copy of their input."""

        class Cast(nn.Linear):
            def forward(self, h):
                low = nn.functional.linear(h.to(torch.float32), self.A)
                low = low + nn.functional.linear((2 * h).to(torch.float32), self.A)  # no copy of h: it stays
                return super().forward(h) + (low @ self.B).to(h.dtype)

        model = TinyMLP("frozen").to(torch.bfloat16)
        model.down_proj.__class__ = Cast
        model.down_proj.A, model.down_proj.B = nn.Parameter(torch.randn(R, I)), nn.Parameter(torch.randn(R, H))
        x = make_x(torch.bfloat16)
        expected, plain = run(model, x), kept(model, x)
        recompute_mlp(model, mode)
        assert_same(run(model, x), expected)
        others = M * (I + R) * 4
        assert plain == M * (3 * I * 2 + I * 4) + others
        assert kept(model, x) == M * {"activation": 2 * I, "full": H}[mode] * 2 + others

    def test_an_activation_written_to_is_another_one(self, mode):
        """down_proj changes its input in place: what it keeps after that is not h."""

        class InPlace(nn.Linear):
            def forward(self, h):
                return super().forward(h.mul_(2))

        model, x = TinyMLP("frozen"), make_x()
        model.down_proj.__class__ = InPlace
        model.down_proj.requires_grad_(True)
        expected = run(model, x)
        recompute_mlp(model, mode)
        assert_same(run(model, x), expected)


def hidden_node(node):
    return node if node.name() == "HiddenFunctionBackward" else hidden_node(node.next_functions[0][0])
