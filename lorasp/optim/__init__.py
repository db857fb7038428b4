"""Optimizers that know what of an adapter is frozen."""

from lorasp.optim.lorafa_adamw import LoRAFAAdamW
from lorasp.optim.partial_adamw import PartialAdamW

__all__ = ["LoRAFAAdamW", "PartialAdamW"]
