"""python -m lorasp: what each command prints and returns, on a complete machine and on a bare one."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorasp import cli, console, demo
from lorasp.bench import command, hiddenkey_report, model_memory_report, models_report
from lorasp.ops import lora_linear, registry


def run_without(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """`python -m lorasp …` in a process where the blocked modules cannot be imported."""
    program = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "from lorasp import cli\n"
        f"sys.exit(cli.main({list(arguments)!r}))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("blocked", "lines"),
    [
        ([], ["auto on cpu"]),
        (["triton"], ["triton        triton is not installed"]),
        (["lorasp._C"], ["cpp           not built", "auto on cpu   reference"]),
        (["triton", "lorasp._C", "rich", "matplotlib", "transformers", "peft"], ["reference     runs here"]),
    ],
    ids=["complete", "no triton", "no extension", "torch alone"],
)
def test_info_works_on_any_machine(blocked, lines):
    done = run_without(blocked, "info")
    assert done.returncode == 0, done.stderr
    for line in [
        "lorasp        ",
        f"torch         {torch.__version__}",
        "model ",
        "plans of the triton backend",
        *lines,
    ]:
        assert line in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize("module", ["rich", "matplotlib", "transformers", "peft"])
def test_demo_names_the_extra_it_needs(module, tmp_path):
    done = run_without([module], "demo", "--out", str(tmp_path))
    assert done.returncode == 2
    assert f"lorasp demo: needs {module}" in done.stderr
    assert 'pip install "lorasp[demo]"' in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bench_without_its_extra_says_what_is_missing(tmp_path):
    arguments = ["bench", "--mknr", "8,16,16,2", "--rounds", "1", "--dtype", "fp32", "--device", "cpu"]
    done = run_without(["rich", "matplotlib", "peft"], *arguments, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert 'not measured: peft: peft is not installed: pip install "lorasp[bench]"' in done.stdout
    assert "no plot: " in done.stdout
    assert [path.suffix for path in tmp_path.iterdir()] == [".csv"]
    assert "provider" in done.stdout


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "lorasp", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "{info,demo,bench,tune,check}" in done.stdout


CHECK = ["check", "--op", "lora_linear", "--shapes", "5,24,40,3", "--device", "cpu"]


def test_check_passes_where_the_backend_is_right(capsys):
    assert cli.main([*CHECK, "--backend", "reference", "auto"]) == 0
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    assert "comparisons within the bound" in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 100


def test_check_takes_every_backend_that_runs_here(capsys):
    assert cli.main([*CHECK, "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    for name, reason in registry.available_backends().items():
        assert (f" {name} " in shown) == (reason is None)


@pytest.mark.parametrize(
    ("op", "result", "tensor"), [("forward_ops", 0, "y"), ("backward_ops", 0, "dx"), ("backward_ops", 2, "dlora_B")]
)
def test_check_catches_a_broken_backend(op, result, tensor, capsys, monkeypatch):
    def stand_in(right, wrong):
        def call(*arguments):
            results = list(right(*arguments[:-2], "auto", None))  # without plan and packed weight
            if wrong:
                results[result] = results[result] * 1.5
            return tuple(results)

        return call

    for name in ("forward_ops", "backward_ops"):
        table = getattr(lora_linear, name)
        monkeypatch.setitem(table, "cpp", stand_in(table["reference"], name == op))
    monkeypatch.setattr(registry, "_cpp_missing", None)
    assert cli.main([*CHECK, "--backend", "cpp", "--dtype", "fp32"]) == 1
    shown = capsys.readouterr().out
    assert f"FAILED lora_linear cpp:addmm {tensor} [5x24x40 r3 float32 bias]: error" in shown
    assert {line.split()[3] for line in shown.splitlines() if line.startswith("FAILED")} == {tensor}


def test_check_as_json(capsys):
    assert cli.main([*CHECK, "--backend", "reference", "--dtype", "fp32", "bf16", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {result["tensor"] for result in results} == {"y", "dx", "dlora_A", "dlora_B"}
    assert all(result["ok"] and 0 <= result["error"] <= result["bound"] for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required"),
        (["bench", "--mknr", "3,4"], "must be four whole numbers M,K,N,R above 0, got '3,4'"),
        (["check", "--shapes", "3,4,5,6,7"], "--shapes must be M,K,N,R or B,H,"),
        (["check", "--op", "lora_linear", "--shapes", "3"], "--shapes of lora_linear must be M,K,N,R"),
        (["check", "--op", "lora"], "--op must be among lora_linear, "),
        (["check", "--shapes", "3,4,5,0"], "must be whole numbers above 0 with commas between, got '3,4,5,0'"),
        (["check", "--dtype", "int8"], "must be fp32, bf16 or fp16, got 'int8'"),
        (["check", "--device", "tpu"], "argument --device"),
        (["check", "--device", "cuda:99"], "cuda:99: torch sees"),
        (["check", "--backend", "magic"], "--backend must be among auto, reference, cpp, triton, cuda, got 'magic'"),
        (["check", "--backend", "cuda"], "lorasp check: backend cuda: not built"),
        (["demo", "--steps", "0"], "must be at least 1, got 0"),
        (["demo", "--size", "tiny", "--out", "/dev/null/x"], "--out /dev/null/x: "),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err


LAYER, ATTENTION, WHOLE = "--op lora_linear", "--op dropkey_attention", "--model"


@pytest.mark.parametrize(
    ("arguments", "flag", "mode", "takers"),
    [
        (["--op", "hidden_cut", "--rates", "0.3"], "--rates", "--op hidden_cut", ATTENTION),
        (["--op", "consistency", "--causal"], "--causal", "--op consistency", ATTENTION),
        (["--op", "dropkey_attention", "--dropout", "0.3"], "--dropout", ATTENTION, f"{LAYER} or {WHOLE}"),
        (["--op", "dropkey_attention", "--members", "3"], "--members", ATTENTION, LAYER),
        (["--op", "hidden_cut", "--freeze-A"], "--freeze-A", "--op hidden_cut", LAYER),
        (["--causal"], "--causal", LAYER, ATTENTION),
        (["--op", "lora_linear", "--sizes", "2,3"], "--sizes", LAYER,
         "--op dropkey_attention or --op hidden_cut or --op consistency"),
        (["--child", "lorasp"], "--child", LAYER, WHOLE),
        (["--model", "toy-llama", "--providers", "peft"], "--providers", WHOLE, LAYER),
        (["--model", "toy-llama", "--tokens", "8"], "--tokens", WHOLE, LAYER),
        (["--model", "llama-7b", "--rates", "0.1"], "--rates", WHOLE, ATTENTION),
    ],
)  # fmt: skip
def test_bench_refuses_options_of_another_mode(arguments, flag, mode, takers, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert f"lorasp bench: {flag} is no option of {mode}: {flag} needs {takers}\n" == capsys.readouterr().err


def test_bench_takes_an_operator_or_a_model(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--model", "toy-llama", "--op", "lora_linear"])
    assert "argument --op: not allowed with argument --model" in capsys.readouterr().err


def documented_commands() -> list[str]:
    """`bench` and `tune` as Makefile and the two READMEs call them."""
    root = Path(__file__).resolve().parents[1]
    makefile, *texts = ((root / name).read_text() for name in ("Makefile", "README.md", "benchmarks/README.md"))
    found = re.findall(r"-m lorasp ((?:bench|tune) .*)", makefile.replace("$(OUT)", "out"))
    for text in texts:
        found += re.findall(r"^python -m lorasp ((?:bench|tune)[^#\n]*)", text, re.MULTILINE)
        found += re.findall(r"`python -m lorasp ((?:bench|tune)[^`…]*)`", text)
    return sorted({" ".join(one.split()) for one in found if "--help" not in one})


@pytest.mark.parametrize("documented", documented_commands())
def test_what_is_documented_is_accepted(documented, monkeypatch, capsys):
    def chosen(options):
        device = torch.device("cpu")
        return 0 if command.choose_shapes(options, device) and command.choose_providers(options, device) else 1

    monkeypatch.setattr(command, "run", chosen)
    for other in (hiddenkey_report, models_report, model_memory_report):
        monkeypatch.setattr(other, "run", lambda options: 0)
    arguments = documented.replace("--device cuda", "--device cpu").split()
    if arguments[0] == "tune":
        pytest.importorskip("triton")
    assert cli.main([*arguments, *["--dry-run", "--target", "sm_90"] * (arguments[0] == "tune")]) == 0


def test_demo_prints_a_table_and_draws_a_picture(tmp_path, capsys):
    assert cli.main(["demo", "--size", "tiny", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in (
        "full fine-tuning",
        "PEFT LoRA",
        "lorasp LoRA",
        "lorasp LoRA-FA",
        "lorasp HiddenKey",
        "In this run",
        "lorasp-demo.png",
    ):
        assert name in shown
    assert (tmp_path / "lorasp-demo.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line.rstrip()) for line in shown.split("wrote")[0].splitlines()) <= 100


def test_demo_measures_the_same_model_six_ways():
    def measure():
        device, size = torch.device("cpu"), demo.SIZES["tiny"]
        base = demo.make_model(size, torch.float32, device, seed=1)
        methods = demo.make_methods(base, size)
        list(demo.adapt(methods, demo.source(), size, 2, device, seed=1))
        return methods

    first, again = measure(), measure()
    assert [m.held_out for m in first] == [m.held_out for m in again]
    full, peft, lora, fa, sp, hiddenkey = first
    before = {m.held_out[0][1] for m in first}
    assert len(before) == 1
    assert all(math.isfinite(m.held_out[-1][1]) for m in first)
    assert peft.trainable == lora.trainable > fa.trainable
    assert full.trainable == sum(p.numel() for p in full.model.parameters())
    assert peft.optimizer_bytes == lora.optimizer_bytes == 2 * 4 * lora.trainable
    assert fa.saved < lora.saved <= peft.saved
    assert sp.trainable == lora.trainable / 2
    assert sp.optimizer_bytes == lora.optimizer_bytes / 2
    assert fa.saved < sp.saved < lora.saved
    assert hiddenkey.trainable == lora.trainable
    assert hiddenkey.held_out[-1] != lora.held_out[-1]
    # The same function, trained alike: closer to PEFT than freezing A is.
    assert abs(lora.held_out[-1][1] - peft.held_out[-1][1]) < abs(fa.held_out[-1][1] - peft.held_out[-1][1])


def test_progress_is_one_line_that_a_terminal_can_replace(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    console.progress("a" * 50)
    assert capsys.readouterr().err == "\r\033[K" + "a" * 19
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    console.progress("a")
    assert capsys.readouterr().err == ""
