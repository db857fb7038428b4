"""`lorasp tune` for real, on Triton's interpreter: its times mean nothing, its checks do. Run by test_tune.py."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from lorasp import cli
from lorasp.triton_kernels import launch
from lorasp.triton_kernels import lora_linear as kernels
from lorasp.triton_kernels.plan_table import read_table
from lorasp.triton_kernels.tuning import Plan
from lorasp.tune import DeviceLost, Rejected
from lorasp.tune.device import DeviceBench
from lorasp.tune.jobs.lora_linear import Job

CPU = torch.device("cpu")
JOB = Job("forward", torch.float16, True, N=24, K=40, R=4, M=5)
JOBS = (JOB, Job("backward", torch.float32, True, N=24, K=40, R=4, M=5))
FUSED = Plan("fused")


def test_command(tmp_path, capsys):
    arguments = ["tune", "--shapes", "16,16", "--ranks", "4", "--tokens", "2", "--dtypes", "fp16", "--dropout", "off"]
    assert cli.main([*arguments, "--plans", "fused", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    table = read_table(tmp_path / "interpreter.json")
    assert [row["direction"] for row in table["rows"]] == ["forward", "backward"]
    assert table["device"] == table["provenance"]["device"] == "interpreter"
    assert table["provenance"]["command"].startswith("lorasp tune --shapes 16,16")
    assert {"torch", "triton", "commit", "kernels", "date"} <= table["provenance"].keys()
    assert "rejected" not in capsys.readouterr().out
    assert cli.main([*arguments, "--plans", "fused", "--out", str(tmp_path)]) == 0
    assert "0 of 2 calls to measure" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tl.dot on bfloat16 is wrong in Triton's interpreter"),
        (["--dtypes", "fp16"], "--out must name a folder"),
    ],
)
def test_the_interpreter_has_limits(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_every_candidate_is_right(job):
    bench = DeviceBench(CPU)
    found = job.candidates(bench.target)
    assert len(found) >= 4
    for plan in found:
        bench.verify(job, plan)


def _planted(name, action):
    """The launcher, but for the kernel of that name."""

    def planted(kernel, grid, arguments, *options):
        if name in kernel.fn.__name__:
            return action(arguments)
        return launch.run(kernel, grid, arguments, *options)

    return planted


def _out_of_resources(arguments):
    raise OutOfResources(300000, 232448, "shared memory")


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_a_kernel_that_writes_nothing_is_wrong(job, monkeypatch):
    """Its output's memory may still hold the right result of the plan before."""
    bench = DeviceBench(CPU)
    bench.verify(job, FUSED)
    monkeypatch.setattr(launch, "_interceptor", _planted("_gemm_", lambda arguments: None))
    with pytest.raises(AssertionError, match=rf"error inf of {'y' if job == JOB else 'dx'} exceeds .* at {job}"):
        bench.verify(job, FUSED)
    bench.verify(job, Plan("addmm"))


def test_a_kernel_that_leaves_its_last_column_out_is_wrong(monkeypatch):
    def shortened(arguments):
        launch.run(kernels._lora_linear_gemm_tma_kernel, (1,), arguments, 4, 2)
        arguments["out_desc"].base[:, -1] = 0.0

    monkeypatch.setattr(launch, "_interceptor", _planted("_gemm_tma_", shortened))
    with pytest.raises(AssertionError, match=r"error \d.* of y exceeds"):
        DeviceBench(CPU).verify(JOB, FUSED)


def test_what_does_not_launch_is_rejected(monkeypatch):
    bench = DeviceBench(CPU)
    monkeypatch.setattr(launch, "_interceptor", _planted("_gemm_", _out_of_resources))
    with pytest.raises(Rejected, match="OutOfResources: out of resource: shared memory"):
        bench.verify(JOB, FUSED)

    def dead(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(bench, "_synchronize", dead)
    with pytest.raises(DeviceLost, match=r"fused at forward 5×40×24 .*: CUDA error: an illegal .* encountered$"):
        bench.verify(JOB, FUSED)


def test_the_frozen_layer_and_the_plans_are_timed_alike():
    def clock(function, calls):
        function()
        return float(calls)

    for job in JOBS:
        samples = DeviceBench(CPU, clock).samples(job, [None, FUSED], 2, 1.0)
        assert samples == [[(1.0, 1.0)] * 2] * 2
