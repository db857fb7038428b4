"""What every public function checks in the same way: tensors, seeds, autocast."""

import math

import torch
from torch import Tensor

from lorasp import rng
from lorasp.ops import registry

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
# Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xla", "xpu"))
)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast would have torch.nn.functional.linear compute in; None where it leaves x alone."""
    device_type = x.device.type
    if x.dtype == torch.float64:
        return None
    # Others may have been registered since (PrivateUse1).
    if device_type not in _AUTOCAST_DEVICES and (
        torch.compiler.is_compiling() or not torch.amp.is_autocast_available(device_type)
    ):
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def surroundings(x: Tensor) -> tuple:
    """What a call with x computes in, besides its arguments: grad mode, autocast, the forced backend and plan."""
    autocast = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    return torch.is_grad_enabled(), autocast, *registry.forced()


def compute_dtypes(
    where: str, x: Tensor, autocast: torch.dtype | None, name: str = "x"
) -> tuple[torch.dtype, tuple, tuple]:
    """(compute dtype, dtypes weight and bias may have, dtypes the low-rank factors may have)."""
    if x.dtype not in _DTYPES:
        raise TypeError(f"{where}: {name} must be {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if autocast is not None:
        return autocast, _DTYPES[1:], _DTYPES[1:]
    return x.dtype, (x.dtype,), (x.dtype, torch.float32) if x.dtype in _HALVES else (x.dtype,)


def check_dropout(where: str, dropout_p: float) -> bool:
    """Whether dropout_p drops anything."""
    if dropout_p == 0.0:
        return False
    if not isinstance(dropout_p, int | float) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{where}: dropout_p must be in [0, 1), got {dropout_p!r}")
    if rng.threshold(dropout_p) == 65536:
        raise ValueError(f"{where}: dropout_p must be below 1 - 2^-17 (16-bit masks), got {dropout_p!r}")
    return effective_rate(dropout_p) > 0.0


def effective_rate(dropout_p: float) -> float:
    """A checked dropout_p, 0.0 where a mask of 16 bits drops nothing."""
    return float(dropout_p) if dropout_p != 0.0 and rng.threshold(dropout_p) > 0 else 0.0


def factor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A low-rank factor as the kernels take it: the compute dtype or fp32; other halves (autocast) are converted."""
    return tensor if tensor.dtype in (dtype, torch.float32) else tensor.to(dtype)


def check_tensor(
    where: str, name: str, tensor: Tensor, shape: tuple, wanted: str, dtypes: tuple, device: torch.device
) -> None:
    """where: the public function; shape: -1 for any size >= 1; wanted: the shape in words, a template."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    sizes = tensor.shape
    if len(sizes) != len(shape) or 0 in sizes or (sizes[0] != shape[0] >= 0) or (sizes[-1] != shape[-1] >= 0):
        raise ValueError(f"{where}: {name} must be {wanted.format(*shape)}, got {tuple(sizes)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{where}: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{where}: {name} must be on {device} like x, got {tensor.device}")


def check_like(
    where: str, name: str, tensor: Tensor, model: str, shape: tuple, dtypes: tuple, device: torch.device
) -> None:
    """shape: the one of `model`, whose name the message tells; sizes may be 0."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(tensor).__name__}")
    if tensor.shape != shape:
        raise ValueError(f"{where}: {name} must be {tuple(shape)} like {model}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{where}: {name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{where}: {name} must be on {device} like {model}, got {tensor.device}")


def three_dimensional(x: Tensor) -> Tensor:
    """x (..., S, F) as (B, S, F): a view for every x of up to three dimensions."""
    if x.ndim <= 3:
        return x[(None,) * (3 - x.ndim)]
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def not_same(x: Tensor, *others: Tensor | None) -> Tensor:
    """x, or a view of it if it is one of others: dynamo traces no autograd.Function that gets one tensor twice."""
    if torch.compiler.is_compiling() and any(x is other for other in others):
        return x.view_as(x)
    return x


def seed_tensor(where: str, seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return rng.draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0 or seed.device != device:
            raise ValueError(
                f"{where}: seed must be an int or a 0-d int64 tensor on {device}, "
                f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int | torch.SymInt) or isinstance(seed, bool):
        raise TypeError(f"{where}: seed must be an int or a 0-d int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{where}: seed must be in [-2^63, 2^63), got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)
