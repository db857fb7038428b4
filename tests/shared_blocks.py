"""q, k and v on one input, as a group or apart, and the comparison of the two."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lorasp import LoRALinear, testing
from lorasp.layers.shared_input import SharedInput
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


def computed_members(monkeypatch) -> list[list[int]]:
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
