"""DistributedDataParallel and fully_shard: distributed_checks and distributed_file_checks in one run, the example."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import distributed_checks
import distributed_file_checks
import pytest
import two_processes

TESTS = Path(__file__).resolve().parents[1]
CHECKS = [*distributed_checks.CHECKS, *distributed_file_checks.CHECKS]


def run(command: list, timeout: float) -> subprocess.CompletedProcess:
    """The command and all it starts, none of which outlives the timeout."""
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "integration")))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = f"{process.communicate()[0]}\nkilled after {timeout} s"
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong, by check, in both processes; two pytest workers share one run of them."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two_processes"
    folder.mkdir(exist_ok=True)
    modules = [distributed_checks.__name__, distributed_file_checks.__name__]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := folder / "output").exists():
            result = run([sys.executable, two_processes.__file__, folder, *modules], timeout=300)
            done.write_text(f"{result.stdout[-4000:]}\nexit status {result.returncode}")
    reports = [folder / str(rank) for rank in range(two_processes.WORLD)]
    found = [dict(map(json.loads, report.read_text().splitlines())) if report.exists() else {} for report in reports]
    return [{"output": done.read_text()} | result for result in found]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, results):
    for rank, result in enumerate(results):
        wrong = result.get(check, f"not reached; {result['output']}")
        assert not wrong, f"rank {rank}: {wrong}"


def test_the_processes_end_well(results):
    assert results[0]["output"].endswith("exit status 0"), results[0]["output"]


def test_example(tmp_path):
    example = TESTS.parent / "examples" / "train_distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example]
    result = run([*command, "--strategy", "fsdp", "--steps", "5", "--out", tmp_path], timeout=200)
    assert result.returncode == 0, result.stdout
    assert f"the adapter in {tmp_path} gives one process the same logits" in result.stdout
    losses = [float(line.rpartition(" ")[2]) for line in result.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
