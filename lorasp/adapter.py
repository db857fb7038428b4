"""The adapter beside one frozen linear layer: its parameters and buffers, and what the operators take of them."""

import math

import torch
from torch import nn


class Adapter(nn.Module):
    """lora_A (r, in), lora_B (out, r) and the numbers that go with them; a frozen lora_A is a buffer."""

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
    ):
        super().__init__()
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.freeze_A, self.use_rslora, self.init_lora_weights = freeze_A, use_rslora, init_lora_weights
        self.scale = lora_alpha / (math.sqrt(r) if use_rslora else r)
        lora_A = torch.empty((r, in_features), device=device, dtype=dtype)
        if freeze_A:
            self.register_buffer("lora_A", lora_A)
        else:
            self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(torch.empty((out_features, r), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A, and lora_B or zeros, as init_lora_weights says."""
        with torch.no_grad():
            if self.init_lora_weights == "gaussian":
                self.lora_A.normal_(std=1 / self.r)
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
            if self.init_lora_weights:
                self.lora_B.zero_()
            else:
                nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    def extra_repr(self) -> str:
        words = [f"r={self.r}", f"lora_alpha={self.lora_alpha}", f"dtype={self.lora_B.dtype}"]
        words += [f"lora_dropout={self.lora_dropout}"] * (self.lora_dropout > 0)
        return ", ".join(words + ["freeze_A=True"] * self.freeze_A + ["use_rslora=True"] * self.use_rslora)
