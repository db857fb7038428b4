"""python -m lorasp bench --op dropkey_attention as on CUDA: torch's backends, what is left out, the targets."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend

from lorasp import cli
from lorasp.bench import attention, hiddenkey, hiddenkey_report
from lorasp.bench.hiddenkey import Contest, Row
from lorasp.memory import saved_bytes

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SIZES = (1, 2, 48, 16)


def build(causal=False, rates=(0.0, 0.1), sizes=SIZES):
    return attention.entries(sizes, BF16, CPU, rates, causal, backends=True)


@pytest.mark.parametrize("causal", [False, True])
def test_every_backend_is_asked_for_by_name(causal, monkeypatch):
    asked, real = [], attention.sdpa_kernel

    def noted(backend):
        asked.append(backend)
        return real(SDPBackend.MATH)

    monkeypatch.setattr(attention, "sdpa_kernel", noted)
    found, unavailable = build(causal)
    assert [(entry.name, entry.rate) for entry in found] == [
        (attention.FLASH, None), (attention.CUDNN, None), (attention.FLASH_DROPOUT, 0.1), ("lorasp column", 0.0),
        ("lorasp column", 0.1), ("lorasp element", 0.1), (attention.MASK, 0.1), (attention.EAGER, 0.1),
    ]  # fmt: skip
    assert unavailable == {}
    assert asked == [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    flash, cudnn, dropout = (entry.forward() for entry in found[:3])
    assert torch.equal(flash, cudnn)
    assert not torch.equal(flash, dropout)
    assert torch.equal(flash[:, :, -1], build(not causal)[0][0].forward()[:, :, -1])  # the last query sees every key
    assert not torch.equal(flash[:, :, 0], build(not causal)[0][0].forward()[:, :, 0])


def test_a_backend_that_refuses_is_reported():
    """On a CPU torch has no cuDNN, and its FlashAttention no dropout."""
    found, unavailable = build()
    assert [entry.name for entry in found][:2] == [attention.FLASH, "lorasp column"]
    assert unavailable[attention.CUDNN].startswith("No viable backend for scaled_dot_product_attention")
    assert unavailable[attention.FLASH_DROPOUT] == (
        "No available kernel.  Aborting execution. Flash attention kernel not used because: "
        "Both fused kernels do not support non-zero dropout."
    )


def test_without_flash_the_base_is_what_torch_chooses(monkeypatch):
    def none(backend):
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setattr(attention, "sdpa_kernel", none)
    found, unavailable = build()
    assert found[0].name == attention.DEFAULT
    assert unavailable == dict.fromkeys((attention.FLASH, attention.CUDNN, attention.FLASH_DROPOUT), "no such kernel")


@pytest.mark.parametrize(("bytes_per_logit", "left_out"), [(14, []), (13, ["EAGER"]), (5, ["MASK", "EAGER"])])
def test_what_does_not_fit_is_left_out(bytes_per_logit, left_out, monkeypatch):
    monkeypatch.setattr(attention, "free_bytes", lambda device: 2 * 48 * 48 * bytes_per_logit)
    found, unavailable = build(rates=(0.1, 0.3))
    missing = {getattr(attention, name) for name in left_out}
    assert missing == {name for name in (attention.MASK, attention.EAGER) if name in unavailable}
    assert missing.isdisjoint(entry.name for entry in found)
    assert all(unavailable[name].startswith("tensors of 1×2×48×48 logits take 0 GiB") for name in missing)


def test_memory_that_torchs_allocator_keeps_free_counts_as_free(monkeypatch):
    kept = [3]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 - sum(kept), 10))
    assert attention.free_bytes(CPU) is None
    assert kept == [3]
    assert attention.free_bytes(torch.device("cuda")) == 10


def test_what_the_device_has_no_memory_for_after_all_is_left_out(monkeypatch):
    def refusal(entry):
        return "CUDA out of memory." if entry.name == attention.EAGER else None

    monkeypatch.setattr(attention, "refusal", refusal)
    found, unavailable = build()
    assert unavailable == {attention.EAGER: "CUDA out of memory."}
    assert attention.EAGER not in [entry.name for entry in found]


def test_default_shapes_are_those_of_the_device():
    cuda = hiddenkey._calls("dropkey_attention", None, torch.device("cuda"), False)
    assert len(cuda) == len(set(cuda)) == 2 * 4 * 2
    assert {(s, d) for (_, _, s, d), _ in cuda} == {(s, d) for s in (2048, 4096, 8192, 16384) for d in (64, 128)}
    assert all(b * s == 16384 and h * d == 2048 for (b, h, s, d), _ in cuda)
    assert {causal for _, causal in hiddenkey._calls("dropkey_attention", None, torch.device("cuda"), True)} == {True}
    assert hiddenkey._calls("dropkey_attention", [SIZES], torch.device("cuda"), True) == [(SIZES, True)]
    assert hiddenkey._calls("dropkey_attention", None, CPU, False) == [(s, False) for s in attention.CPU_SHAPES]


def row(name, rate, ratio):
    return Row("dropkey_attention", SIZES, "bfloat16", False, name, rate, 5, 1.0, ratio, ratio, ratio, 0)


def test_targets_stand_beside_what_they_are_for(capsys):
    rows = [
        row(attention.FLASH, None, 1.0), row(attention.FLASH_DROPOUT, 0.1, 1.25), row("lorasp column", 0.0, 0.9),
        row("lorasp column", 0.1, 1.01), row("lorasp element", 0.1, 2.0),
    ]  # fmt: skip
    contest = Contest("dropkey_attention", SIZES, BF16, False, rows, {attention.CUDNN: "no cuDNN here"})
    hiddenkey_report.print_contest(contest)
    shown = capsys.readouterr().out
    assert "lorasp column p = 0.1: forward + backward over flash without drop: 1.0100 (target 1: MISSED)" in shown
    assert "lorasp column p = 0.1: over flash with dropout 0.1: 0.8080 (target 0.8: MISSED)" in shown
    assert "not measured: SDPA cuDNN, no drop: no cuDNN here" in shown
    faster = [dataclasses.replace(one, ratio=0.99 * one.ratio * (one.name[0] == "l") or one.ratio) for one in rows]
    assert [target.value <= target.bound for target in attention.targets(faster)] == [True, True]
    assert attention.targets([row(attention.DEFAULT, None, 1.0), *rows[1:]]) == []
    assert attention.targets(rows[:3]) == []


def test_a_run_on_a_cpu_is_what_it_was(tmp_path, capsys):
    arguments = ["bench", "--op", "dropkey_attention", "--sizes", "1,2,48,16", "--rates", "0.1", "--rounds", "1"]
    assert cli.main([*arguments, "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "SDPA, no drop" in shown
    assert not any(word in shown for word in ("flash", "cuDNN", "target", "not measured"))


def test_a_plot_of_many_shapes_has_a_panel_for_each(tmp_path):
    pytest.importorskip("matplotlib")
    contest = Contest("dropkey_attention", SIZES, BF16, True, [row("lorasp column", p, 1 - p) for p in (0.0, 0.1)])
    path = tmp_path / "plot.png"
    hiddenkey_report.plot(path, [contest] * 5, "a machine", {"torch": "2", "lorasp": "1", "commit": ""})
    assert path.stat().st_size > 0


def test_saved_bytes_are_those_of_the_backend():
    """lse beside q, k, v and o: nothing of the size of the logits."""
    found, _ = build()
    assert saved_bytes(found[0].forward) < 5 * 2 * 48 * 16 * 2


@pytest.mark.gpu
def test_gpu(tmp_path, capsys):
    arguments = ["bench", "--op", "dropkey_attention", "--sizes", "1,4,1024,64", "--rates", "0", "0.1"]
    assert cli.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert attention.FLASH in shown
    assert "target 0.8" in shown
