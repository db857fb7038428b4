"""What a step of training holds, tensor by tensor: the bytes alive after every operator, and their parts at the peak.

Account watches real tensors and tensors without data (device "meta") alike. On the latter, as_on(device) makes a model
run the operators it would run on `device`, so that a step of a model that fits nowhere can be accounted for in seconds.

Counted: every storage an operator returns, from then until its last reference dies, in bytes as asked for. Not counted:
what an operator allocates inside (workspaces of cuBLAS, of attention and of lorasp's kernels), the allocator's rounding
(512 bytes a block on CUDA) and fragmentation, and the CUDA context.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What stands between steps, what backward fills, what autograd saved, and the rest: activations, gradients of
# activations and temporaries in flight, recomputed activations, the batch.
PARTS = ("weights", "adapters", "optimizer", "gradients", "saved", "other")


class Account(TorchDispatchMode):
    """The bytes alive while it is entered, on the devices of type `device_type` only.

    live, at_peak: bytes by PARTS, now and when their sum was largest; peak: that sum. hold() says what was there
    before; tensors autograd saves become "saved" by themselves, other storages are "other".
    """

    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.live: Counter[str] = Counter()
        self.at_peak: dict[str, int] = dict.fromkeys(PARTS, 0)
        self.peak = self._total = 0
        self._part: dict[int, str] = {}
        self._watched: dict[int, weakref.ref] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)

    def __enter__(self):
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for one in tree_iter(returned):
            if isinstance(one, Tensor):
                self._see(one)
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, {part: self.live[part] for part in PARTS}
        return returned

    def hold(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count these tensors as `part`, whatever they were; a storage counts once and whole."""
        for tensor in tensors:
            self._see(tensor)
            self._move(tensor, part)

    def _save(self, tensor: Tensor) -> Tensor:
        self._see(tensor)
        if self._part.get(tensor.untyped_storage()._cdata) == "other":
            self._move(tensor, "saved")
        return tensor

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._part:
            size = storage.nbytes()
            # The storage's Python object lives as long as the storage itself.
            self._watched[key] = weakref.ref(storage, lambda _: self._free(key, size))
            self._part[key] = "other"
            self.live["other"] += size
            self._total += size

    def _move(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._part:
            self.live[self._part[storage._cdata]] -= storage.nbytes()
            self.live[part] += storage.nbytes()
            self._part[storage._cdata] = part

    def _free(self, key: int, size: int) -> None:
        self.live[self._part.pop(key)] -= size
        self._total -= size
        del self._watched[key]


@contextlib.contextmanager
def account(
    model: nn.Module, weights: Iterable[Tensor], inputs: Iterable[Tensor], optimizer: torch.optim.Optimizer | None
) -> Iterator[Account]:
    """An Account of what runs inside, for a model that has stepped before; weights: the frozen model's own tensors."""
    weights, standing = list(weights), [*model.parameters(), *model.buffers()]
    watch = Account(standing[0].device.type)
    watch.hold("other", inputs)
    watch.hold("adapters", standing)
    watch.hold("weights", weights)
    states = optimizer.state.values() if optimizer else ()
    watch.hold("optimizer", (t for state in states for t in state.values() if isinstance(t, Tensor)))
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: watch.hold("gradients", [parameter.grad]))
        for parameter in standing
        if parameter.requires_grad and parameter.is_leaf
    ]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def as_on(device_type: str) -> Iterator[None]:
    """Let functions that look at the device of their tensors take a meta tensor for one on `device_type` (cuda or cpu).

    These are dropout, which is one operator with a bool mask on CUDA, and scaled_dot_product_attention, which chooses a
    kernel: what PyTorch chooses on such a device is called here. The rest of what these models call is on meta what it
    is on CUDA; on a CPU it is too, but for a layer norm in half precision, whose sums are kept in fp32 here.
    transformers, which asks the position ids whether sequences are packed, is told that they are not.
    """
    from transformers import masking_utils

    functions = nn.functional
    attention = {"cuda": _attention_on_cuda, "cpu": _attention_on_cpu}[device_type]
    dropout = {"cuda": _dropout_on_cuda, "cpu": functions.dropout}[device_type]
    with (
        mock.patch.object(functions, "scaled_dot_product_attention", attention),
        mock.patch.object(functions, "dropout", dropout),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None),
    ):
        yield


def _dropout_on_cuda(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace or not training or p in (0.0, 1.0):
        return torch.dropout_(input, p, training) if inplace else torch.dropout(input, p, training)
    return torch.native_dropout(input, p, True)[0]


def _attention_on_cuda(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Flash without a mask, in half precision; else the memory-efficient kernel, which takes an additive mask."""
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def _attention_on_cpu(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The blocked kernel where it drops nothing; else the formula, weights and all."""
    if dropout_p == 0.0:
        blocked = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return blocked(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    math = torch.ops.aten._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]
