"""Cases of the dropkey_attention tests."""

import torch

from lorasp.ops import registry
from lorasp.testing.dropkey_attention import make_inputs

BACKENDS = [name for name in ("reference", "cpp", "triton") if registry.unsupported(name, "cpu", torch.float32) is None]
SMALL = (2, 4, 2, 6, 9, 8, 5)  # B, H, Hkv, Sq, Sk, D, Dv


def leaves(case):
    inputs = make_inputs(case)
    return [inputs[name].requires_grad_() for name in "qkv"], inputs
