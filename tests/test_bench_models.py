"""`lorasp bench --model`: what it counts, that it refuses a variant that computes something else, what it writes."""

import csv
import dataclasses
import re

import pytest
import torch

from lorasp import cli, console
from lorasp.bench import child, models, models_report
from lorasp.bench.model_variants import MODELS, VARIANTS, Variant, adapted_layers, trained

pytest.importorskip("peft")
pytest.importorskip("transformers")

NAME, CPU = "tiny-llama", torch.device("cpu")
CASE = MODELS[NAME]
TOKENS, WIDTH, MLP = CASE.batch * CASE.tokens, CASE.config["hidden_size"], CASE.config["intermediate_size"]
LINEARS, INPUTS, SEED = 7, 4, 8


@pytest.fixture(scope="module")
def workload():
    return models.Workload.of(NAME, torch.bfloat16, CPU, 0.05)


def test_it_writes_a_table_a_csv_and_a_plot(tmp_path, capsys, monkeypatch):
    ask, told = child.ask, {"lorasp+sp": {"unavailable": "CUDA out of memory"}}
    monkeypatch.setattr(
        child, "ask", lambda *a: ask(*a) if a[1] == "lorasp+fa" else told.get(a[1], {"peak_bytes": 2**28})
    )
    held = torch.ones(2**30, dtype=torch.uint8)
    arguments = ["bench", "--model", NAME, "--variants", "lorasp+fa", "lorasp+sp", "--dropout", "0.05"]
    assert cli.main([*arguments, "--device", "cpu", "--rounds", "2", "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    assert "malloc thresholds" in shown
    assert f"{NAME}, 2×12 tokens, r = 4, bfloat16, lora_dropout 0.05" in shown
    assert max(len(line.rstrip()) for line in shown.split("wrote")[0].splitlines()) <= console.WIDTH
    (table,) = (tmp_path / "new").glob("model-tiny-llama-*-dropout0.05-*.csv")
    rows = {row["variant"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == ["frozen", "peft", "lorasp+fa", "lorasp+sp"]
    for row in rows.values():
        assert {"device", "torch", "peft", "transformers", "lorasp", "commit", "rules"} < row.keys()
        assert 0 < float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert 0 < float(row["ratio_q1"]) <= float(row["ratio"]) <= float(row["ratio_q3"])
    assert (rows["peft"]["to_peft_q1"], rows["peft"]["to_peft"], rows["peft"]["to_peft_q3"]) == ("1", "1", "1")
    assert (
        rows["frozen"]["saved_over_frozen"] == rows["frozen"]["trainable"] == rows["frozen"]["optimizer_bytes"] == "0"
    )
    # x A^T of every layer, one seed per input.
    kept = LINEARS * TOKENS * CASE.rank * 2 + INPUTS * SEED
    assert int(rows["lorasp+fa"]["saved_over_frozen"]) == kept
    assert int(rows["lorasp+sp"]["saved_over_frozen"]) == kept + TOKENS * (WIDTH + WIDTH + MLP) // 2 * 2
    assert int(rows["peft"]["optimizer_bytes"]) == 2 * 4 * int(rows["peft"]["trainable"])
    assert int(rows["lorasp+sp"]["optimizer_bytes"]) == 2 * 2 * int(rows["lorasp+sp"]["trainable"])
    assert {name: row["peak_bytes"] for name, row in rows.items() if name != "lorasp+fa"} == {
        "frozen": str(2**28), "peft": str(2**28), "lorasp+sp": "",
    }  # fmt: skip
    # The child's own, not what the process that started it had.
    assert 2**27 < int(rows["lorasp+fa"]["peak_bytes"]) < held.nbytes
    (picture,) = (tmp_path / "new").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_variants_share_the_frozen_weights_and_start_from_one_A_and_B(workload):
    base = {parameter.data_ptr() for parameter in workload.base.parameters()}
    expected = None
    for name in VARIANTS:
        candidate = workload.build(name)
        frozen = {p.data_ptr() for p in candidate.model.parameters() if not p.requires_grad}
        assert base <= frozen, name
        drawn = [factor for layer in adapted_layers(candidate.model).values() for factor in models.factors(layer)]
        if name not in ("frozen", "lorasp+sp"):
            expected = expected or drawn
            assert all(torch.equal(one.float(), other.float()) for one, other in zip(drawn, expected, strict=True)), (
                name
            )


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "frozen"])
def test_every_variant_is_the_same_function(workload, name):
    models.verify(workload.build(name), workload)


@pytest.mark.parametrize("name", ["peft", "lorasp+sp"])
@pytest.mark.parametrize("broken", ["logits", "dinputs_embeds", "dlora_A", "dlora_B"])
def test_a_wrong_variant_is_found(workload, name, broken):
    candidate = workload.build(name)
    if broken == "logits":
        candidate.model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.25)
    elif broken == "dinputs_embeds":
        embeds = candidate.inputs["inputs_embeds"].detach().requires_grad_()
        embeds.register_hook(lambda grad: grad * 1.25)
        candidate.leaves = {"inputs_embeds": embeds}
    else:
        # One layer's alone.
        layer = next(layer for path, layer in adapted_layers(candidate.model).items() if path.endswith("v_proj"))
        for which, parameter, _ in trained(layer):
            if broken == f"dlora_{which}":
                parameter.register_hook(torch.zeros_like)
    with pytest.raises(AssertionError, match=rf"{re.escape(name)} {broken}: error"):
        models.verify(candidate, workload)


def test_a_wrong_variant_is_never_timed(tmp_path, capsys, monkeypatch):
    def other_scale(model, rank, dropout_p):
        model = VARIANTS["lorasp"].adapt(model, rank, dropout_p)
        for layer in adapted_layers(model).values():
            layer.adapters["default"].scale *= 0.5
        return model

    monkeypatch.setitem(VARIANTS, "wrong", Variant("a scale of its own", other_scale))
    monkeypatch.setattr(models, "interleave", lambda *a: pytest.fail("timed"))
    arguments = ["bench", "--model", NAME, "--variants", "wrong", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "wrong result, nothing is timed: wrong logits: error" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_variant_that_cannot_be_built_is_listed_with_the_reason(tmp_path, capsys, monkeypatch):
    def refuse(model, rank, dropout_p):
        raise ValueError("not around this model")

    monkeypatch.setitem(VARIANTS, "refused", Variant("raises", refuse))
    monkeypatch.setattr(child, "ask", lambda *a: {"peak_bytes": 2**28})
    arguments = ["bench", "--model", NAME, "--variants", "refused", "--rounds", "1", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "not measured: refused: not around this model" in capsys.readouterr().out


def row(variant: str, **values) -> models.Row:
    blank = dict.fromkeys([field.name for field in dataclasses.fields(models.Row)], 1)
    known = {"model": "toy-llama", "dtype": "bfloat16", "dropout_p": 0.05, "variant": variant}
    return models.Row(**blank | known | values)


def test_targets_stand_beside_the_model_they_are_for():
    rows = [
        row("frozen", saved_bytes=1000, saved_over_frozen=0),
        row("peft", saved_bytes=2000, saved_over_frozen=1000),
        row("lorasp", to_peft=0.84, saved_over_frozen=151),
        row("lorasp+fa", to_peft=0.86, saved_over_frozen=9),
    ]
    assert [str(target) for target in models_report.targets(rows)] == [
        "lorasp: time of a step over PEFT's: 0.8400 (target 0.85: met)",
        "lorasp+fa: time of a step over PEFT's: 0.8600 (target 0.85: MISSED)",
        "lorasp: bytes saved beyond the frozen model's, over PEFT's: 0.1510 (target 0.15: MISSED)",
        "lorasp+fa: bytes saved beyond the frozen model's, over PEFT's: 0.0090 (target 0.01: met)",
    ]
    assert models_report.targets([dataclasses.replace(one, dropout_p=0.1) for one in rows]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt"], "--model must be among toy-llama, toy-roberta"),
        (["--model", NAME, "--variants", "lora"], "--variants must be among frozen, peft"),
        (["--model", NAME, "--dropout", "1"], r"--dropout must be in \[0, 1\), got 1"),
        (["--variants", "lorasp"], "--variants needs --model"),
    ],
)
def test_it_names_what_it_cannot_do(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)
