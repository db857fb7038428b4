"""python -m lorasp tune, on an invented device: what it tries, what it refuses, what it chooses, what it writes."""

from dataclasses import replace

import pytest
import torch
from interpreter import run_interpreted
from invented_bench import PROVENANCE, TARGET, InventedBench, options_of

pytest.importorskip("triton", reason="triton is not installed")

from lorasp import cli, tune
from lorasp.triton_kernels import tuning
from lorasp.triton_kernels.plan_table import read_table
from lorasp.triton_kernels.tuning import Plan
from lorasp.tune import DeviceLost, PlanFile, Rejected, Timing, command, decide
from lorasp.tune.jobs.lora_linear import Job, make_jobs

JOB = Job("forward", torch.bfloat16, False, N=4096, K=4096, R=16, M=8192)
ADDMM, FUSED, ONEPASS = Plan("addmm"), Plan("fused"), Plan("onepass")


def tuned(name, job=JOB, index=0):
    """One of the candidates on tiles that are not the architecture's own."""
    return [plan for plan in job.candidates(TARGET) if plan.name == name and plan.gemm][index]


def run(table_folder, bench, jobs, *arguments, provenance=PROVENANCE):
    return command.tune(jobs, bench, provenance, options_of("--out", table_folder, *arguments))


def looked_up(direction="forward", M=8192, N=4096, K=4096, R=16, dtype=torch.bfloat16, dropout=False):
    return tuning.select_plan("auto", direction, M, N, K, R, dtype, dropout, TARGET)


def rows(table_folder):
    return read_table(table_folder / "test_gpu_7.json")["rows"]


def test_winners_are_written_and_looked_up(table_folder, capsys):
    best, backward = tuned("fused"), replace(JOB, direction="backward")
    low = replace(JOB, M=1)
    assert looked_up() == ADDMM
    assert run(table_folder, InventedBench({best: 1.05}), [JOB, backward]) == 0
    assert run(table_folder, InventedBench({ONEPASS: 1.1}), [low]) == 0
    assert [row["plan"] for row in rows(table_folder)] == ["onepass", "fused", "fused"]
    assert looked_up() == looked_up(M=3000, N=7000, K=3000, R=24) == looked_up("backward") == best
    assert looked_up(M=3) == ONEPASS
    assert looked_up(N=16384) == looked_up(dropout=True) == looked_up(dtype=torch.float16) == ADDMM
    shown = capsys.readouterr().out
    assert "forward 4096×4096 r16, bfloat16, no dropout" in shown
    assert f"8192   {best}" in shown
    assert max(len(line.rstrip()) for line in shown.split("wrote")[0].splitlines()) <= 100


def test_wrong_and_refused_plans_are_reported_and_never_timed(table_folder, capsys):
    wrong, spilled, odd = tuned("fused"), tuned("fused", index=1), tuned("onepass")
    refused = {
        wrong: AssertionError("error 3 of y exceeds 1"),
        spilled: Rejected("OutOfResources: shared memory"),
        (JOB.neighbour(odd), odd): AssertionError("error 2 of xa exceeds 1"),
    }
    bench = InventedBench({wrong: 0.5, spilled: 0.5, odd: 0.5, tuned("fused", index=2): 0.9}, refused=refused)
    assert run(table_folder, bench, [JOB]) == 0
    assert looked_up() == tuned("fused", index=2)
    assert {wrong, spilled}.isdisjoint(plan for _, plan in bench.timed)
    shown = capsys.readouterr().out
    assert f"M=8192: rejected {wrong}: wrong: error 3 of y exceeds 1" in shown
    assert f"M=8192: rejected {spilled}: OutOfResources: shared memory" in shown
    assert f"M=8192: rejected {odd}: wrong: error 2 of xa exceeds 1" in shown


def test_a_neighbour_is_checked_once_for_all_layers_it_stands_for(table_folder):
    best = tuned("fused")
    bench = InventedBench({best: 0.9})
    assert run(table_folder, bench, [JOB, replace(JOB, N=14336), replace(JOB, M=2048)]) == 0
    assert sum(job == JOB.neighbour(best) and plan == best for job, plan in bench.verified) == 1
    assert JOB.neighbour(best).R == 32
    assert replace(JOB, R=64).neighbour(ONEPASS).R == 64
    rejecting = InventedBench({best: 0.9}, refused={(JOB.neighbour(best), best): Rejected("no")})
    outcomes = list(tune.run([JOB, replace(JOB, N=14336)], rejecting))
    assert [outcome.rejected for outcome in outcomes] == [{best: "no"}] * 2


@pytest.mark.parametrize("plan", [ADDMM, FUSED], ids=lambda plan: plan.name)
def test_a_plan_that_is_wrong_on_its_own_tiles_is_the_librarys_fault(table_folder, plan, capsys):
    bench = InventedBench({tuned("onepass"): 0.9}, refused={plan: AssertionError("error 3")})
    assert run(table_folder, bench, [JOB]) == 1
    assert (table_folder / "test_gpu_7.json").exists() == (plan != ADDMM)
    assert ("nothing written" in capsys.readouterr().out) == (plan == ADDMM)


def test_without_addmm_nothing_is_measured(table_folder, capsys):
    """Too large for the device, for example."""
    assert run(table_folder, InventedBench(refused={(JOB, ADDMM): Rejected("out of memory")}), [JOB]) == 0
    shown = capsys.readouterr().out
    assert "not measured" in shown
    assert "M=8192: rejected addmm: out of memory" in shown


def test_a_call_that_cannot_be_timed_does_not_end_the_search(table_folder, capsys):
    bench = InventedBench(refused={(JOB, "samples"): Rejected("out of memory")})
    assert run(table_folder, bench, [JOB, replace(JOB, M=8)]) == 0
    assert [row["M"] for row in rows(table_folder)] == [8]
    assert "M=8192: rejected addmm: not timed: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("spread", "winner"), [(0.02, "fused"), (0.2, "addmm")])
def test_a_gain_below_the_noise_is_none(spread, winner):
    (outcome,) = tune.run([JOB], InventedBench({tuned("fused"): 1.1}, spread))
    assert outcome.noise == pytest.approx(spread)
    assert outcome.winner.name == winner


TUNED = tuned("fused")


@pytest.mark.parametrize(
    ("ratios", "noise", "winner"),
    [
        ({ADDMM: 1.1}, 0.0, ADDMM),
        ({ADDMM: 1.1, FUSED: 1.2, ONEPASS: 1.3}, 0.0, ADDMM),
        ({ADDMM: 1.1, FUSED: 1.1}, 0.0, ADDMM),
        ({ADDMM: 1.1, FUSED: 1.05, ONEPASS: 1.04}, 0.02, FUSED),
        ({ADDMM: 1.1, FUSED: 1.05, ONEPASS: 1.0}, 0.02, ONEPASS),
        ({ADDMM: 1.1, FUSED: 1.05, TUNED: 1.04}, 0.02, FUSED),
        ({ADDMM: 1.1, FUSED: 1.07, TUNED: 1.04}, 0.02, TUNED),
        # fused is within the noise of the best, but not ahead of addmm by more than that.
        ({ADDMM: 1.1, FUSED: 1.06, ONEPASS: 1.03}, 0.04, ONEPASS),
        ({ADDMM: 2.2, FUSED: 2.15}, 0.03, ADDMM),  # the noise is a share of what it disturbs
    ],
)
def test_the_simplest_of_the_fastest_is_chosen(ratios, noise, winner):
    timings = [Timing(plan, ratio, ratio, ratio) for plan, ratio in ratios.items()]
    assert decide(timings, noise, JOB.names) == winner


def test_the_fastest_in_a_few_rounds_meet_in_the_last_ones():
    fast = [tuned("fused", index=5), tuned("onepass", index=2), tuned("fused", index=3)]
    bench = InventedBench({plan: 0.9 + 0.05 * i for i, plan in enumerate(fast)})
    (outcome,) = tune.run([JOB], bench)
    assert {timing.plan for timing in outcome.timings} == {ADDMM, FUSED, ONEPASS, *fast}
    assert outcome.winner == outcome.best("fused").plan == fast[0]
    assert outcome.best("onepass").plan == fast[1]


def test_plans_can_be_left_out():
    (outcome,) = tune.run([JOB], InventedBench(), plans=("addmm", "fused"))
    assert {timing.plan.name for timing in outcome.timings} == {"addmm", "fused"}


def test_the_time_ends_and_the_next_run_goes_on(table_folder, capsys, monkeypatch):
    jobs = [replace(JOB, M=M) for M in (8192, 2048, 512)]
    per_job = len(JOB.candidates(TARGET))
    bench = InventedBench(hours=1.0)
    monkeypatch.setattr(command.search, "run", lambda *a, **k: tune.run(*a, **k, now=lambda: bench.clock))
    assert run(table_folder, bench, jobs, "--budget", 1.5 * per_job) == 0
    assert [row["M"] for row in rows(table_folder)] == [8192]
    assert "the time is over: 2 calls are not measured" in capsys.readouterr().out
    again = InventedBench()
    assert run(table_folder, again, jobs) == 0
    assert {job.M for job, _ in again.timed} == {2048, 512}
    assert [row["M"] for row in rows(table_folder)] == [512, 2048, 8192]
    assert read_table(table_folder / "test_gpu_7.json")["provenance"] == PROVENANCE
    assert run(table_folder, again, jobs, "--fresh") == 0
    assert {job.M for job, _ in again.timed} == {8192, 2048, 512}


def test_other_versions_measure_again_and_both_are_named(table_folder, capsys):
    other = replace(JOB, M=512)
    assert run(table_folder, InventedBench({FUSED: 1.0}), [JOB, other]) == 0
    newer = PROVENANCE | {"triton": "4.0"}
    assert run(table_folder, InventedBench({ONEPASS: 1.0}), [JOB], provenance=newer) == 0
    assert "was measured with other versions" in capsys.readouterr().out
    table = read_table(table_folder / "test_gpu_7.json")
    assert [(row["M"], row["plan"]) for row in table["rows"]] == [(512, "fused"), (8192, "onepass")]
    assert table["provenance"] == PROVENANCE | {"triton": "3.9; 4.0"}
    assert run(table_folder, InventedBench({ONEPASS: 1.0}), [JOB, other], provenance=newer) == 0
    assert read_table(table_folder / "test_gpu_7.json")["provenance"] == newer


def test_a_lost_device_keeps_what_was_measured(table_folder, capsys):
    last = replace(JOB, M=512)
    bench = InventedBench(refused={(last, FUSED): DeviceLost("fused at 512: illegal address")})
    assert run(table_folder, bench, [JOB, last]) == 1
    assert [row["M"] for row in rows(table_folder)] == [8192]
    assert "the device failed: fused at 512: illegal address" in capsys.readouterr().err


def test_a_new_row_is_one_new_line(table_folder):
    file = PlanFile(table_folder, "Test GPU 7", PROVENANCE)
    jobs = [replace(JOB, direction=d, dropout=p, M=M) for M in (64, 8) for p in (True, False)
            for d in ("backward", "forward")]  # fmt: skip
    for job in jobs:
        file.add(job, TUNED)
    before = file.path.read_text().splitlines()
    file.add(replace(JOB, M=32), Plan("fused", replace(TUNED.gemm, subtiles=1, flatten=True)))
    after = file.path.read_text().splitlines()
    assert len(set(after) - set(before)) == 1
    assert [line for line in after if line in before] == before
    order = [(row["direction"], row["dropout"], row["M"]) for row in rows(table_folder)]
    assert order == sorted(order, key=lambda key: (key[0] == "backward", *key[1:]))
    assert looked_up(M=32).gemm == replace(TUNED.gemm, subtiles=1, flatten=True)
    assert looked_up(M=64) == TUNED


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file(step, table_folder, monkeypatch):
    file = PlanFile(table_folder, "Test GPU 7", PROVENANCE)
    file.add(JOB, FUSED)
    before = file.path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="no space left"):
        file.add(replace(JOB, M=8), FUSED)
    assert file.path.read_bytes() == before
    assert {path.name for path in table_folder.iterdir()} == {"default.json", "test_gpu_7.json"}


def test_a_file_of_another_device_is_not_touched(table_folder):
    PlanFile(table_folder, "test gpu-7", PROVENANCE).add(JOB, FUSED)
    with pytest.raises(
        command.UsageError, match=r"test_gpu_7\.json: device must be 'Test GPU 7', got 'test gpu-7'; --f"
    ):
        run(table_folder, InventedBench(), [JOB])
    (table_folder / "test_gpu_7.json").write_text("{}")
    with pytest.raises(command.UsageError, match=r"test_gpu_7\.json: the file must have device, measured"):
        run(table_folder, InventedBench(), [JOB])


def test_dry_run_shows_the_work_without_a_gpu(capsys):
    arguments = [
        "tune",
        "--dry-run",
        "--target",
        "sm_90",
        "--shapes",
        "4096,14336",
        "--ranks",
        "16",
        "--tokens",
        "8192",
    ]
    assert cli.main([*arguments, "--dropout", "off", "--seconds", "3"]) == 0
    shown = capsys.readouterr().out
    assert "forward r16, bfloat16, no dropout" in shown
    assert "K×N = 4096×14336" in shown
    # 3 steps of (128, 64) and (256, 64), a piece of (128, 128) to store from, 2 bytes each; 64 × 56 tiles on 132 SMs.
    kib = 2 * (3 * (128 + 256) * 64 + 128 * 128) // 1024
    line = next(line for line in shown.splitlines() if "fused 128×256×64 8 warps 3 stages, tma " in line)
    assert line.split()[-3:] == [str(kib), str(64 * 56), f"{64 * 56 / 132:.1f}"]
    count = sum(len(replace(JOB, direction=direction, N=14336).candidates(tuning.target_of_arch(90)))
                for direction in ("forward", "backward"))  # fmt: skip
    assert f"2 calls, {count} measurements, about {count} compilations" in shown
    assert f"about {(count * 3.05 + 2 * 3) / 60:.0f} min of the 60 min of --budget" in shown


def test_default_jobs_cover_what_models_run():
    jobs = make_jobs(options_of())
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 6 * 3 * 8
    assert {job.M for job in jobs} >= {1, 8192, 32768}
    assert jobs[0] == JOB
    per_layer = [job.M for job in jobs if job.group == JOB.group]
    assert per_layer[:3] == [8192, 1, 512]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--target", "h200"], "must be sm_75 or later, such as sm_90, got 'h200'"),
        (["--target", "sm_90"], "--target goes with --dry-run"),
        (["--shapes", "4096"], "must be two whole numbers K,N above 0, got '4096'"),
        (["--budget", "0"], "must be a number of seconds above 0, got 0"),
        (["--plans", "addmm"], "invalid choice: 'addmm'"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, capsys):
    try:
        code = cli.main(["tune", *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "measures on a GPU, through Triton: no GPU"), (["--dry-run"], "--dry-run needs --target (sm_80, sm_90")],
)
def test_no_gpu_is_one_clear_error(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_command_is_kept_without_its_folder():
    arguments = ["tune", "--out", "somewhere", "--ranks", "8", "--out=elsewhere", "--shapes", "64,64"]
    assert command._command_line(arguments) == "lorasp tune --ranks 8 --shapes 64,64"


def test_interpreted():
    run_interpreted("interpret/tune.py", "interpret/tune_tiles.py")


@pytest.mark.gpu
def test_gpu(tmp_path):
    arguments = ["tune", "--shapes", "1024,1024", "--ranks", "16", "--tokens", "512", "8", "--dropout", "on"]
    assert cli.main([*arguments, "--budget", "600", "--seconds", "0.2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    table = read_table(path)
    assert table["device"] == torch.cuda.get_device_name()
    assert len(table["rows"]) == 4
    assert all(table["provenance"][name] for name in ("driver", "cuda", "torch", "triton", "kernels", "command"))
