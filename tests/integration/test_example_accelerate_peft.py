"""examples/accelerate_peft.py, in this process and at a tiny size."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lorasp import testing

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "accelerate_peft.py"


@pytest.mark.parametrize("freeze_A", [False, True])
def test_runs(freeze_A, capsys):
    spec = importlib.util.spec_from_file_location("accelerate_peft", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.main(["--hidden", "32", "--layers", "1", "--steps", "6", *["--freeze-A"] * freeze_A])
    printed = capsys.readouterr().out
    assert "7 layers accelerated" in printed
    assert ("stays frozen in 7 layers" in printed) == freeze_A
    assert found["kept_after"] < found["kept_before"]
    assert found["held_out"] < found["held_out_at_first"]
    ours, pefts = (torch.tensor(found[name], dtype=torch.float64) for name in ("held_out", "held_out_again"))
    testing.assert_close(ours, pefts, pefts, torch.bfloat16)
    assert min(found["ms_before"], found["ms_after"]) > 0
