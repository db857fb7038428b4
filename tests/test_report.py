"""benchmarks/report.py: README's figures are those of benchmarks/results; a GPU's come first once they are there."""

import csv
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, README = ROOT / "benchmarks", ROOT / "README.md"
GPU = "NVIDIA Invented 9000"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("report", BENCHMARKS / "report.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def results(tmp_path):
    """A copy of benchmarks/results that a test may change."""
    folder = tmp_path / "results"
    folder.mkdir()
    for file in (BENCHMARKS / "results").iterdir():
        shutil.copy(file, folder) if file.suffix == ".csv" else (folder / file.name).touch()
    return folder


def rewritten(path: Path, to: Path, change) -> None:
    """The csv `path` with change(row) applied to every row, as `to`."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with to.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def only(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"{kind}-[0-9]*.csv")
    return path


def test_readme_says_what_the_csv_say(report, capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err
    said = []
    report.filled(README.read_text(), report.Results(BENCHMARKS / "results"), said.append)
    assert said == []
    assert {block["name"] for block in report._BLOCK.finditer(README.read_text())} == set(report.BLOCKS)


@pytest.mark.parametrize(
    ("kind", "column", "value", "block"),
    [
        ("model-toy-llama-amd-epyc-2-threads-bfloat16-dropout0.05", "to_peft", "0.123", "models"),
        ("lora_linear-own-amd-epyc-2-threads-float32", "ratio", "7.125", "layer-amd"),
        ("dropkey_attention-intel-xeon-processor-2-30ghz-2-threads-float32", "ratio", "9.9", "attention"),
        ("hidden_cut-intel-xeon-processor-2-30ghz-2-threads-float32", "ratio", "9.9", "small-operators"),
        ("model-toy-roberta-toy-gpt2-toy-t5-amd-epyc-2-threads-bfloat16-dropout0.05", "to_peft", "9", "other-models"),
    ],
)
def test_a_figure_that_changes_is_found_and_written(report, results, tmp_path, capsys, kind, column, value, block):
    path, readme = only(results, kind), tmp_path / "README.md"
    rewritten(path, path, lambda row: row.update({column: value}))
    shutil.copy(README, readme)
    where = ["--readme", str(readme), "--results", str(results)]
    assert report.main(["--check", *where]) == 1
    assert f"disagree: {block};" in capsys.readouterr().err
    assert readme.read_text() == README.read_text()
    assert report.main(where) == 0
    assert report.main(["--check", *where]) == 0
    assert readme.read_text() != README.read_text()
    assert report.rounded(value, 2) in readme.read_text()


def test_the_newest_run_counts(report, results):
    kind = "model-toy-llama-amd-epyc-2-threads-bfloat16-dropout0.05"
    committed = only(results, kind)
    for date, peak in (("20991231", 5), ("20200101", 6)):
        rewritten(committed, results / f"{kind}-{date}.csv", lambda row, peak=peak: row.update(peak_bytes=peak * 2**20))
    text = report.filled(README.read_text(), report.Results(results))
    assert "| lorasp LoRA-FA | 0.57 | 68.1 | 0.88 | 5 |" in text
    assert f"{kind}-20991231.png" in text


def test_halves_go_away_from_zero(report):
    assert [report.rounded(text, 2) for text in ("1.045", "-2.125", "0.004")] == ["1.05", "−2.13", "0.00"]
    assert (report.mib("0"), report.mib(str(-(2**19)))) == ("0", "−0.5")


def test_without_its_csv_a_block_keeps_its_text_and_that_is_said(report, results):
    kind = "lora_linear-own-intel-xeon-processor-2-30ghz-2-threads-bfloat16-members3"
    only(results, kind).unlink()
    said = []
    assert report.filled(README.read_text(), report.Results(results), said.append) == README.read_text()
    assert said == [f"group: left as it is, there is no {kind}-<date>.csv"]


def test_a_block_nobody_makes_is_an_error(report, results):
    with pytest.raises(KeyError, match="no block is named 'nothing'"):
        report.filled("<!-- results:nothing -->\n<!-- /results -->", report.Results(results))


def test_a_gpus_tables_come_first_and_the_sentence_about_none_goes(report, results):
    before = README.read_text()
    assert report.NO_GPU in before

    def on_gpu(**values):
        return lambda row: row.update({"device": GPU} | values)

    layer = "lora_linear-own-amd-epyc-2-threads-bfloat16-dropout0.1"
    rewritten(only(results, layer), results / "lora_linear-llama3-8b-nvidia-invented-9000-bfloat16-20270101.csv",
              on_gpu(ratio="1.0625"))  # fmt: skip
    computed = "memory-llama-7b-roberta-large-t5-large-computed-for-cuda-bfloat16-dropout0.05"
    rewritten(only(results, computed), results / "memory-llama-7b-nvidia-invented-9000-bfloat16-20270101.csv",
              on_gpu(method="measured", ms="321.6", timing="interleaved", checkpointing="True"))  # fmt: skip
    toys = "model-toy-roberta-toy-gpt2-toy-t5-amd-epyc-2-threads-bfloat16-dropout0.05"
    rewritten(only(results, toys), results / "model-toys-nvidia-invented-9000-bfloat16-20270101.csv", on_gpu())
    for op in ("dropkey_attention", "hidden_cut"):
        kind = f"{op}-intel-xeon-processor-2-30ghz-2-threads-bfloat16"
        rewritten(only(results, kind), results / f"{op}-nvidia-invented-9000-bfloat16-20270101.csv", on_gpu())
    text = report.filled(before, report.Results(results))
    assert report.NO_GPU not in text
    assert "No GPU figure" not in text
    section = text[text.index("## What it measures") :]
    assert section.index(GPU) < section.index("toy 4-layer Llama")
    assert "| 512×1024×1024 r8 | 1.06 |" in section
    assert "activation checkpointing; steps timed: interleaved; bf16, dropout 0.05; torch 2.13.0+cpu" in section
    assert "LLaMA-7B: peak, GiB | saved, GiB | over frozen, MiB | step, ms" in section
    assert "| 322 |" in section
    for words in ("one training step of toy-gpt2, 4×256 tokens, r = 16", "attention, forward", "`hidden_cut`, forward"):
        assert section.count(words) == 1
    # What else stands there stays.
    assert without_gpu(report, text) == without_gpu(report, before)


def without_gpu(report, text):
    return [block[0] for block in report._BLOCK.finditer(text) if block["name"] not in ("gpu", "no-gpu")]


def test_computed_rows_are_no_gpu_figures(report, results):
    assert report.Results(results).on_cuda() == []


def test_plots_are_drawn_where_they_are_missing(report, results, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    shutil.copy(README, readme)
    where = ["--readme", str(readme), "--results", str(results)]
    pictures = [results / Path(line.partition("(")[2].rstrip(")")).name for line in README.read_text().splitlines()
                if line.startswith("![")]  # fmt: skip
    assert len(pictures) == len(report.PLOTS)
    for picture in pictures:
        picture.unlink()
    assert report.main(["--check", *where]) == 1
    assert capsys.readouterr().err.count("no plot for") == len(pictures)
    assert report.main(where) == 0
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
