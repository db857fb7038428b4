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


@pytest.fixture(scope="module")
def tables(report):
    return sys.modules["report_tables"]


@pytest.fixture
def results(report, tmp_path):
    """A folder that a test may change: of benchmarks/results the newest csv of every kind that no GPU was measured for,
    their plots as empty files."""
    folder = tmp_path / "results"
    folder.mkdir()
    committed = report.Results(BENCHMARKS / "results")
    for kind in committed.paths.keys() - committed.on_cuda():
        shutil.copy(committed.path(kind), folder)
        (folder / committed.path(kind).with_suffix(".png").name).touch()
    return folder


@pytest.fixture
def readme(report, results, tmp_path):
    """README as these results make it, which a test may change."""
    path = tmp_path / "README.md"
    path.write_text(report.filled(README.read_text(), report.Results(results)))
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def rewritten(path: Path, to: Path, change) -> None:
    """The csv `path` with change(row) applied to every row, as `to`."""
    rows = rows_of(path)
    for row in rows:
        change(row)
    write(to, rows)


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
def test_a_figure_that_changes_is_found_and_written(report, results, readme, capsys, kind, column, value, block):
    path, before = only(results, kind), readme.read_text()
    rewritten(path, path, lambda row: row.update({column: value}))
    where = ["--readme", str(readme), "--results", str(results)]
    assert report.main(["--check", *where]) == 1
    assert f"disagree: {block};" in capsys.readouterr().err
    assert readme.read_text() == before
    assert report.main(where) == 0
    assert report.main(["--check", *where]) == 0
    assert readme.read_text() != before
    assert report.rounded(value, 2) in readme.read_text()


def test_the_newest_run_counts(report, results, readme):
    kind = "model-toy-llama-amd-epyc-2-threads-bfloat16-dropout0.05"
    committed = only(results, kind)
    for date, peak in (("20991231", 5), ("20200101", 6)):
        rewritten(committed, results / f"{kind}-{date}.csv", lambda row, peak=peak: row.update(peak_bytes=peak * 2**20))
    text = report.filled(readme.read_text(), report.Results(results))
    (row,) = (row for row in rows_of(committed) if row["variant"] == "lorasp+fa")
    saved, over = (int(row[name]) / 2**20 for name in ("saved_bytes", "saved_over_frozen"))
    assert f"| lorasp LoRA-FA | {float(row['to_peft']):.2f} | {saved:.1f} | {over:.2f} | 5 |" in text
    assert f"{kind}-20991231.png" in text


def test_sentences_take_their_figures_from_the_csv(report, results):
    for kind in (f"{report.XEON}-bfloat16", f"{report.EPYC}-bfloat16"):
        path, slow = only(results, f"lora_linear-own-{kind}"), report.EPYC in kind
        rewritten(path, path, lambda row, slow=slow: row.update(ms=str(int(row["M"]) * (2.5 if slow else 1))))
    assert "takes 2.5 to 2.5 times as long as the Xeon's" in report.amd_layers(report.Results(results))
    path = only(results, f"lora_linear-own-{report.EPYC}-bfloat16-members3")
    rewritten(path, path, lambda row: row.update(ratio="1.5" if row["provider"] == "lorasp" else "1.8"))
    assert "at 8×1024×1024 r8 on the EPYC it takes 1.20 times as" in report.few_rows(report.Results(results))


def test_halves_go_away_from_zero(tables):
    assert [tables.rounded(text, 2) for text in ("1.045", "-2.125", "0.004")] == ["1.05", "−2.13", "0.00"]
    assert (tables.mib("0"), tables.mib(str(-(2**19))), tables.mib("")) == ("0", "−0.5", "")


def test_without_its_csv_a_block_keeps_its_text_and_that_is_said(report, results, readme):
    kind = "lora_linear-own-intel-xeon-processor-2-30ghz-2-threads-bfloat16-members3"
    only(results, kind).unlink()
    said = []
    assert report.filled(readme.read_text(), report.Results(results), said.append) == readme.read_text()
    assert said == [f"group: left as it is, there is no {kind}-<date>.csv"]


def test_a_block_nobody_makes_is_an_error(report, results):
    with pytest.raises(KeyError, match="no block is named 'nothing'"):
        report.filled("<!-- results:nothing -->\n<!-- /results -->", report.Results(results))


def test_a_gpus_tables_come_first_and_the_sentence_about_none_goes(report, results, readme):
    before = readme.read_text()
    assert report.NO_GPU in before

    def on_gpu(**values):
        return lambda row: row.update({"device": GPU} | values)

    layer = "lora_linear-own-amd-epyc-2-threads-bfloat16-dropout0.1"
    rewritten(only(results, layer), results / "lora_linear-llama3-8b-nvidia-invented-9000-bfloat16-20270101.csv",
              on_gpu(ratio="1.0625"))  # fmt: skip
    computed = only(results, "memory-llama-7b-roberta-large-t5-large-computed-for-cuda-bfloat16-dropout0.05")
    rewritten(computed, results / "memory-llama-7b-nvidia-invented-9000-bfloat16-20270101.csv",
              on_gpu(method="measured", ms="321.6", timing="interleaved", checkpointing="True"))  # fmt: skip
    toys = "model-toy-roberta-toy-gpt2-toy-t5-amd-epyc-2-threads-bfloat16-dropout0.05"
    rewritten(only(results, toys), results / "model-toys-nvidia-invented-9000-bfloat16-20270101.csv", on_gpu())
    cut = "hidden_cut-intel-xeon-processor-2-30ghz-2-threads-bfloat16"
    rewritten(only(results, cut), results / "hidden_cut-nvidia-invented-9000-bfloat16-20270101.csv", on_gpu())
    write(results / "dropkey_attention-nvidia-invented-9000-bfloat16-20270101.csv", attention_on_gpu())
    text = report.filled(before, report.Results(results))
    assert report.NO_GPU not in text
    assert "No GPU figure" not in text
    section = text[text.index("## What it measures") :]
    assert section.index(GPU) < section.index("toy 4-layer Llama")
    assert "| 512×1024×1024 r8 | 1.06 |" in section
    assert "activation checkpointing; steps timed: interleaved; bf16, dropout 0.05; " in section
    assert f"dropout 0.05; torch {rows_of(computed)[0]['torch']}, peft" in section
    assert "LLaMA-7B: peak, GiB | saved, GiB | over frozen, MiB | step, ms" in section
    assert "| 322 |" in section
    for words in ("one training step of toy-gpt2, 4×256 tokens, r = 16", "attention, forward", "`hidden_cut`, forward"):
        assert section.count(words) == 1
    # What else stands there stays.
    assert without_gpu(report, text) == without_gpu(report, before)


def attention_on_gpu() -> list[dict[str, str]]:
    """Rows as on CUDA without --sizes: of every size those without a causal mask, then those with one."""
    names = {"SDPA flash, no drop": "", "SDPA cuDNN, no drop": "", "SDPA flash, dropout": "0.1", "lorasp column": "0.1"}
    ratios = {"False": (1, 0.75, 1.25, 0.5), "True": (1, 0.875, 1.5, 0.25)}
    return [
        {
            "op": "dropkey_attention", "sizes": sizes, "dtype": "bfloat16", "causal": causal, "name": name,
            "rate": rate, "rounds": "5", "ms": "1", "ratio": str(ratio), "ratio_q1": str(ratio), "ratio_q3": str(ratio),
            "saved_bytes": "1", "device": GPU, "torch": "2", "peft": "0", "lorasp": "0", "commit": "",
        }
        for sizes in ("8x32x2048x64", "1x16x16384x128")
        for causal in ratios
        for (name, rate), ratio in zip(names.items(), ratios[causal], strict=True)
    ]  # fmt: skip


def test_attention_shows_causal_calls_apart_and_what_the_targets_compare_with(tables):
    assert tables.attention_table(attention_on_gpu()).splitlines() == [
        "| dtype, B×H×S×D | keys dropped, p = 0.1 | flash, dropout 0.1 | cuDNN, no drop |",
        "|---|---|---|---|",
        "| bf16, 8×32×2048×64 | 0.50 | 1.25 | 0.75 |",
        "| bf16 causal, 8×32×2048×64 | 0.25 | 1.50 | 0.88 |",
        "| bf16, 1×16×16384×128 | 0.50 | 1.25 | 0.75 |",
        "| bf16 causal, 1×16×16384×128 | 0.25 | 1.50 | 0.88 |",
    ]


def test_attentions_plot_shows_causal_calls_apart(report, tmp_path, monkeypatch):
    drawn = []
    plots = sys.modules["report_plots"]
    monkeypatch.setattr(plots.hiddenkey_report, "plot", lambda path, contests, *more: drawn.extend(contests))
    write(tmp_path / "attention.csv", attention_on_gpu())
    plots.PLOTS["attention-plot"].draw(tmp_path / "attention.csv")
    assert [(one.sizes, one.causal, len(one.rows)) for one in drawn] == [
        ((8, 32, 2048, 64), False, 4), ((8, 32, 2048, 64), True, 4),
        ((1, 16, 16384, 128), False, 4), ((1, 16, 16384, 128), True, 4),
    ]  # fmt: skip
    assert all(row.causal == one.causal for one in drawn for row in one.rows)


def test_layers_of_one_size_are_told_apart_by_name_and_bias(tables, results):
    (row, *_) = rows_of(only(results, "lora_linear-own-amd-epyc-2-threads-float32"))
    sizes = f"{row['M']}×{row['K']}×{row['N']} r{row['R']}"
    rows = [row | {"layer": layer, "bias": bias} for layer in ("", "up") for bias in ("False", "True")]
    found = tables.layers(rows)
    assert list(found) == [sizes, f"{sizes}, bias", f"up {sizes}", f"up {sizes}, bias"]


def without_gpu(report, text):
    return [block[0] for block in report._BLOCK.finditer(text) if block["name"] not in ("gpu", "no-gpu")]


def test_computed_rows_are_no_gpu_figures(report, results):
    kinds = report.Results(results).paths
    assert any("computed-for-cuda" in kind for kind in kinds)
    assert any("idle-gpu-computes-nothing" in kind for kind in kinds)
    assert report.Results(results).on_cuda() == []


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        (GPU, True), ("Intel(R) Xeon(R) @ 2.30GHz (2 threads)", False), ("AMD EPYC (1 threads)", False),
        ("computed for cuda", False), ("computed for cpu", False),
    ],
)  # fmt: skip
def test_a_gpu_is_what_is_neither_a_cpu_nor_computed(tables, device, gpu):
    assert tables.session.names_gpu(device) == gpu
    row = {"device": device, "variant": "peft", "saved_bytes": "0", "saved_over_frozen": "0", "peak_bytes": "0"}
    assert ("most allocated, MiB" in tables.model_table([row])) == gpu


def test_plots_are_drawn_where_they_are_missing(report, results, readme, capsys):
    pytest.importorskip("matplotlib")
    where = ["--readme", str(readme), "--results", str(results)]
    pictures = [results / Path(line.partition("(")[2].rstrip(")")).name for line in readme.read_text().splitlines()
                if line.startswith("![")]  # fmt: skip
    assert len(pictures) == len(report.PLOTS)
    for picture in pictures:
        picture.unlink()
    assert report.main(["--check", *where]) == 1
    assert capsys.readouterr().err.count("no plot for") == len(pictures)
    assert report.main(where) == 0
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
