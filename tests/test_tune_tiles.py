"""python -m lorasp tune --op: the tiles of single kernels, from candidates to the launch that a table decides."""

import json
from dataclasses import replace

import pytest
import torch
from invented_bench import PROVENANCE, TARGET, InventedBench, options_of

pytest.importorskip("triton", reason="triton is not installed")

import triton

from lorasp import cli, tune
from lorasp.triton_kernels import dropkey_attention, launch, tuning
from lorasp.triton_kernels import dropkey_attention_candidates as attention_candidates
from lorasp.triton_kernels import lora_linear_skinny_candidates as rank_candidates
from lorasp.triton_kernels.dropkey_attention_tiles import AttentionConfig, architecture_config, attention_config
from lorasp.triton_kernels.plan_table import read_table
from lorasp.triton_kernels.tuning import Tiles
from lorasp.tune import Rejected, command
from lorasp.tune.jobs.dropkey_attention import AttentionJob
from lorasp.tune.jobs.lora_linear import Job
from lorasp.tune.jobs.lora_linear_skinny import RankJob

BF16 = torch.bfloat16
ATTENTION = AttentionJob("dq", BF16, "listed", True, B=4, H=32, S=4096, head_dim=64)
RANK = RankJob("project", BF16, False, C=4096, R=16, M=8192)
OWN = Tiles()


def run(table_folder, bench, jobs, *arguments):
    return command.tune(jobs, bench, PROVENANCE, options_of("--out", table_folder, *arguments))


def attention_tiles(target=TARGET, dtype=BF16, head_dim=64, kernel="dq", logits="listed", causal=True):
    return attention_config(target, dtype, head_dim, kernel, logits, causal)


def rank_tiles(kernel="project", M=8192, C=4096, R=16, aligned=True, dropout=False):
    return tuning.rank_config(kernel, TARGET, BF16, M, C, R, aligned=aligned, dropout=dropout)


def test_measured_tiles_are_what_launches_run_on(table_folder, capsys):
    best, own = ATTENTION.candidates(TARGET)[2], attention_tiles()
    assert own == architecture_config(TARGET, BF16, 64, "dq", "listed")
    assert run(table_folder, InventedBench({OWN: 1.0, best: 0.9}), [ATTENTION]) == 0
    assert attention_tiles() == attention_tiles(head_dim=20) == replace(own, **dict(best.fields)) != own
    for other in (
        {"head_dim": 65}, {"kernel": "dkv"}, {"logits": "plain"}, {"causal": False}, {"dtype": torch.float16},
        {"target": tuning.target_of_arch(90)},
    ):  # fmt: skip
        call = {"target": TARGET, "dtype": BF16, "head_dim": 64, "kernel": "dq", "logits": "listed"} | other
        causal = call.pop("causal", True)
        assert attention_config(**call, causal=causal) == architecture_config(**call)
    shown = capsys.readouterr().out
    assert "attention 4×32×4096×64, bfloat16, listed, causal" in shown
    assert f"dq       {best}" in shown
    blocks = []
    with launch.record(TARGET) as cases:
        q, k, v, do = (torch.empty(1, 2, 256, 64, dtype=BF16, device="meta") for _ in range(4))
        arguments = None, torch.empty((), dtype=torch.int64, device="meta"), 0.1, "column", True, 1.0
        o, lse = dropkey_attention.forward(q, k, v, *arguments)
        dropkey_attention.backward(do, q, k, v, o, lse, *arguments, True, False, False, False)
    for case in cases:
        if case.kernel.__name__ == "_dropkey_attention_bwd_dq_kernel":
            values = dict(case.constants)
            blocks.append((values["BLOCK_M"], values["BLOCK_N"], case.num_warps, case.num_stages))
    assert blocks == [tuple(value for _, value in best.fields)]


def test_rank_products_keep_the_ranks_block(table_folder):
    """A row serves ranks up to twice its own, where its tiles were run; a block of its rank would leave columns out."""
    best = next(tiles for tiles in RANK.candidates(TARGET) if dict(tiles.fields).get("block_c") == 256)
    before = rank_tiles(R=32)
    assert run(table_folder, InventedBench({OWN: 1.0, best: 0.9}), [RANK]) == 0
    (row,) = read_table(table_folder / "test_gpu_7.json")["lora_linear_skinny"]
    assert row["tiles"] == dict(best.fields)
    assert rank_tiles(R=32) == replace(before, **row["tiles"])
    assert rank_tiles(R=32).block_r == RANK.neighbour(best).R == 32
    assert rank_tiles(M=2048, C=14336) == replace(rank_tiles(M=16, C=14336), **row["tiles"]) != rank_tiles(M=2047)
    for other in ({"aligned": False}, {"dropout": True}, {"kernel": "outer"}, {"R": 33}, {"R": 3}, {"C": 1000}):
        assert rank_tiles(**other) == tuning.architecture_rank_config(
            other.get("kernel", "project"), TARGET, BF16, 8192, other.get("R", 16), aligned=other.get("aligned", True)
        )


def test_own_tiles_stay_unless_others_are_faster_by_more_than_the_noise(table_folder):
    best, other = ATTENTION.candidates(TARGET)[1], replace(ATTENTION, kernel="dkv")
    assert run(table_folder, InventedBench({OWN: 1.0, best: 0.95}, spread=0.1), [ATTENTION]) == 0
    faster = other.candidates(TARGET)[1]
    assert run(table_folder, InventedBench({OWN: 1.0, faster: 0.85}, spread=0.1), [other]) == 0
    rows = read_table(table_folder / "test_gpu_7.json")["dropkey_attention"]
    assert [(row["kernel"], row.get("tiles")) for row in rows] == [("dq", None), ("dkv", dict(faster.fields))]
    assert attention_tiles() == architecture_config(TARGET, BF16, 64, "dq", "listed")


def test_wrong_and_refused_tiles_are_never_timed(table_folder, capsys):
    wrong, refused, right = ATTENTION.candidates(TARGET)[1:4]
    bench = InventedBench(
        {OWN: 1.0, wrong: 0.5, refused: 0.5, right: 0.9},
        refused={wrong: AssertionError("error 3 of dq"), refused: Rejected("OutOfResources: shared memory")},
    )
    assert run(table_folder, bench, [ATTENTION]) == 0
    assert attention_tiles() == replace(architecture_config(TARGET, BF16, 64, "dq", "listed"), **dict(right.fields))
    assert {wrong, refused}.isdisjoint(choice for _, choice in bench.timed)
    shown = capsys.readouterr().out
    assert f"kernel=dq: rejected {wrong}: wrong: error 3 of dq" in shown
    assert f"kernel=dq: rejected {refused}: OutOfResources: shared memory" in shown
    odd = InventedBench({OWN: 1.0, right: 0.9}, refused={(ATTENTION.neighbour(right), right): AssertionError("tail")})
    (outcome,) = tune.run([ATTENTION], odd)
    assert outcome.winner == OWN
    assert run(table_folder, InventedBench(refused={OWN: AssertionError("error 3")}), [ATTENTION], "--fresh") == 1


def test_one_file_holds_plans_and_tiles_and_goes_on_where_it_stopped(table_folder):
    plan = Job("forward", BF16, False, N=4096, K=4096, R=16, M=8192)
    jobs = [plan, ATTENTION, replace(ATTENTION, kernel="forward"), RANK, replace(RANK, kernel="outer")]
    for job in jobs:
        assert run(table_folder, InventedBench(), [job]) == 0
    table = read_table(table_folder / "test_gpu_7.json")
    assert [len(table[name]) for name in ("rows", "dropkey_attention", "lora_linear_skinny")] == [1, 2, 2]
    assert [row["kernel"] for row in table["dropkey_attention"]] == ["forward", "dq"]
    again = InventedBench()
    assert run(table_folder, again, jobs) == 0
    assert again.timed == []
    assert run(table_folder, again, [replace(ATTENTION, head_dim=40)]) == 0
    assert again.timed == []  # the rows of D = 64 speak for it
    assert run(table_folder, again, [replace(ATTENTION, causal=False)]) == 0
    assert {job.causal for job, _ in again.timed} == {False}
    assert run(table_folder, again, [RANK], "--fresh") == 0
    table = read_table(table_folder / "test_gpu_7.json")
    assert [len(table[name]) for name in ("rows", "dropkey_attention", "lora_linear_skinny")] == [1, 3, 1]
    (table_folder / "test_gpu_7.json").write_text("{}")
    assert run(table_folder, again, [RANK], "--fresh") == 0
    assert len(read_table(table_folder / "test_gpu_7.json")["lora_linear_skinny"]) == 1


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120, 130])
def test_candidates_fit_every_architecture(arch):
    target = tuning.target_of_arch(arch)
    for dtype in (BF16, torch.float32):
        for kernel in ("forward", "dq", "dkv"):
            for head_dim in (64, 128, 256):
                for logits in ("plain", "listed", "masked"):
                    call = dtype, head_dim, kernel, logits
                    found = attention_candidates.candidates(target, *call)
                    assert len(found) == len(set(found)) >= 1
                    assert architecture_config(target, *call) not in found
                    for config in (*found, architecture_config(target, *call)):
                        assert attention_candidates.shared_bytes(target, config, *call) <= target.shared_memory
                        if not 100 <= arch < 120:
                            assert attention_candidates.accumulators(config, head_dim, kernel) <= 176
        for kernel in ("project", "outer", "project_outer", "accumulate"):
            for M, R in ((8192, 16), (32, 64), (1, 8)):
                own = tuning.architecture_rank_config(kernel, target, dtype, M, R, aligned=True)
                found = rank_candidates.candidates(target, kernel, dtype, M, R)
                assert len(found) == len(set(found)) >= 1
                assert own not in found
                assert {config.block_r for config in found} == {own.block_r}


@pytest.mark.parametrize(
    ("kernel", "logits", "blocks"), [("forward", "listed", (64, 32, 4, 4)), ("dkv", "plain", (64, 128, 8, 2))]
)
def test_attentions_shared_memory_is_bounded_from_below(kernel, logits, blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = Tiles(tuple(zip(("block_m", "block_n", "num_warps", "num_stages"), blocks, strict=True)))
    with launch.record(TARGET) as cases, tuning.forced_tiles("dropkey_attention", kernel, tiles):
        q, k, v, do = (torch.empty(1, 2, 256, 64, dtype=BF16, device="meta") for _ in range(4))
        p = 0.1 if logits == "listed" else 0.0
        arguments = None, torch.empty((), dtype=torch.int64, device="meta"), p, "column", False, 1.0
        o, lse = dropkey_attention.forward(q, k, v, *arguments)
        dropkey_attention.backward(do, q, k, v, o, lse, *arguments, False, True, True, False)
    least = attention_candidates.shared_bytes(TARGET, AttentionConfig(*blocks), BF16, 64, kernel, logits)
    (case,) = (case for case in cases if kernel.replace("forward", "fwd") in case.kernel.__name__)
    assert least <= case.compile().metadata.shared <= 1.1 * least


def _table(**changes):
    row = {"kernel": "dq", "dtype": "bfloat16", "head_dim": 64, "logits": "listed", "causal": True}
    tiles = {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}
    tiles |= {name: value for name, value in changes.items() if name in tiles}
    row |= {name: value for name, value in changes.items() if name not in tiles}
    return row | {"tiles": tiles}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([_table(kernel="delta")], "dropkey_attention 0: kernel must be one of forward, dq, dkv, got 'delta'"),
        ([_table(), _table(head_dim=80)], "dropkey_attention 1: head_dim must be one of 64, 128, 256, got 80"),
        ([_table(causal=1)], "dropkey_attention 0: causal must be one of False, True, got 1"),
        ([_table(block_m=48)], "dropkey_attention 0: tiles block_m must be a power of two from 16 on, got 48"),
        ([_table(block_n=8)], "dropkey_attention 0: tiles block_n must be a power of two from 16 on, got 8"),
        ([_table(num_warps=3)], "dropkey_attention 0: tiles num_warps must be a power of two from 1 on, got 3"),
        ([_table(num_stages=0)], "dropkey_attention 0: tiles num_stages must be a whole number from 1 on, got 0"),
        ([_table(S=4096)], r"dropkey_attention 0 must have no other fields than .*, got \['S'\]"),
        ([_table() | {"tiles": {"block_m": 64}}], "dropkey_attention 0: tiles must have block_m, block_n, num_warps"),
        ({}, "dropkey_attention must be a list, got {}"),
    ],
)
def test_a_malformed_section_is_named(section, message, tmp_path):
    head = {"device": "Test GPU 7", "measured": True, "provenance": {}, "rows": []}
    head["default"] = {"forward": "addmm", "backward": "addmm"}
    path = tmp_path / "test_gpu_7.json"
    path.write_text(json.dumps(head | {"dropkey_attention": [_table()]}))
    assert read_table(path)["dropkey_attention"] == [_table()]
    path.write_text(json.dumps(head | {"dropkey_attention": section}))
    with pytest.raises(ValueError, match=rf"^test_gpu_7\.json: {message}"):
        read_table(path)


@pytest.mark.parametrize(
    ("op", "arguments", "shown"),
    [
        ("dropkey_attention", ["--sizes", "2,8,1024,64"], "dq D = 64, bfloat16, listed, causal"),
        ("lora_linear_skinny", ["--ranks", "16", "--tokens", "8192", "32"], "project r16 bfloat16, no dropout"),
    ],
)
def test_dry_run_shows_the_work(op, arguments, shown, capsys):
    assert cli.main(["tune", "--op", op, "--dry-run", "--target", "sm_90", *arguments]) == 0
    out = capsys.readouterr().out
    assert shown in out
    assert "shared KiB" in out
    jobs = command.make_jobs(options_of("--op", op, *arguments))
    count = sum(len(job.candidates(tuning.target_of_arch(90))) for job in jobs)
    assert f"{len(jobs)} calls, {count} measurements" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "dropkey_attention", "--ranks", "8"], "--ranks is no option of --op dropkey_attention"),
        (["--op", "lora_linear_skinny", "--plans", "fused"], "--plans is no option of --op lora_linear_skinny"),
        (["--op", "dropkey_attention", "--dropout", "on"], "--dropout is no option of --op dropkey_attention"),
        (["--sizes", "1,2,3,4"], "--sizes is no option of --op lora_linear"),
        (["--op", "dropkey_attention", "--sizes", "1,2,3"], "--sizes must be B,H,S,D with D up to 256, got 1,2,3"),
    ],
)
def test_options_of_another_operator_are_refused(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_prepared_is_tried_one_by_one():
    best = ATTENTION.candidates(TARGET)[1]
    bench = InventedBench({OWN: 1.0, best: 0.5}, refused={(ATTENTION, "prepare"): Rejected("out of memory")})
    (outcome,) = tune.run([ATTENTION], bench)
    assert outcome.winner == best
    assert [choice for job, choice in bench.prepared if job == ATTENTION] == ATTENTION.candidates(TARGET)


class FakeKernel:
    """Notes how it is launched."""

    def __init__(self):
        self.compiled, self.launched = [], []

    def warmup(self, *, grid, **arguments):
        self.compiled.append((grid, arguments))

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.append((grid, arguments))


def test_compiling_runs_nothing():
    kernel, options = FakeKernel(), {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    with launch.compiling():
        launch.launch(kernel, (3,), {"BLOCK_M": 16}, 4, 2)
        assert triton.runtime._async_compile.active_mode.get() is not None
    assert kernel.launched == []
    assert kernel.compiled == [((3,), {"BLOCK_M": 16} | options)]
    launch.launch(kernel, (3,), {"BLOCK_M": 16}, 4, 2)
    assert kernel.launched == kernel.compiled


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "arguments", "count"),
    [
        ("dropkey_attention", ["--sizes", "1,4,512,64"], 18),
        ("lora_linear_skinny", ["--shapes", "1024,1024", "--ranks", "16", "--tokens", "512"], 7),
    ],
)
def test_gpu(op, arguments, count, tmp_path):
    options = [*arguments, "--budget", "500", "--seconds", "0.2", "--out", str(tmp_path)]
    assert cli.main(["tune", "--op", op, *options]) == 0
    (path,) = tmp_path.iterdir()
    assert len(read_table(path)[op]) == count
