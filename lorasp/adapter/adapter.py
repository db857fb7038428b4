"""The adapter beside one frozen linear layer: its parameters and buffers, and what the operators take of them."""

import math

import torch
from torch import Tensor, nn

from lorasp.sharding import assign


class Adapter(nn.Module):
    """lora_A (r, in), lora_B (out, r) and the numbers that go with them; a frozen factor is a buffer.

    Where B is frozen (half of the modules of LoRA-SP's "matrix"), B starts at random and A at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        freeze_A: bool,
        use_rslora: bool,
        init_lora_weights: bool | str,
        device: torch.device,
        dtype: torch.dtype,
        freeze_B: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.freeze_A, self.freeze_B = freeze_A, freeze_B
        self.use_rslora, self.init_lora_weights = use_rslora, init_lora_weights
        self.scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self._create(device, dtype)
        self.reset_parameters()

    def _create(self, device: torch.device, dtype: torch.dtype) -> None:
        self._hold("lora_A", torch.empty((self.r, self.in_features), device=device, dtype=dtype), self.freeze_A)
        self._hold("lora_B", torch.empty((self.out_features, self.r), device=device, dtype=dtype), self.freeze_B)

    def _hold(self, name: str, value: Tensor, frozen: bool) -> None:
        if frozen:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))

    def reset_parameters(self) -> None:
        """Draw lora_A, and lora_B or zeros, as init_lora_weights says."""
        self._fill(self.lora_A, self.lora_B)

    def _fill(self, lora_A: Tensor, lora_B: Tensor) -> None:
        drawn, other = (lora_B, lora_A) if self.freeze_B else (lora_A, lora_B)
        with torch.no_grad():
            if self.init_lora_weights == "gaussian":
                drawn.normal_(std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            if self.init_lora_weights:
                other.zero_()
            else:
                nn.init.kaiming_uniform_(other, a=math.sqrt(5))

    def dense_A(self) -> Tensor:
        """A (r, in): the tensor itself, or put together from its trainable and frozen parts (gradients flow)."""
        return self.lora_A

    def dense_B(self) -> Tensor:
        """B (out, r), as dense_A."""
        return self.lora_B

    def set_dense(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Take over the values of dense factors, frozen entries included."""
        assign(self.lora_A, lora_A)
        assign(self.lora_B, lora_B)

    def trainable_mask_A(self) -> Tensor:
        return torch.full(self.lora_A.shape, not self.freeze_A, device=self.lora_A.device)

    def trainable_mask_B(self) -> Tensor:
        return torch.full(self.lora_B.shape, not self.freeze_B, device=self.lora_B.device)

    def parts(self) -> dict[str, Tensor]:
        """The fields of Operands that are the adapter's own tensors."""
        held = {**self._buffers, **self._parameters}  # past nn.Module.__getattr__, which takes as long as all else
        return held if len(held) == 2 else {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def factors_dtype(self) -> torch.dtype:
        return self.dense_B().dtype

    def extra_repr(self) -> str:
        words = [f"r={self.r}", f"lora_alpha={self.lora_alpha}", f"dtype={self.factors_dtype()}"]
        words += [f"lora_dropout={self.lora_dropout}"] * (self.lora_dropout > 0)
        words += ["freeze_A=True"] * self.freeze_A + ["freeze_B=True"] * self.freeze_B
        return ", ".join(words + ["use_rslora=True"] * self.use_rslora)
