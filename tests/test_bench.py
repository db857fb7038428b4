"""The measuring harness: what it counts, how it divides, that it refuses wrong kernels, what it writes."""

import csv
import dataclasses
import re
import resource
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorasp import bench, cli, console
from lorasp.bench import MODES, Provider, Shape, command, composition, report, targets, timing, workloads
from lorasp.ops import dropkey_attention as attention_ops
from lorasp.ops import lora_linear, registry

SHAPE = Shape(24, 40, 56, 4)
CPU = torch.device("cpu")


def providers(*names):
    return [Provider.parse(name) for name in names]


def options_of(*arguments):
    return cli.parser().parse_args(["bench", *arguments])


@pytest.mark.parametrize(
    "text",
    [
        "linear", "linear-train", "peft", "peft+fa", "peft-half", "peft-half-compile", "aten+fa", "lorasp",
        "lorasp:cpp", "lorasp:triton:onepass+fa", "lorasp:auto:fused", "lorasp+fa+sp+shared+masters+prepack",
    ],
)  # fmt: skip
def test_a_provider_reads_as_it_is_written(text):
    assert Provider.parse(text).name == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch", "kind must be one of linear, linear-train, peft"),
        ("peft:cpp", "only lorasp takes :backend:plan, got 'peft:cpp'"),
        ("lorasp:cpp:addmm:x", "only lorasp takes :backend:plan"),
        ("linear+fa", r"flags of linear are none, got 'linear\+fa'"),
        ("peft+prepack", r"flags of peft are fa, got 'peft\+prepack'"),
    ],
)
def test_a_provider_that_does_not_exist_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Provider.parse(text)


def test_a_shape_has_positive_sizes():
    with pytest.raises(ValueError, match="must be >= 1, got 8, 0, 8, 4, 1"):
        Shape(8, 0, 8, 4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["linear", "linear-train", "peft-half", "peft-half+fa"])
def test_flops_are_those_of_the_matrix_products(name, mode):
    provider = Provider.parse(name)
    candidate = workloads.build(provider, workloads.make_workload(SHAPE, torch.float32, CPU))
    with FlopCounterMode(display=False) as counter:
        y = candidate.forward()
        if mode == "forward+backward":
            torch.autograd.backward(y, candidate.workload.dys)
    assert counter.get_total_flops() == bench.flops(SHAPE, provider, mode)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        # Every operand once: (M, K), (N, K), (M, N) frozen; (R, K), (N, R), (M, R) low-rank.
        ("linear", 24 * 40 + 56 * 40 + 24 * 56, 24 * 56 + 56 * 40 + 24 * 40),
        ("lorasp+fa", 4 * 40 + 56 * 4 + 24 * 4, 4 * 40 + 56 * 4 + 24 * 4 + 56 * 4),
        ("lorasp", 4 * 40 + 56 * 4 + 24 * 4, 4 * 40 + 56 * 4 + 24 * 4 + 56 * 4 + 24 * 40 + 4 * 40),
    ],
)
def test_min_bytes_counts_every_operand_once(name, forward, backward):
    provider = Provider.parse(name)
    if provider.adapts:
        frozen = [bench.min_bytes(SHAPE, Provider("linear"), mode, 1) for mode in MODES]
    else:
        frozen = [0, 0]
    assert bench.min_bytes(SHAPE, provider, "forward", 2) == 2 * (frozen[1] + forward)
    assert bench.min_bytes(SHAPE, provider, "forward+backward", 2) == 2 * (frozen[0] + forward + backward)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("freeze_A", [False, True])
def test_the_composition_s_gradients_are_those_of_its_forward(p, freeze_A):
    """With dropout too, where bench.run compares no layer but lorasp's: others draw masks of their own."""
    x, weight, lora_A, lora_B = (torch.randn(*size, dtype=torch.float64) for size in ((7, 5), (6, 5), (3, 5), (6, 3)))
    frozen = torch.nn.Linear(5, 6, dtype=torch.float64).requires_grad_(False)
    frozen.weight.copy_(weight)
    layer = composition.ComposedLoRA(frozen, lora_A, lora_B, 1.5, p)
    layer.lora_A.requires_grad_(not freeze_A)

    def same_masks(x, *factors):
        torch.manual_seed(0)
        return layer(x)

    trained = [factor for factor in (layer.lora_A, layer.lora_B) if factor.requires_grad]
    assert torch.autograd.gradcheck(same_masks, (x.requires_grad_(), *trained))


class FakeClock:
    """Charges each function its price times the machine's slowness, which grows with every sample."""

    def __init__(self, prices, drift=0.0):
        self.prices, self.drift, self.samples, self.order = prices, drift, 0, []

    def __call__(self, function, calls):
        self.order.append((function, calls))
        self.samples += 1
        return self.prices[function] * (1 + self.drift * self.samples)


def test_the_base_runs_before_and_after_every_provider():
    clock = FakeClock({"base": 1.0, "a": 2.0, "b": 3.0})
    samples = timing.interleave("base", ["a", "b"], clock, rounds=2)
    warm_up = 2 * 3
    assert [function for function, _ in clock.order[warm_up:]] == ["base", *["a", "base", "b", "base"] * 2]
    assert samples == [[(2.0, 2.0)] * 2, [(3.0, 3.0)] * 2]


def test_a_machine_that_slows_down_steadily_does_not_move_the_ratio():
    clock = FakeClock({"base": 1.0, "a": 1.25}, drift=0.01)
    (samples,) = timing.interleave("base", ["a"], clock, rounds=9)
    assert [ratio for _, ratio in samples] == pytest.approx([1.25] * 9)
    assert samples[-1][0] > samples[0][0]


@pytest.mark.parametrize(
    ("price", "seconds", "rounds"), [(1.0, 20.0, 10), (1.0, 2.0, 5), (0.01, 20.0, 41)], ids=["fits", "least", "most"]
)
def test_rounds_fill_the_time_budget(price, seconds, rounds):
    (samples,) = timing.interleave("base", ["a"], FakeClock({"base": price, "a": price}), seconds=seconds)
    assert len(samples) == rounds


def test_a_short_function_is_repeated_within_a_sample():
    clock = FakeClock({"base": 1e-3, "a": 1e-5})
    timing.interleave("base", ["a"], clock, rounds=1)
    assert clock.order[-3:] == [("base", 4), ("a", 400), ("base", 4)]


def test_quartiles():
    assert timing.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    assert timing.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_a_ratio_to_peft_is_one_within_a_round():
    sample, peft = [(1e-3, 1.0), (2e-3, 2.0), (6e-3, 3.0)], [(9.0, 4.0), (9.0, 1.0), (9.0, 2.0)]
    found = {"ms_q1": 1.5, "ms": 2.0, "ms_q3": 4.0, "ratio_q1": 1.5, "ratio": 2.0, "ratio_q3": 2.5}
    assert timing.spread(sample) == found
    assert timing.spread(sample, peft) == found | {"to_peft_q1": 0.875, "to_peft": 1.5, "to_peft_q3": 1.75}


@pytest.mark.parametrize(
    ("dtype", "dropout_p", "members"),
    [(torch.float32, 0.0, 1), (torch.bfloat16, 0.25, 1), (torch.bfloat16, 0.0, 3), (torch.float32, 0.25, 2)],
)
def test_every_provider_is_measured_and_keeps_what_the_contract_says(dtype, dropout_p, members):
    names = ["linear", "linear-train", "peft", "peft-half", "peft-half+fa", "aten", "aten+fa", "lorasp", "lorasp+fa"]
    names += ["lorasp+masters", "lorasp:reference", "lorasp:reference+fa"]
    shape = dataclasses.replace(SHAPE, bias=True, members=members)
    names += ["lorasp+sp", "lorasp+fa+sp"] + ["lorasp+shared", "lorasp+sp+shared", "lorasp+fa+shared"] * (members > 1)
    (result,) = bench.run([shape], providers(*names), dtype=dtype, dropout_p=dropout_p, rounds=1)
    assert result.unavailable == {}
    assert [(m.provider.name, m.mode) for m in result.measurements] == [(n, mode) for mode in MODES for n in names]
    for m in result.measurements:
        assert m.rounds == 1
        assert 0 < m.ms_q1 <= m.ms <= m.ms_q3
        assert 0 < m.ratio_q1 <= m.ratio <= m.ratio_q3
        assert m.peak_bytes is None
        if not m.provider.own_masks or (m.provider.kind == "aten" and not dropout_p):
            assert m.saved_bytes == bench.contract_bytes(shape, m.provider, dtype.itemsize, dropout_p), m.provider.name


def test_a_provider_that_cannot_run_here_is_listed_with_the_reason(monkeypatch):
    monkeypatch.setattr(registry, "_triton_interpreted", False)
    (result,) = bench.run([SHAPE], providers("lorasp:triton"), dtype=torch.float32, rounds=1)
    (reason,) = result.unavailable.values()
    assert reason == registry.unsupported("triton", "cpu", torch.float32)
    assert {m.provider.name for m in result.measurements} == {"linear"}


@pytest.mark.parametrize("name", ["lorasp", "peft-half"])
@pytest.mark.parametrize("broken", ["y0", "dx", "dlora_A0", "dlora_B0"])
def test_a_wrong_result_is_never_timed(name, broken):
    workload = workloads.make_workload(SHAPE, torch.float32, CPU)
    candidate = workloads.build(Provider.parse(name), workload)
    workloads.verify(candidate)
    if broken == "y0":
        right = candidate.forward
        candidate.forward = lambda: [y + 0.01 for y in right()]
    else:
        dict(zip(candidate.names, candidate.inputs, strict=True))[broken].register_hook(lambda grad: grad * 1.01)
    with pytest.raises(AssertionError, match=f"{name} {broken} at 24×40×56 r4: error"):
        workloads.verify(candidate)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_pinned_malloc_stops_page_faults_of_large_temporaries():
    program = """
import resource, sys, torch
from lorasp import bench
print(bench.pin_malloc(), file=sys.stderr)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pages = 48 * 2**20 // resource.getpagesize()
    assert "pinned for every variant" in done.stderr
    assert int(done.stdout) < pages // 100


def test_bench_writes_a_table_a_csv_and_a_plot(tmp_path, capsys):
    arguments = ["bench", "--mknr", "16,32,48,4", "8,32,32,2", "--providers", "peft-half", "lorasp", "lorasp+fa"]
    arguments += ["--rounds", "2", "--dropout", "0.1", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "16×32×48 r4" in shown
    assert "malloc thresholds" in shown
    (table,) = (tmp_path / "new").glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 2 * 4 * len(MODES)
    assert {row["provider"] for row in rows} == {"linear", "peft-half", "lorasp", "lorasp+fa"}
    first = rows[0]
    assert (first["M"], first["K"], first["N"], first["R"], first["dropout_p"]) == ("16", "32", "48", "4", "0.1")
    for column in ("device", "torch", "lorasp", "commit", "peft", "ratio_q1", "saved_bytes", "flops", "min_bytes"):
        assert column in first
    assert first["torch"] == torch.__version__
    (picture,) = (tmp_path / "new").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert max(len(line.rstrip()) for line in shown.split("wrote")[0].splitlines()) <= console.WIDTH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "gpt"], "--shapes must be among llama3-8b, roberta-large"),
        (["--providers", "triton"], "kind must be one of"),
        (["--dropout", "1"], r"--dropout must be in \[0, 1\), got 1"),
    ],
)
def test_bench_names_what_it_cannot_do(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_unavailable_provider_asked_for_by_name_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_triton_interpreted", False)
    arguments = ["--mknr", "8,16,16,2", "--rounds", "1", "--providers", "lorasp:triton", "--dtype", "fp32"]
    assert cli.main(["bench", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "not measured: lorasp:triton: triton takes cpu tensors only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--providers", "lorasp", "peft", "linear"], ["lorasp", "peft", "linear"]),
        (["--providers", "lorasp", "peft", "linear", "--freeze-A"], ["lorasp+fa", "peft+fa", "linear"]),
        (["--providers", "lorasp+fa", "peft", "--prepack"], ["lorasp+fa+prepack", "peft"]),
        (["--providers", "lorasp+fa", "lorasp", "--freeze-A"], ["lorasp+fa"]),
        (["--freeze-A", "--prepack"], [
            "linear", "linear-train", "peft+fa", "peft-half+fa", "peft-half-compile+fa", "aten+fa", "lorasp+fa",
            "lorasp+fa+prepack", "lorasp:reference+fa",
        ]),
    ],
)  # fmt: skip
def test_freeze_A_and_prepack_apply_to_every_adapter(arguments, expected):
    assert [provider.name for provider in command.choose_providers(options_of(*arguments), CPU)] == expected


def test_a_wrong_provider_stops_the_benchmark(tmp_path, capsys, monkeypatch):
    forward, backward = lora_linear.forward_ops["reference"], lora_linear.backward_ops["reference"]
    monkeypatch.setitem(lora_linear.forward_ops, "cpp", lambda *a: [2 * t for t in forward(*a[:-2], "auto", None)])
    monkeypatch.setitem(lora_linear.backward_ops, "cpp", lambda *a: backward(*a[:-2], "auto", None))
    monkeypatch.setattr(registry, "_cpp_missing", None)
    arguments = ["--mknr", "8,16,16,2", "--rounds", "1", "--providers", "lorasp:cpp", "--dtype", "fp32"]
    assert cli.main(["bench", *arguments, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "wrong result, nothing is timed: lorasp:cpp y0 at 8×16×16 r2: error" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_named_sets_take_the_models_sizes():
    sizes = {shape.name: (shape.K, shape.N) for shape in bench.SHAPES["llama3-8b"]}
    assert sizes == {"q_o": (4096, 4096), "k_v": (4096, 1024), "gate_up": (4096, 14336), "down": (14336, 4096)}
    assert {shape.M for shape in bench.with_tokens(bench.SHAPES["llama3-8b"], 7)} == {7}


def test_a_layer_that_two_sets_name_is_measured_once():
    shapes = command.choose_shapes(options_of("--shapes", "llama3-8b", "square-large"), torch.device("cuda"))
    assert [(shape.name, shape.K, shape.N, shape.R) for shape in shapes] == [
        ("q_o", 4096, 4096, 16), ("k_v", 4096, 1024, 16), ("gate_up", 4096, 14336, 16), ("down", 14336, 4096, 16),
        ("", 4096, 4096, 64), ("", 8192, 8192, 16),
    ]  # fmt: skip
    biased = dataclasses.replace(SHAPE, bias=True)
    assert bench.distinct([SHAPE, biased, dataclasses.replace(SHAPE, name="again")]) == [SHAPE, biased]


def test_a_file_name_says_sets_device_dtype_and_dropout():
    stem = report.stem(["square", "own"], "Intel(R) Xeon(R) @ 2.30GHz (2 threads)", "bfloat16", 0.1)
    assert stem.startswith("lora_linear-square-own-intel-xeon-2-30ghz-2-threads-bfloat16-dropout0.1-")


def test_the_plot_takes_results_with_missing_providers(tmp_path):
    results = list(bench.run([SHAPE, Shape(8, 16, 16, 2)], providers("lorasp"), dtype=torch.float32, rounds=1))
    results[1].measurements = [m for m in results[1].measurements if m.provider.kind == "linear"]
    results[0].measurements = [dataclasses.replace(m, ratio_q3=m.ratio) for m in results[0].measurements]
    report.plot(tmp_path / "plot.png", results, "a machine", "float32")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("op", "sizes", "more", "base"),
    [
        ("dropkey_attention", "1,2,48,16", ["--rates", "0", "0.3"], "SDPA, no drop"),
        ("hidden_cut", "2,8,16", [], "nn.Dropout + residual"),
        ("consistency", "6,40", [], "PyTorch formula"),
    ],
)
def test_hiddenkeys_operators_are_checked_and_timed(op, sizes, more, base, tmp_path, capsys):
    arguments = ["bench", "--op", op, "--sizes", sizes, *more, "--rounds", "1", "--dtype", "fp32"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert base in shown
    (table,) = tmp_path.glob("*.csv")
    rows = list(csv.DictReader(table.open()))
    assert {row["op"] for row in rows} == {op}
    assert all(float(row["ms"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert [path.suffix for path in tmp_path.glob("*.png")] == [".png"] * (op == "dropkey_attention")


def test_a_wrong_attention_is_never_timed(tmp_path, capsys, monkeypatch):
    right = attention_ops.forward_ops["reference"]
    monkeypatch.setitem(attention_ops.forward_ops, "cpp", lambda *a: (right(*a)[0] * 1.01, right(*a)[1]))
    monkeypatch.setitem(attention_ops.backward_ops, "cpp", attention_ops.backward_ops["reference"])
    monkeypatch.setattr(registry, "_cpp_missing", None)
    arguments = ["bench", "--op", "dropkey_attention", "--sizes", "1,2,48,16", "--rounds", "1", "--dtype", "fp32"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "wrong result, nothing is timed: dropkey_attention o [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "1,2,3"], "--sizes of dropkey_attention must be B,H,S,D, got 1,2,3"),
        (["--rates", "1.0"], "--rates must be in"),
    ],
)
def test_sizes_and_rates_that_do_not_fit(arguments, message, capsys):
    assert cli.main(["bench", "--op", "dropkey_attention", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_targets_stand_beside_the_gpu_figures_they_are_for():
    (result,) = bench.run([SHAPE], providers("peft-half", "lorasp", "lorasp+fa"), dtype=torch.bfloat16, rounds=1)
    shape, ratios = Shape(8192, 4096, 4096, 16), {"linear": 1.0, "peft-half": 1.13, "lorasp": 1.1, "lorasp+fa": 1.1}
    rows = [
        dataclasses.replace(m, shape=shape, ratio=ratios[m.provider.name])
        for m in result.measurements
        if m.mode == "forward+backward"
    ]
    cuda = torch.device("cuda")
    found = [
        (target.name, round(target.value, 3), target.bound, target.met) for target in targets.of_linear(rows, cuda)
    ]
    assert found == [("lorasp+fa", 1.1, 1.09, False), ("lorasp", 1.1, 1.12, True), ("lorasp", 0.973, 1.02, True)]
    assert targets.of_linear(rows, CPU) == []
    dropped = [dataclasses.replace(m, dropout_p=0.1) for m in rows]
    assert [target.bound for target in targets.of_linear(dropped, cuda)] == [1.17, 1.02]
