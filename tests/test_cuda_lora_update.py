"""Backend cuda: lora_update, on the emulator; on hardware: test_gpu_lora_update.py.

Its passes are those of lora_linear, tested beside this.
"""

import pytest
import torch

from lorasp.ops import lora_update as ops
from lorasp.testing.lora_update import Case, check_case, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SWITCHES = (
    {},
    {"freeze_A": True, "dropout_p": 0.5},
    {"freeze_B": True, "dropout_p": 0.1},
    {"freeze_A": True, "need_dx": False},
    {"freeze_B": True, "need_dx": False, "dropout_p": 0.1},
    {"freeze_A": True, "freeze_B": True},
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_what_is_asked_for(emulated, dtype):
    for number, shape in enumerate([(1, 1, 2, 1), (9, 130, 65, 3), (130, 64, 64, 8), (0, 7, 5, 2), (67, 20, 33, 40)]):
        for switches in SWITCHES if number in (1, 3) else SWITCHES[:2]:
            masters = dtype != torch.float32 and number % 2 == 0
            for result in check_case(Case(*shape, dtype, masters=masters, **switches, seed=3), "cuda"):
                assert result.ok, result


def every_output(dx, y, x, A, B, dy, p=0.1):
    seed = torch.tensor(1)
    xa = ops.forward_ops["cuda"](y, x, A, B, seed, 1.0, p, 0)
    return y, xa, dx, *ops.backward_ops["cuda"](dx, dy, x, A, B, xa, seed, 1.0, p, 0, True, True)


@pytest.mark.parametrize("transposed", [False, True])
def test_strided_tensors_are_updated_where_they_lie(emulated, transposed):
    inputs = make_inputs(Case(70, 96, 65, 8, torch.bfloat16))
    gap = torch.nan

    def strided(tensor):
        if transposed:
            return tensor.t().contiguous().t()
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 5), gap, dtype=tensor.dtype)
        wide[:, : tensor.shape[1]] = tensor
        return wide[:, : tensor.shape[1]]

    operands = torch.ones(70, 96).bfloat16(), *(inputs[name] for name in ("y", "x", "lora_A", "lora_B", "dy"))
    views = [strided(t) for t in operands]
    for plain, view in zip(every_output(*operands), every_output(*views), strict=True):
        assert torch.equal(plain, view)
    for view in views[:2]:
        gaps = view.as_strided((69, 5 * (not transposed)), (view.stride(0), 1), view.shape[1])
        assert gaps.isnan().all()


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_opcheck(emulated, p, masters):
    dtype = torch.bfloat16 if masters else torch.float32
    i = make_inputs(Case(6, 16, 12, 4, dtype, masters=masters))
    factors, seed = (i["lora_A"], i["lora_B"]), torch.tensor(3)
    torch.library.opcheck(ops.forward_ops["cuda"], (i["y"], i["x"], *factors, seed, 0.5, p, 0))
    xa = ops.forward_ops["cuda"](i["y"], i["x"], *factors, seed, 0.5, p, 0)
    for dx, need_dA in ((torch.ones(6, 16, dtype=dtype), not masters), (None, True)):
        arguments = (dx, i["dy"], i["x"], *factors, xa, seed, 0.5, p, 0, need_dA, True)
        torch.library.opcheck(ops.backward_ops["cuda"], arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.zeros(4).expand(3, 4)}, "y is written to in place and must not overlap itself"),
        ({"y": torch.zeros(3, 5)}, r"y must be \(3, 4\), got \(3, 5\)"),
        ({"y": torch.zeros(3, 4).half()}, "y must have dtype Float, got Half"),
        ({"lora_A": torch.ones(2)}, "x, lora_A and lora_B must be 2-d, got 2, 1 and 2"),
        ({"dropout_p": 0.5}, "seed must be a 0-d int64 tensor when dropout_p > 0, got None"),
        ({"lora_A": torch.ones(0, 5), "lora_B": torch.ones(4, 0)}, r".* >= 1, got \(0, 5\) and \(4, 0\)"),
    ],
)
def test_the_raw_op_refuses_what_does_not_fit(emulated, changes, message):
    good = {
        "y": torch.zeros(3, 4), "x": torch.ones(3, 5), "lora_A": torch.ones(2, 5), "lora_B": torch.ones(4, 2),
        "seed": None, "scale": 1.0, "dropout_p": 0.0, "member": 0,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"lora_update: {message}"):
        ops.forward_ops["cuda"](*(good | changes).values())
