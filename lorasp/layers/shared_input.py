"""Layers that read one input run as one operator, although a model calls them one after the other.

The first member called with a new x runs lora_linear_group for all of them; the others pick their outputs up. What
links the calls is a round: one x (a weak reference and its version), one grad mode, autocast dtype, forced backend,
saved-tensor hooks and thread. A round serves each member once; whatever does not belong to it begins the next one.

An output waits on the autograd node behind the first member's output, not here: the node saves x, so whoever held an
output from here would keep x and every graph below it alive. It goes with that graph, with x, or with the round.

A round also owns the seed of its dropout masks, a member's index telling them apart. So the masks, and torch's
generator, do not depend on which outputs were computed together: a recompute (activation checkpointing) that groups
otherwise than its forward did still computes the same function.
"""

import itertools
import threading
import weakref
from collections.abc import Sequence
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorasp.functional import Partial, lora_linear_group
from lorasp.functional.arguments import seed_tensor, surroundings
from lorasp.functional.lora_linear_group import Constants, LoRALinearGroupFunction, constants
from lorasp.ops import registry

_PLAIN = (Tensor, nn.Parameter)
# A member whose output was computed and not taken counts a miss, +2; one taken counts -1; at _APART it runs apart.
_MISS, _APART = 2, 4


class _Outputs(dict):
    """Member -> _Output, computed and not taken yet."""

    __slots__ = ("__weakref__",)


class _Output(NamedTuple):
    operands: NamedTuple
    state: tuple
    y: Tensor


def _nothing() -> None:
    return None


class _Round:
    """One x and the calls it was given to; served, made: bit sets of members, made for others than the caller."""

    __slots__ = (
        "__weakref__",
        "made",
        "outputs",
        "recomputed",
        "region",
        "seed",
        "served",
        "surroundings",
        "version",
        "x",
    )

    def __init__(self, x: Tensor, surroundings: tuple, region):
        self.x = weakref.ref(x, _Forget(weakref.ref(self)))
        self.version, self.surroundings, self.region = x._version, surroundings, region
        self.recomputed = torch._C._current_graph_task_id() != -1
        self.served = self.made = 0
        self.seed: Tensor | None = None
        self.outputs = _nothing

    def fits(self, x: Tensor, surroundings: tuple, region) -> bool:
        return (
            self.x() is x and self.version == x._version and self.surroundings == surroundings and self.region == region
        )

    def forget(self) -> None:
        outputs, self.outputs = self.outputs(), _nothing
        if outputs is not None:
            outputs.clear()


class _Forget:
    """What the end of x does: outputs nobody took go with it."""

    __slots__ = ("round",)

    def __init__(self, round: weakref.ref):
        self.round = round

    def __call__(self, _: weakref.ref) -> None:
        round = self.round()
        if round is not None:
            round.forget()


class _PerThread(threading.local):
    round: _Round | None = None


class SharedInput:
    """Links LoRALinear layers that read the same input, so that they run as one lora_linear_group.

    layers: two or more, with the same in_features; each belongs to one SharedInput at most. Results are those of the
    separate layers to rounding, in any order of calls and for any subset of them; with dropout, the masks come from one
    seed. It is a plain attribute of its layers: no parameters, no state_dict keys; copies and pickles of a model keep
    the links among the layers they hold. `layer.shared_input = None` takes a layer out.

    One backward pass goes through all members' outputs: a second one through another member's output needs
    retain_graph=True, and no member's factors may be written to before it. Under torch.compile and in inference mode,
    whose tensors do not tell when they are written to, each layer computes for itself. A write through `.data` between
    the calls of one round is not seen. Members whose outputs are repeatedly not taken are computed apart from then on.

    Raises ValueError for layers that cannot share an input.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        layers = list(layers)
        if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
            raise ValueError(f"SharedInput: layers must be two or more different layers, got {len(layers)}")
        if len(widths := {layer.in_features for layer in layers}) > 1:
            raise ValueError(f"SharedInput: layers must have the same in_features, got {sorted(widths)}")
        if any(layer.shared_input is not None for layer in layers):
            raise ValueError("SharedInput: layers must not belong to another SharedInput")
        self.__setstate__(len(layers))
        for index, layer in enumerate(layers):
            layer.shared_input, layer.shared_index = self, index
            self.adopt(layer)

    def __getstate__(self) -> int:
        return len(self._members)

    def __setstate__(self, count: int) -> None:
        # A copy's members are the copies of the layers: each of them reports by adopt().
        self._members = [_nothing] * count
        self._together = [(1 << count) - 1] * count  # member -> bit set of those it is computed with
        self._misses = [0] * count
        self._regions: list[weakref.ref] = []
        self._checked: tuple[list | None, Constants | None] = (None, None)
        self._lock = threading.Lock()
        self._here = _PerThread()

    def adopt(self, layer: nn.Module) -> None:
        """Take `layer` as member number layer.shared_index, unless another one stands there."""
        if self._members[layer.shared_index]() is None:
            self._members[layer.shared_index] = weakref.ref(layer)

    @property
    def members(self) -> tuple[nn.Module, ...]:
        """The layers linked now."""
        layers = (member() for member in self._members)
        return tuple(layer for layer in layers if layer is not None and layer.shared_input is self)

    def __call__(self, layer: nn.Module, x: Tensor, operands: tuple | None = None) -> Tensor:
        """layer's output for x; operands: its own, where it made them already."""
        index = layer.shared_index
        # In inference mode nothing tells that a tensor was written to.
        inference = torch.is_inference_mode_enabled() or not isinstance(x, Tensor) or x.is_inference()
        if inference or self._members[index]() is not layer:
            return layer.compute(x, operands)
        operands = operands or layer._operands()
        if operands is None:  # no adapter acts here
            return layer.compute(x)
        around = surroundings(x)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        # The region is known by its unpack hook, which lives as long as something saved in it can be asked for.
        region = None if hooks is None else weakref.ref(hooks[1])
        round = self._here.round
        if round is None or round.served >> index & 1 or not round.fits(x, around, region):
            round = self._next_round(_Round(x, around, region))
        round.served |= 1 << index
        outputs = round.outputs()
        if outputs is not None:
            output = outputs.pop(index, None)
            if output is not None and _unchanged(output, operands):
                return output.y
        return self._run(round, layer, x, operands, outputs)

    def _run(
        self, round: _Round, layer: nn.Module, x: Tensor, operands: NamedTuple, outputs: _Outputs | None
    ) -> Tensor:
        """layer's output, and with it those of the members it is computed with that were not served yet."""
        index = layer.shared_index
        chosen, keep_input = {index: (operands, _state(operands))}, layer.keep_input
        others = self._together[index] & ~round.served
        for other in range(len(self._members)) if others else ():
            member = self._members[other]() if others >> other & 1 else None
            if member is None or member.shared_input is not self or (outputs and other in outputs):
                continue
            candidate = member._operands()
            if candidate is None:
                continue
            state = _state(candidate)
            if self._fit(x, index, *chosen[index], other, candidate, state):
                chosen[other] = candidate, state
                keep_input |= member.keep_input
        if operands.dropout_p and round.seed is None:
            round.seed = seed_tensor("SharedInput", None, x.device)
        if len(chosen) == 1:
            if not operands.dropout_p:
                return layer.compute(x, operands)
            return layer.compute(x, operands, seed=round.seed, member=index)
        order = sorted(chosen)
        ys = self._compute(x, [chosen[i][0] for i in order], order, round, keep_input)
        waiting, outputs = outputs, _Outputs(outputs or ())
        if waiting:
            waiting.clear()
        for i, y in zip(order, ys, strict=True):
            outputs[i] = _Output(*chosen[i], y)
            round.made |= 1 << i
        y = outputs.pop(index).y
        if y.grad_fn is None:
            round.outputs = lambda: outputs
        else:
            y = y.view_as(y)
            y.grad_fn.metadata["lorasp"] = outputs
            round.outputs = weakref.ref(outputs)
        return y

    def _compute(
        self, x: Tensor, operands: list[NamedTuple], order: list[int], round: _Round, keep_input: bool
    ) -> tuple[Tensor, ...]:
        """linear_group; what it checks is not checked again while sizes, dtypes and devices stay (_fit: all alike)."""
        one = operands[0]
        found = [
            order, x.shape[-1:], x.dtype, x.device, round.surroundings, keep_input, one.dropout_p, one.weight.dtype,
            one.weight.device, one.lora_A.dtype, one.lora_A.device, one.lora_B.dtype, one.lora_B.device,
            registry.waits_for_host(x, sum([o.weight.shape[0] for o in operands]), "auto"),
        ]  # fmt: skip
        partial = False
        for o in operands:
            if o.packed is not None or o.mask_A is not None or o.mask_B is not None:
                return linear_group(x, operands, order, round.seed, keep_input)
            found += (o.scale, o.weight.shape, o.lora_A.shape, o.lora_B.shape, None if o.bias is None else o.bias.shape)
            if not _whole(o):
                partial = True
                found += kinds_of_parts(o)
        checked, how = self._checked
        if found != checked:
            ys = linear_group(x, operands, order, round.seed, keep_input)
            weights, scales = [o.weight for o in operands], [o.scale for o in operands]
            how = constants(x, weights, scales, one.dropout_p, order, keep_input, "auto")
            self._checked = (found if taken_as_they_are(operands, how.dtype) else None), how
            return ys
        rest = _by_field(operands) if partial else ()
        return LoRALinearGroupFunction.apply(
            x, round.seed if how.dropout_p else None, one.columns, how, *[o.weight for o in operands],
            *[o.bias for o in operands], *[o.lora_A for o in operands], *[o.lora_B for o in operands], *rest,
        )  # fmt: skip

    def _fit(
        self, x: Tensor, index: int, mine: NamedTuple, my_state: tuple, other: int, its: NamedTuple, its_state: tuple
    ):
        """Whether one node can serve both and change neither."""
        return (
            its.dropout_p == mine.dropout_p
            and _alike(its.weight, mine.weight)
            and _alike(its.lora_A, mine.lora_A)
            and _alike(its.lora_B, mine.lora_B)
            and (its.bias is None or (type(its.bias) in _PLAIN and its.bias.dtype == its.weight.dtype))
            and (its.columns is mine.columns or self._same_columns(index, mine.columns, other, its.columns))
            # One node's outputs require grad together.
            and (x.requires_grad or _trains(my_state) == _trains(its_state))
        )

    def _same_columns(self, index: int, mine: Tensor | None, other: int, its: Tensor | None) -> bool:
        """Whether both select the same features, as the host knows it: a look at them would wait for the device."""
        if mine is None or its is None:
            return False
        layers = self._members[index](), self._members[other]()
        one, two = (layer.adapters[layer.active_adapter].columns_key for layer in layers)
        return one is not None and one == two

    def _next_round(self, round: _Round) -> _Round:
        last, self._here.round = self._here.round, round
        if last is not None:
            last.forget()
            missed = 0 if last.recomputed else last.made & ~last.served
            if missed or any(self._misses):
                self._learn(missed, last.served)
        if round.region is not None and not round.recomputed:
            with self._lock:
                self._regions = [region for region in self._regions if region() is not None] + [round.region]
        return round

    def _learn(self, missed: int, served: int) -> None:
        """Set apart who is not called with the others, but never between a checkpointed forward and its recompute."""
        with self._lock:
            for i in range(len(self._misses)):
                change = _MISS if missed >> i & 1 else -(served >> i & 1)
                self._misses[i] = max(0, self._misses[i] + change)
            apart = sum(1 << i for i, misses in enumerate(self._misses) if misses >= _APART)
            if not apart or any(region() is not None for region in self._regions):
                return
            self._together = [
                together & (apart if apart >> i & 1 else ~apart) for i, together in enumerate(self._together)
            ]
            self._misses = [0] * len(self._misses)


def _by_field(operands: Sequence[NamedTuple]) -> list[Tensor | None]:
    """What LoRALinearGroupFunction takes beyond whole factors: frozen factors, rows and entries of every member, and
    no masks or packed weights."""
    parts = [(o.frozen_A, o.frozen_B, o.rows, o.entries_A, o.entries_B) for o in operands]
    return [*itertools.chain.from_iterable(zip(*parts, strict=True)), *[None] * (4 * len(operands))]


def kinds_of_parts(o: NamedTuple) -> list[tuple | None]:
    """Shape, dtype and device of what a selection adds to Operands: frozen factors, columns, rows, entries."""
    parts = o.frozen_A, o.frozen_B, o.columns, o.rows, o.entries_A, o.entries_B
    return [None if part is None else (part.shape, part.dtype, part.device) for part in parts]


def taken_as_they_are(operands: Sequence[NamedTuple], dtype: torch.dtype) -> bool:
    """Whether all factors are fp32 masters or in the compute dtype: those in others are converted at every call."""
    factors = [factor for o in operands for factor in (o.lora_A, o.lora_B, o.frozen_A, o.frozen_B)]
    return {factor.dtype for factor in factors if factor is not None} <= {dtype, torch.float32}


def _whole(o: NamedTuple) -> bool:
    """Whether A and B train whole, without masks. By identity: tensors would be compared by value."""
    return o.frozen_A is o.frozen_B is o.columns is o.rows is o.entries_A is o.entries_B is o.mask_A is o.mask_B is None


def _state(operands: NamedTuple) -> tuple:
    """What may change of operands that stay the same objects: whether any requires grad, then versions and flags."""
    weight, bias, lora_A, lora_B, *rest = operands[:4] if _whole(operands) else (*operands[:4], *operands[7:])
    state = (
        weight.requires_grad, lora_A.requires_grad, lora_B.requires_grad, bias is not None and bias.requires_grad,
    )  # fmt: skip
    versions = weight._version, lora_A._version, lora_B._version, bias is None or bias._version
    if rest:
        versions += tuple([tensor is None or tensor._version for tensor in rest])
    return state, versions


def _alike(one: Tensor, other: Tensor) -> bool:
    return type(one) in _PLAIN and one.dtype == other.dtype and one.device == other.device


def _trains(state: tuple) -> bool:
    return True in state[0]


def _unchanged(output: _Output, operands: NamedTuple) -> bool:
    return (
        all(map(is_, output.operands, operands)) or all(map(_same, output.operands, operands))
    ) and output.state == _state(operands)


def _same(old, new) -> bool:
    """A transposed weight is a new view every time."""
    if old is new:
        return True
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old._base is not None and old._base is new._base and old.stride() == new.stride()
    return isinstance(old, float) and old == new


def linear_group(
    x: Tensor, operands: Sequence[NamedTuple], members: Sequence[int], seed: Tensor | None, keep_input: bool
) -> tuple[Tensor, ...]:
    """lora_linear_group of the operands of layers, nn.Operands."""
    (
        weights, biases, lora_As, lora_Bs, scales, dropout_ps, packed, frozen_As, frozen_Bs, columns, rows, entries_A,
        entries_B, mask_As, mask_Bs,
    ) = zip(*operands, strict=True)  # fmt: skip
    selected = any(part is not None for part in (*columns, *rows, *entries_A, *entries_B))
    return lora_linear_group(
        x,
        weights,
        lora_As,
        lora_Bs,
        biases,
        scales=scales,
        dropout_p=dropout_ps[0],
        seed=seed,
        mask_As=mask_As,
        mask_Bs=mask_Bs,
        partial=Partial(columns[0], frozen_As, frozen_Bs, rows, entries_A, entries_B) if selected else None,
        members=members,
        keep_input=keep_input,
        packed=packed,
    )
