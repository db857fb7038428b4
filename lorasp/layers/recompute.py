"""An MLP's hidden activation, recomputed in backward instead of kept.

    h = drop(act(gate) * up), or drop(act(up))        y = h W^T + ..., the down projection

hidden() forms h and keeps its pre-activations gate and up, or their common input x only: torch.utils.checkpoint runs
the projections again then, once per backward. project() calls the down projection; where that keeps h, or a cast of it,
a way back to h is kept. What is recomputed is what was computed: the same operations under the same autocast, with
torch's generators as they were where something is dropped.

Sources: selective activation recomputation, arXiv 2205.05198, section 5; GLU variants, arXiv 2002.05202.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

MODES = ("activation", "full")

_CAST = "ToCopyBackward0"
_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")


class Elementwise(NamedTuple):
    """drop(act(gate) * up), or drop(act(gate)); dropout_p: in force now."""

    act: nn.Module
    dropout_p: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        h = self.act(gate) if up is None else self.act(gate) * up
        return F.dropout(h, self.dropout_p) if self.dropout_p else h


class HiddenFunction(torch.autograd.Function):
    """h of its pre-activations, (gate, up) or (gate,), which are all that backward keeps; second derivatives raise.

    form: False where a checkpoint runs this again, which wants what is saved and not h.
    """

    @staticmethod
    def forward(ctx, elementwise: Elementwise, form: bool, *pre: Tensor) -> Tensor:
        ctx.elementwise, ctx.count, ctx.taken = elementwise, len(pre), None
        device = ctx.device_type = pre[0].device.type
        ctx.autocast = None
        if torch.amp.is_autocast_available(device):
            ctx.autocast = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.devices, states = [], []
        if elementwise.dropout_p:
            ctx.devices, states = get_device_states(pre[0])
            states = [torch.get_rng_state(), *states]
        ctx.save_for_backward(*pre, *states)
        return elementwise(*pre) if form else pre[0].new_empty(0)

    @staticmethod
    def backward(ctx, dh: Tensor):
        return _backward_once(ctx, dh) if torch.is_grad_enabled() else _backward(ctx, dh)


def _backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
    pre, states = _take(ctx)
    ctx.taken = None
    needs = ctx.needs_input_grad[2:]
    derivative = None if ctx.elementwise.dropout_p else _derivative(ctx.elementwise.act)
    with _as_in_forward(ctx, states):
        if derivative is not None:
            gate, *ups = pre
            dgate = derivative(dh * ups[0] if ups else dh, gate) if needs[0] else None
            return None, None, dgate, *(dh * ctx.elementwise.act(gate) if needs[1] else None for _ in ups)
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(pre, needs, strict=True)]
        with torch.enable_grad():
            h = ctx.elementwise(*leaves)
        found = iter(torch.autograd.grad(h, [leaf for leaf in leaves if leaf.requires_grad], dh))
    return None, None, *(next(found) if need else None for need in needs)


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)


def _take(node) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(pre-activations, generators' states) saved by a HiddenFunction.

    Unpacked once per backward: the down projection asks first, then HiddenFunction itself; a checkpoint answers once.
    """
    task = torch._C._current_graph_task_id()
    if node.taken is None or node.taken[0] != task:
        saved = node.saved_tensors
        if task == -1:
            return saved[: node.count], saved[node.count :]
        node.taken = task, saved
    saved = node.taken[1]
    return saved[: node.count], saved[node.count :]


@contextmanager
def _as_in_forward(node, states: tuple[Tensor, ...]) -> Iterator[None]:
    """Autocast and, if something was dropped, torch's generators as HiddenFunction.forward found them."""
    device = node.device_type
    if node.autocast is None:
        autocast = nullcontext()
    else:
        dtype, enabled = node.autocast
        autocast = torch.autocast(device, dtype, enabled, cache_enabled=False)
    with autocast, torch.random.fork_rng(node.devices, enabled=bool(states), device_type=device):
        if states:
            torch.set_rng_state(states[0])
            set_device_states(node.devices, states[1:], device_type=device)
        yield


def _derivative(act: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(gradient of act's output, act's input) -> gradient of its input, if autograd has one function for it."""
    inner = getattr(act, "act", None)  # transformers' GELUs are modules around a function
    if type(act) is nn.SiLU or type(act).__name__ == "SiLUActivation":
        return torch.ops.aten.silu_backward
    if type(act) is nn.GELU:
        return functools.partial(torch.ops.aten.gelu_backward, approximate=act.approximate)
    if inner is F.gelu:
        return torch.ops.aten.gelu_backward
    if isinstance(inner, functools.partial) and inner.func is F.gelu:
        return functools.partial(torch.ops.aten.gelu_backward, **inner.keywords)
    return None


class _Region:
    """x -> h, for torch.utils.checkpoint: from the second call on, only what the first one saved is wanted."""

    def __init__(self, pre_activations: Callable[[Tensor], tuple[Tensor, ...]], elementwise: Elementwise):
        self.pre_activations, self.elementwise, self.first = pre_activations, elementwise, True

    def __call__(self, x: Tensor) -> Tensor:
        form, self.first = self.first, False
        return HiddenFunction.apply(self.elementwise, form, *self.pre_activations(x))


def hidden(
    pre_activations: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
    elementwise: Elementwise,
    mode: str,
    draws: bool,
) -> Tensor:
    """elementwise(*pre_activations(x)); backward keeps the pre-activations ("activation") or x ("full").

    draws: pre_activations may draw random numbers, which "full" must draw again (it keeps the generators' states).
    """
    if mode == "activation":
        return HiddenFunction.apply(elementwise, True, *pre_activations(x))
    draws = draws or elementwise.dropout_p > 0
    return checkpoint(_Region(pre_activations, elementwise), x, use_reentrant=False, preserve_rng_state=draws)


class _WayBack(NamedTuple):
    """What is kept in the place of h or a cast of it."""

    node: object
    dtypes: tuple[torch.dtype, ...]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> Tensor:
        pre, states = _take(self.node)
        with torch.no_grad(), _as_in_forward(self.node, states):
            h = self.node.elementwise(*pre).contiguous()
        for dtype in self.dtypes:
            h = h.to(dtype)
        same = h.size() == self.size and h.stride() == self.stride
        return h if same else h.as_strided(self.size, self.stride, self.offset)


def project(layer: nn.Module, h: Tensor) -> Tensor:
    """layer(h), which keeps no h of hidden()'s, nor of a cast of it; any other h is an ordinary input."""
    node = _source(h.grad_fn)
    if node is None or type(h) is not Tensor or not h.is_contiguous() or h.storage_offset():
        return layer(h)
    # Not h itself: what is kept keeps these functions.
    storage, version, dtype, device, made_by = h.untyped_storage()._cdata, h._version, h.dtype, h.device, h.grad_fn
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> object:
        if tensor.dtype == dtype and tensor.untyped_storage()._cdata == storage and tensor._version == version:
            casts = (dtype,)
        elif _is_cast(tensor.grad_fn, made_by) and _is_plain(tensor, device):
            casts = (dtype, tensor.dtype)
        else:
            return tensor if outer is None else outer[0](tensor)
        return _WayBack(node, casts, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: object) -> Tensor:
        if isinstance(packed, _WayBack):
            return packed()
        return packed if outer is None else outer[1](packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), _keeps_input(layer):
        return layer(h)


@contextmanager
def _keeps_input(layer: nn.Module) -> Iterator[None]:
    """A LoRALinear would gather and keep the columns of h it needs: let it ask for h itself, which costs nothing."""
    before = vars(layer).get("keep_input")
    if before is not False:
        yield
        return
    layer.keep_input = True
    try:
        yield
    finally:
        layer.keep_input = before


def _source(function):
    """The HiddenFunction node whose output this node made or cast."""
    if function is not None and function.name() == _CAST:
        function = function.next_functions[0][0]
    return function if isinstance(function, HiddenFunction._backward_cls) else None


def _is_plain(tensor: Tensor, device: torch.device) -> bool:
    return type(tensor) is Tensor and tensor.device == device and tensor.is_contiguous() and tensor._version == 0


def _is_cast(function, made_by) -> bool:
    """Whether this node is a cast, of all of it, of what made_by made, or a view of all of such a cast."""
    while function is not None and function.name() in _VIEWS:
        function = function.next_functions[0][0]
    return function is not None and function.name() == _CAST and function.next_functions[0][0] is made_by
