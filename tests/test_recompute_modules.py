"""recompute_mlp and the module: hooks, copies, undo, adapters, the report, what is refused."""

import copy
import io
import pickle

import pytest
import torch
from recompute_mlps import MODES, Block, H, I, M, R, TinyMLP, assert_same, kept, make_x, run
from torch import nn

from lorasp import recompute_mlp, undo_recompute_mlp


@pytest.mark.parametrize("mode", MODES)
class TestModules:
    def test_hooks(self, mode):
        """On projections they act as ever; on the activation, which would run twice, they keep the old forward."""
        model, x = TinyMLP(), make_x()
        model.gate_proj.register_forward_hook(lambda layer, args, y: y * 2)
        model.down_proj.register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
        model.register_forward_hook(lambda layer, args, y: y.tanh())
        expected = run(model, x)
        recompute_mlp(model, mode)
        assert_same(run(model, x), expected)
        seen = []
        handle = model.act_fn.register_forward_hook(lambda layer, args, y: seen.append(y.requires_grad))
        assert_same(run(model, x), expected)
        assert seen == [True]
        handle.remove()

    @pytest.mark.parametrize(
        "clone",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: torch.load(io.BytesIO(stored(model)), weights_only=False),
        ],
        ids=["deepcopy", "pickle", "torch.save"],
    )
    def test_copies(self, mode, clone):
        block, x = Block("dropout"), make_x()
        recompute_mlp(block, mode)
        other = clone(block)
        assert_same(run(other, x), run(block, x))
        assert kept(other, x) == kept(block, x)
        undo_recompute_mlp(other)
        assert type(other.mlp) is TinyMLP
        assert type(block.mlp) is not TinyMLP

    def test_undo_leaves_no_trace(self, mode):
        block, x = Block(), make_x()
        before, keys, bytes_before = set(vars(block.mlp)), list(block.state_dict()), kept(block, x)
        undo_recompute_mlp(block)
        recompute_mlp(block, mode)
        assert isinstance(block.mlp, TinyMLP)
        assert type(block.mlp).__name__ == "TinyMLP"
        assert list(block.state_dict()) == keys
        undo_recompute_mlp(block)
        assert type(block.mlp) is TinyMLP
        assert set(vars(block.mlp)) == before
        assert kept(block, x) == bytes_before

    def test_compiled_it_is_the_old_forward_without_a_break(self, mode):
        block, x = Block("frozen"), make_x()
        expected = run(block, x)
        recompute_mlp(block, mode)
        torch._dynamo.reset()
        assert_same(run(block, x, torch.compile(block, fullgraph=True, backend="aot_eager")), expected)

    def test_adapters_that_come_later(self, mode):
        from lorasp import LoRAConfig, inject

        block, other, x = Block("frozen"), Block("frozen"), make_x()
        config = LoRAConfig(r=R, target_modules="all-linear", init_lora_weights=False)
        torch.manual_seed(2)
        inject(other, config)
        recompute_mlp(block, mode)
        torch.manual_seed(2)
        inject(block, config)
        assert_same(run(block, x), run(other, x))
        assert kept(block, x) == M * {"activation": 2 * I + H + 3 * R, "full": H + R}[mode] * 4


def stored(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


class DoubledMLP(TinyMLP):
    def forward(self, x):
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj + down_proj


class Learned(nn.PReLU):
    pass


class TestReport:
    def test_what_was_done(self):
        model = nn.ModuleList([TinyMLP(), DoubledMLP(), TinyMLP()])
        report = recompute_mlp(model, "full")
        assert report.mode == "full"
        assert report.recomputed == {"0": "TinyMLP", "2": "TinyMLP"}
        assert str(report) == (
            "lorasp: full recompute in 2 modules: TinyMLP x2\nskipped 1: DoubledMLP has a forward that is not known"
        )
        again = recompute_mlp(model, "activation")
        assert (again.mode, again.recomputed, again.skipped) == ("activation", report.recomputed, report.skipped)
        assert kept(model[0], make_x()) > M * 2 * I * 4

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (DoubledMLP, "DoubledMLP has a forward that is not known"),
            (lambda: patched(TinyMLP()), "TinyMLP has a forward that is not known"),
            (lambda: TinyMLP("LoRA", nn.PReLU()), "PReLU, has parameters"),
            (lambda: TinyMLP("LoRA", nn.SiLU(inplace=True)), "SiLU, writes over its input"),
            (lambda: TinyMLP("LoRA", nn.RReLU()), "RReLU, draws random numbers"),
            (lambda: TinyMLP("LoRA", Learned()), "Learned, is not torch's or transformers'"),
            (lambda: nn.Linear(2, 2), "got Linear"),
        ],
    )
    def test_what_cannot(self, make, why):
        module = make()
        kind = type(module)
        with pytest.raises(ValueError, match=f"^recompute_mlp: model must have MLPs of a known kind, .*{why}"):
            recompute_mlp(module)
        assert type(module) is kind

    def test_arguments(self):
        with pytest.raises(TypeError, match=r"recompute_mlp: model must be a torch.nn.Module, got int"):
            recompute_mlp(3)
        with pytest.raises(ValueError, match="recompute_mlp: mode must be one of activation, full, got 'some'"):
            recompute_mlp(TinyMLP(), "some")

    def test_a_class_changed_since(self):
        block = Block()
        recompute_mlp(block)
        block.mlp.__class__ = type("Sharded", (type(block.mlp),), {})
        with pytest.raises(ValueError, match=r"undo_recompute_mlp: mlp must have .*, got .*Sharded"):
            undo_recompute_mlp(block)


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module
