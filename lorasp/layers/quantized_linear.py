"""A quantised frozen layer and the low-rank update around it, as one autograd node and as a LoRALinear.

    y = base(x) + s (D o x) A^T B^T          dx = dy W + D o (g A),   g = s dy B

The base's product and its dy W come from the quantiser (quantized.py); lora_update accumulates onto both, in place.
What backward keeps beyond the weights: x itself (only if A trains), x A^T (only if B trains), 8 bytes of seed.
Source: QLoRA arXiv 2305.14314, eq. 5.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorasp.adapter.adapter import Adapter
from lorasp.config import LoRAConfig
from lorasp.functional.arguments import check_dropout, check_tensor, factor, seed_tensor
from lorasp.layers.lora_linear import DEFAULT_ADAPTER, DTYPES, LoRALinear, Operands
from lorasp.layers.quantized import FrozenBase, frozen_base, frozen_tensors
from lorasp.ops import registry
from lorasp.ops.lora_linear import as_rows, cast
from lorasp.ops.lora_update import backward_ops, update


def quantized_lora_linear(
    x: Tensor,
    base: FrozenBase,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = base(x) + s (D o x) A^T B^T for a quantised frozen layer (see frozen_base); s, D and seed as in lora_linear.

    x (..., K) -> y (..., N) in the dtype that the layer itself gives for this x. lora_A (R, K) and lora_B (N, R) in any
    floating dtype; the low-rank part is computed in y's, accumulated in fp32, and their gradients are in their own:
    float32 masters get float32 gradients. Gradients flow to x, lora_A, lora_B and the layer's bias if it requires them.

    Backward keeps x only if lora_A trains and x A^T (M, R) only if lora_B trains, and nothing of the weight's full
    size; it makes the temporaries that the quantiser's own backward makes (quantized.py).

    Raises TypeError and ValueError for arguments that do not fit, RuntimeError for second derivatives.
    """
    where = "quantized_lora_linear"
    if not isinstance(base, FrozenBase):
        raise TypeError(f"{where}: base must be a FrozenBase (frozen_base(layer)), got {type(base).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a Tensor, got {type(x).__name__}")
    k, n, device = base.in_features, base.out_features, base.device
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"{where}: x must be (..., {k}), got {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{where}: x must be {', '.join(map(str, DTYPES))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{where}: x must be on {device} like the layer, got {x.device}")
    check_tensor(where, "lora_A", lora_A, (-1, k), "(R, {1}) with R >= 1", DTYPES, device)
    check_tensor(where, "lora_B", lora_B, (n, lora_A.shape[0]), "({0}, {1})", DTYPES, device)
    if not isinstance(scale, int | float) or not -math.inf < scale < math.inf:
        raise ValueError(f"{where}: scale must be a finite number, got {scale!r}")
    dropping = check_dropout(where, dropout_p)
    return QuantizedLoRALinearFunction.apply(
        x, base.bias, lora_A, lora_B, seed_tensor(where, seed, device) if dropping else None, base, float(scale),
        float(dropout_p) if dropping else 0.0,
    )  # fmt: skip


class QuantizedLoRALinearFunction(torch.autograd.Function):
    """The base's product, then lora_update onto it; the base's dx, then lora_update's backward onto that."""

    @staticmethod
    def forward(ctx, x, bias, lora_A, lora_B, seed, base, scale, dropout_p):
        need_x, _, need_A, need_B = ctx.needs_input_grad[:4]
        y = base.product(x, need_x)
        # Some products end in a view; autograd must not take y for one, or it could not be written to in place.
        y = torch.ops.aten._unsafe_view.default(y, y.shape)
        backend, _ = registry.choose_linear("lora_update", x, y.shape[-1], y.dtype)
        factors = factor(lora_A, y.dtype), factor(lora_B, y.dtype)
        xa = update(y, x, *factors, seed, scale, dropout_p, 0, backend)
        standing = base.standing() if need_x else ((), None)
        ctx.save_for_backward(
            x if need_A else None, xa if need_B else None, lora_A, lora_B, seed if need_x or need_A else None,
            *standing[0],
        )  # fmt: skip
        ctx.constants = (
            (scale, dropout_p, 0), x.shape, x.dtype, None if bias is None else bias.dtype, base, standing[1], backend
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, dy):
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy):
    x, xa, lora_A, lora_B, seed, *tensors = ctx.saved_tensors
    need_x, need_bias, need_A, need_B = ctx.needs_input_grad[:4]
    scalars, x_shape, x_dtype, bias_dtype, base, how, backend = ctx.constants
    dy = as_rows(dy, dy.dtype)
    dx = dbias = dlora_A = dlora_B = None
    if need_x:
        dx = cast(base.dx(dy, tuple(tensors), how, x_dtype), dy.dtype)
    if need_x or need_A or need_B:
        dlora_A, dlora_B = backward_ops[backend](
            dx, dy, as_rows(x, dy.dtype) if need_A else None, factor(lora_A, dy.dtype), factor(lora_B, dy.dtype), xa,
            seed, *scalars, need_A, need_B,
        )  # fmt: skip
    if need_x:
        dx = cast(dx, x_dtype).reshape(x_shape)
    if need_bias:
        dbias = dy.sum(0).to(bias_dtype)
    return (
        dx, dbias, cast(dlora_A, lora_A.dtype) if need_A else None, cast(dlora_B, lora_B.dtype) if need_B else None,
        None, None, None, None,
    )  # fmt: skip


# With grad mode on (create_graph=True) the result must refuse to be differentiated again.
_backward_once = once_differentiable(_backward)


class QuantizedLoRALinear(LoRALinear):
    """y = base_layer(x) + s drop(x) A^T B^T: a quantised linear layer, as it is, with a low-rank adapter that trains.

    base_layer is the quantised layer itself, a child: its state_dict, its quantisation state and its `.to()` stay its
    own. Made by inject() or by from_linear(layer, config); see frozen_base for the layers, quantized_lora_linear for
    dtypes and for what backward keeps. lora_A and lora_B are float32 unless they are cast: a quantised weight has no
    dtype to train in, and PEFT's are float32 too. In the state_dict the weight is base_layer.weight, the adapter
    adapters.<name>.lora_A and .lora_B; adapter files are those of any LoRALinear.

    partial may freeze whole factors (granularity "matrix"); other selections, prepack and shared inputs are for plain
    weights. merge() raises: the weight would be rounded anew, and what it was could not be restored.

    Source: QLoRA arXiv 2305.14314.
    """

    can_share_input = False

    def __init__(self, *arguments, **options):
        raise TypeError("QuantizedLoRALinear: must be made by inject() or from_linear(quantised layer, config)")

    @classmethod
    def beside(
        cls,
        linear: nn.Module,
        config: LoRAConfig,
        name: str = "",
        peers: Sequence[str] = (),
        adapter: str = DEFAULT_ADAPTER,
    ) -> "QuantizedLoRALinear":
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"QuantizedLoRALinear: config must be a LoRAConfig, got {type(config).__name__}")
        base = frozen_base(linear)
        if not isinstance(base, FrozenBase):
            why = base or f"{type(linear).__name__} is not quantised"
            raise TypeError(f"QuantizedLoRALinear: linear must be a quantised linear layer: {why}")
        _check_config(config)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.base_layer = linear
        layer.in_features, layer.out_features = base.in_features, base.out_features
        layer._begin(config.adapter_arguments(), name, peers, adapter)
        return layer.train(linear.training)

    def make_adapter(self, config: LoRAConfig, name: str = "", peers: Sequence[str] = ()) -> Adapter:
        _check_config(config)
        return super().make_adapter(config, name, peers)

    def _adapter_dtype(self, arguments: dict) -> torch.dtype:
        return torch.float32

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base_layer.bias

    @property
    def frozen_tensors(self) -> tuple[Tensor, ...]:
        """What the quantised layer holds beside its Parameters: the statistics of its weight."""
        return tuple(frozen_tensors(self.base_layer))

    def compute(
        self, x: Tensor, operands: Operands | None = None, *, seed: Tensor | None = None, member: int = 0
    ) -> Tensor:
        if self.active_adapter not in self.adapters or not self.enabled:
            return self.base_layer.forward(x)
        adapter = self.adapters[self.active_adapter]
        base = frozen_base(self.base_layer)
        if not isinstance(base, FrozenBase):
            why = base or "it is not quantised any more"
            raise ValueError(f"QuantizedLoRALinear: base_layer must be a quantised linear layer: {why}")
        return quantized_lora_linear(
            x, base, **adapter.parts(), scale=adapter.scale, dropout_p=adapter.lora_dropout if self.training else 0.0,
            seed=seed,
        )  # fmt: skip

    def merge(self, *, keep_base: bool = True) -> None:
        """Raises ValueError: see the class."""
        raise ValueError(
            f"merge: the weight must not be quantised, got {type(self.base_layer).__name__}: merged and quantised "
            "again it would be rounded anew, and unmerge could not restore it; dequantise the model first, or keep "
            "the adapter apart"
        )

    def _reset_base(self) -> None:
        raise ValueError("QuantizedLoRALinear: a quantised weight cannot be drawn again; see reset_lora_parameters")


def _check_config(config: LoRAConfig) -> None:
    if config.prepack:
        raise ValueError("QuantizedLoRALinear: prepack must be False over a quantised weight, got True")
    partial = config.partial
    if partial is not None and (partial.granularity != "matrix" or partial.resample != "never"):
        raise ValueError(
            "QuantizedLoRALinear: partial must be None or of granularity 'matrix' with resample='never' over a "
            f"quantised weight, got {partial.granularity!r}, {partial.resample!r}"
        )
