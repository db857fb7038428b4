"""SharedInput: who its members are, copied, replaced or refused, and members that train in part."""

import copy
import pickle

import pytest
import torch
from shared_blocks import K_, RANKS, Block, K, Q, V, computed_members, make_x, run
from torch import nn

from lorasp import LoRALinear, PartialConfig, resample, testing
from lorasp.layers.shared_input import SharedInput
from lorasp.memory import saved_bytes


@pytest.fixture
def calls(monkeypatch) -> list[list[int]]:
    return computed_members(monkeypatch)


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
