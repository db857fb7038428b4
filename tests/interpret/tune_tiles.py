"""`lorasp tune --op` of single kernels for real, on Triton's interpreter. Run by test_tune.py."""

from dataclasses import replace

import pytest
import torch

from lorasp import cli
from lorasp.triton_kernels import launch
from lorasp.triton_kernels.plan_table import read_table
from lorasp.triton_kernels.tuning import Tiles
from lorasp.tune.device import DeviceBench
from lorasp.tune.jobs import dropkey_attention as attention_jobs
from lorasp.tune.jobs import lora_linear_skinny as rank_jobs
from lorasp.tune.jobs.dropkey_attention import AttentionJob
from lorasp.tune.jobs.lora_linear_skinny import RankJob

CPU, F16, F32 = torch.device("cpu"), torch.float16, torch.float32
JOBS = (
    AttentionJob("forward", F16, "listed", True, B=1, H=2, S=16, head_dim=16),
    AttentionJob("dq", F32, "masked", False, B=2, H=1, S=16, head_dim=16),
    AttentionJob("dkv", F16, "plain", True, B=1, H=2, S=16, head_dim=16),
    RankJob("project", F16, True, C=48, R=4, M=5),
    RankJob("outer", F32, False, C=48, R=4, M=5),
    RankJob("project_outer", F16, False, C=48, R=4, M=5),
    RankJob("accumulate", F32, True, C=48, R=4, M=5),
)


@pytest.mark.parametrize(
    ("jobs", "kernel", "arguments"),
    [
        (attention_jobs, "dq 1×1×16×16, float16, plain", ["--sizes", "1,1,16,16"]),
        (rank_jobs, "accumulate", ["--shapes", "16,16", "--ranks", "4", "--tokens", "2", "--dropout", "off"]),
    ],
)
def test_command(jobs, kernel, arguments, tmp_path, capsys, monkeypatch):
    """One of the command's calls."""
    op, make, samples = jobs.__name__.split(".")[-1], jobs.make_jobs, DeviceBench.samples
    monkeypatch.setattr(jobs, "make_jobs", lambda options: [job for job in make(options) if kernel in str(job)][-1:])
    monkeypatch.setattr(AttentionJob, "neighbour", lambda job, tiles: replace(job, S=17))
    monkeypatch.setattr(DeviceBench, "samples", lambda bench, job, choices, *_: samples(bench, job, choices, 1, 0.0))
    options = [*arguments, "--dtypes", "fp16", "--seconds", "0.001", "--out", str(tmp_path)]
    assert cli.main(["tune", "--op", op, *options]) == 0
    (row,) = read_table(tmp_path / "interpreter.json")[op]
    assert row["kernel"] == kernel.split()[0]
    assert "rejected" not in capsys.readouterr().out


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_every_candidate_is_right_and_is_what_runs(job, monkeypatch):
    bench = DeviceBench(CPU)
    found = job.candidates(bench.target)
    assert found[0] == Tiles()
    assert len(found) >= 2
    ran = []

    def noted(kernel, grid, arguments, *options):
        ran.append(tuple(arguments[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C") if name in arguments))
        return launch.run(kernel, grid, arguments, *options)

    monkeypatch.setattr(launch, "_interceptor", noted)
    for tiles in found:
        ran.clear()
        bench.verify(job, tiles)
        assert tiles.own or tuple(dict(tiles.fields).values())[:2] in ran
    if job in (JOBS[2], JOBS[3]):
        bench.verify(job.neighbour(found[-1]), found[-1])


@pytest.mark.parametrize("job", [JOBS[0], JOBS[2], JOBS[5]], ids=str)
def test_a_kernel_that_writes_nothing_is_wrong(job, monkeypatch):
    """Its output's memory may still hold the right result of the tiles before."""
    bench = DeviceBench(CPU)
    bench.verify(job, Tiles())
    kernel = {"forward": "_fwd_", "dq": "_dq_", "dkv": "_dkv_"}.get(job.kernel, f"linear_{job.kernel}_kernel")

    def idle(function, grid, arguments, *options):
        if kernel not in function.fn.__name__:
            launch.run(function, grid, arguments, *options)

    monkeypatch.setattr(launch, "_interceptor", idle)
    with pytest.raises(AssertionError, match=rf"error \S+ of \w+ exceeds .* at {job.kernel}"):
        bench.verify(job, job.candidates(bench.target)[-1])


def test_a_large_call_is_checked_by_its_first_head(monkeypatch):
    from lorasp.tune.operands import dropkey_attention as operands

    monkeypatch.setattr(operands, "_CHECKED_LOGITS", 2 * 16 * 16 - 1)
    bench = DeviceBench(CPU)
    bench.verify(JOBS[1], Tiles())
    assert bench._operands.expected()["dq"][0].shape[:2] == (1, 1)
