"""The account of a training step: exact on tensors without data, measured and computed kept apart, published sizes."""

import contextlib
import csv
import dataclasses
import gc
import io
import itertools
import json
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorasp import cli
from lorasp.bench import child, model_memory, model_memory_report, models
from lorasp.bench.account import PARTS, Account, account, as_on
from lorasp.bench.model_memory import Setting, compute
from lorasp.bench.model_variants import MODELS, VARIANTS, Variant
from lorasp.memory import saved_bytes

pytest.importorskip("peft")
pytest.importorskip("transformers")

CPU, META = torch.device("cpu"), torch.device("meta")
NAME = "tiny-llama"
CASE = MODELS[NAME]
TOKENS = CASE.batch * CASE.tokens
LINEARS = 7


def measured(setting: Setting, variant: str) -> dict:
    """What the account says of a step on real tensors, and saved_bytes() of the same model."""
    workload = setting.workload(CPU)
    candidate = workload.build(variant)
    kept = saved_bytes(candidate.logits, exclude=candidate.model)
    candidate.step()
    with model_memory._watch(candidate, workload) as watch:
        candidate.step()
    return model_memory._facts(watch, candidate, kept)


def step_counters(setting: Setting, variant: str) -> int:
    """Bytes of AdamW's step counters, which are CPU tensors everywhere: an account of another device has none."""
    return 4 * sum(p.requires_grad for p in setting.workload(META).build(variant).model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_data_it_counts_what_it_counts_with_data_to_the_byte(variant, checkpointing):
    setting = Setting(NAME, torch.bfloat16, 0.05, checkpointing)
    want, have = measured(setting, variant), compute(setting, variant, "cpu")
    counters = step_counters(setting, variant)
    want["accounted_bytes"] -= counters
    want["optimizer"] -= counters
    assert {name: have[name] for name in want} == want
    assert have["peak_bytes"] == have["accounted_bytes"] == sum(have[part] for part in PARTS)


@pytest.fixture
def one_thread():
    """Kernels allocate for every thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("variant", ["frozen", "peft", "lorasp", "lorasp+fa", "lorasp+sp"])
def test_the_allocator_agrees(variant, monkeypatch, one_thread):
    """PyTorch's own record of every allocation: the account's peak, and what operators allocated inside beyond it."""
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 128}
    middling = dataclasses.replace(CASE, config=dict(CASE.config) | sizes, batch=4, tokens=64)
    monkeypatch.setitem(MODELS, "middling", middling)
    workload = Setting("middling", torch.bfloat16, 0.05).workload(CPU)
    candidate = workload.build(variant)
    candidate.step()
    with model_memory._watch(candidate, workload) as watch:
        standing = sum(watch.live.values())
        candidate.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        candidate.step()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    allocated = max(itertools.accumulate(event.nbytes() for event in changes))
    # 8 bytes of seed per input that layers share stay from one step to the next.
    seeds = 8 * 2 * sizes["num_hidden_layers"]
    assert watch.peak - standing - seeds <= allocated <= 1.1 * (watch.peak - standing)


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-t5"])
def test_other_families_too(name, monkeypatch):
    small = {
        "tiny-roberta": ("Roberta", "ForSequenceClassification", {
            "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "vocab_size": 48,
            "num_attention_heads": 4, "max_position_embeddings": 20,
        }),
        "tiny-t5": ("T5", "ForConditionalGeneration", {
            "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 1, "num_heads": 4, "vocab_size": 48,
        }),
    }  # fmt: skip
    monkeypatch.setitem(MODELS, name, models.ModelCase(*small[name], 2, 12, 4))
    for variant in ("peft", "lorasp+fa"):
        setting = Setting(name, torch.float32, 0.05)
        want, have = measured(setting, variant), compute(setting, variant, "cpu")
        assert have["saved_bytes"] == want["saved_bytes"]
        assert have["accounted_bytes"] == want["accounted_bytes"] - step_counters(setting, variant)


def test_what_each_variant_saves_is_what_the_contract_says():
    setting = Setting(NAME, torch.bfloat16, 0.05)
    frozen, lorasp_fa = (compute(setting, variant, "cuda") for variant in ("frozen", "lorasp+fa"))
    assert lorasp_fa["saved_bytes"] - frozen["saved_bytes"] == LINEARS * TOKENS * CASE.rank * 2 + 4 * 8
    assert frozen["adapters"] == frozen["optimizer"] == frozen["gradients"] == 0
    base = CASE.build(torch.bfloat16, CPU)
    assert frozen["weights"] == sum(t.nbytes for t in (*base.parameters(), *base.buffers()))


# Bytes a token keeps in one of LLaMA-7B's layers: inputs of the seven linear layers, of which q, k, v and gate, up
# share theirs and attention keeps o_proj's; PEFT keeps a dropped copy and a mask, 1 byte an element, for each.
WIDTH, MLP, LAYERS, RANK = 4096, 11008, 2, 16
WIDTHS = [WIDTH] * 6 + [MLP]
BY_HAND = {
    "lorasp+fa": 7 * RANK * 2,
    "lorasp": 7 * RANK * 2 + (2 * WIDTH + MLP) * 2,
    "lorasp+sp": 7 * RANK * 2 + (2 * WIDTH + MLP),
    "peft": sum(4 * k + k + 4 * RANK for k in WIDTHS),
    "peft-half": sum(2 * k + k + 2 * RANK for k in WIDTHS),
    "peft+fa": sum(k + 4 * RANK for k in WIDTHS),
}


def test_llama_7b_by_hand(monkeypatch):
    case = MODELS["llama-7b"]
    short = dataclasses.replace(case, config=dict(case.config) | {"num_hidden_layers": LAYERS})
    monkeypatch.setitem(MODELS, "llama-7b", short)
    setting, tokens = Setting("llama-7b", torch.bfloat16, 0.05), case.batch * case.tokens
    frozen = compute(setting, "frozen", "cuda")
    # Two norms keep x in fp32 and a root each; attention q, k, v, its output, 32 sums in fp32; the MLP three tensors.
    layer = 2 * (4 * WIDTH + 4) + 4 * 2 * WIDTH + 32 * 4 + 3 * 2 * MLP
    last_norm, rotary = 4 * WIDTH + 4, 2 * 128 * 2
    by_hand = tokens * (LAYERS * layer + last_norm) + case.tokens * rotary
    # What a flash attention keeps of its random state.
    assert by_hand <= frozen["saved_bytes"] <= by_hand + LAYERS * 64
    for variant, bytes_of_a_token in BY_HAND.items():
        seeds = 4 * 8 * LAYERS * variant.startswith("lorasp")
        over_frozen = compute(setting, variant, "cuda")["saved_bytes"] - frozen["saved_bytes"]
        assert over_frozen == tokens * LAYERS * bytes_of_a_token + seeds, variant


def test_on_cuda_dropout_keeps_a_byte_and_attention_its_rows():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    q = torch.empty(2, 3, 16, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    dropped, attention = nn.Dropout(0.1), nn.functional.scaled_dot_product_attention
    with as_on("cuda"):
        assert saved_bytes(lambda: dropped(x)) == x.numel()
        without = saved_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q), exclude=q)
        with_drop = saved_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1), exclude=q)
        biased = torch.empty(1, 3, 16, 16, device="meta", dtype=torch.bfloat16)
        bias = saved_bytes(lambda: nn.functional.scaled_dot_product_attention(q, q, q, biased), exclude=(q, biased))
    # The output and a logsumexp of each row, padded to 32 by the second kernel; then scalars.
    assert q.nbytes + 2 * 3 * 16 * 4 <= without == with_drop <= q.nbytes + 2 * 3 * 16 * 4 + 64
    assert bias <= q.nbytes + 2 * 3 * 32 * 4 + 64
    assert nn.functional.scaled_dot_product_attention is attention
    with as_on("cpu"):
        assert saved_bytes(lambda: dropped(x)) == x.nbytes


def test_the_peak_is_where_most_lives():
    a = torch.empty(100, dtype=torch.uint8)
    with Account("cpu") as watch:
        watch.hold("weights", [a, a[:50]])
        b = a + 1
        assert (watch.peak, watch.at_peak["weights"], watch.at_peak["other"]) == (200, 100, 100)
        del b
        c = a.view(10, 10)[0] + 1
        assert watch.live["other"] == 10
        assert watch.peak == 200
        watch.hold("gradients", [c])
        assert (watch.live["other"], watch.live["gradients"]) == (0, 10)


def test_a_step_gives_back_what_it_took():
    workload = Setting(NAME, torch.bfloat16, 0.0).workload(META)
    candidate = workload.build("lorasp")
    with as_on("cuda"):
        candidate.step()
        with account(
            candidate.model, workload.base.parameters(), candidate.inputs.values(), candidate.optimizer
        ) as watch:
            before = sum(watch.live.values())
            candidate.step()
            assert watch.peak > before == sum(watch.live.values())
            assert watch.live["saved"] == watch.live["gradients"] == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-7b", 6_738_415_616), ("roberta-large", 355_361_794), ("t5-large", 737_668_096)],
)
def test_published_sizes_are_those_of_the_published_models(name, parameters):
    case = MODELS[name]
    model = case.build(torch.bfloat16, META)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device for p in model.parameters()} == {META}
    assert torch.get_default_dtype() == torch.float32
    assert all(tensor.is_meta for tensor in case.inputs(model, torch.bfloat16, META).values())


def run(tmp_path, *arguments) -> list[dict]:
    assert cli.main(["bench", "--model", NAME, *arguments, "--out", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("*.csv")
    return list(csv.DictReader(table.open()))


def test_computed_rows_say_so_everywhere(tmp_path, capsys):
    rows = run(tmp_path, "--memory", "computed", "--checkpointing", "--variants", "lorasp+fa", "--dropout", "0.05")
    shown = " ".join(capsys.readouterr().out.split())
    assert "computed; not counted: what operators allocate inside" in shown
    assert "lora_dropout 0.05, checkpointing: computed" in shown
    assert [row["variant"] for row in rows] == ["frozen", "peft", "lorasp+fa"]
    for row in rows:
        assert (row["method"], row["device"], row["op"]) == ("computed", "computed for cuda", "memory")
        assert row["peak_bytes"] == row["accounted_bytes"]
        assert row["ms"] == row["reserved_bytes"] == row["timing"] == ""
    (picture,) = tmp_path.glob("memory-tiny-llama-computed-for-cuda-checkpointing-bfloat16-dropout0.05-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_measured_rows_come_from_a_process_each(tmp_path, capsys, monkeypatch):
    asked = []

    def process(command, **how):
        """The child's command line, in this process."""
        python, *module, arguments = command[0], *command[1:3], command[3:]
        assert (python, module, how) == (sys.executable, ["-m", "lorasp"], {"capture_output": True, "text": True})
        asked.append(arguments[arguments.index("--child") + 1])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert cli.main(arguments) == 0
        return SimpleNamespace(returncode=0, stdout=out.getvalue())

    monkeypatch.setattr(child, "subprocess", SimpleNamespace(run=process))
    rows = run(tmp_path, "--memory", "measured", "--device", "cpu", "--variants", "lorasp")
    assert "measured; peak: the most the process had resident" in capsys.readouterr().out
    assert asked == [row["variant"] for row in rows] == ["frozen", "peft", "lorasp"]
    for row in rows:
        assert row["method"] == "measured"
        assert int(row["peak_bytes"]) > 2**27 > int(row["accounted_bytes"]) > 0
    assert int(rows[2]["saved_over_frozen"]) == int(rows[2]["saved_bytes"]) - int(rows[0]["saved_bytes"])


SECONDS = {"frozen": 1.0, "peft": 4.0, "lorasp+fa": 2.0}


def on_cuda(monkeypatch, error=None, ask=model_memory.measure, order=None):
    """run() as on a GPU, with this CPU's tensors and a clock by which a step takes SECONDS.

    error: what timing all together raises; ask: what stands in for a process per variant; order: takes the variants
    in the order of their calls.
    """

    def clock(step, calls):
        step()
        variant = step.__self__.name
        if order is not None:
            order.append((variant, calls))
        return SECONDS[variant]

    workload = Setting.workload
    monkeypatch.setattr(Setting, "workload", lambda self, device: workload(self, CPU))
    monkeypatch.setattr(model_memory, "_peak_of_a_step", lambda *a: (10 * 2**30, 11 * 2**30))
    monkeypatch.setattr(model_memory, "verify_operators", lambda *a: None)
    monkeypatch.setattr(model_memory, "make_clock", lambda device: clock)
    monkeypatch.setattr(Setting, "ask", ask)
    if error:
        monkeypatch.setattr(model_memory, "interleave", lambda *a: (_ for _ in ()).throw(error))
    setting = Setting(NAME, torch.bfloat16, 0.0)
    return model_memory.run(setting, ["lorasp+fa"], "measured", device=torch.device("cuda"), rounds=2)


def test_on_a_gpu_steps_are_timed_in_turn(monkeypatch, capsys):
    order = []
    result = on_cuda(monkeypatch, order=order)
    model_memory_report.print_result(result)
    assert "steps were timed in turn, interleaved" in capsys.readouterr().out
    assert {row.timing for row in result.rows} == {"interleaved"}
    times = {row.variant: (row.ms, row.ms_q1, row.ms_q3) for row in result.rows}
    assert times == {variant: (1e3 * seconds,) * 3 for variant, seconds in SECONDS.items()}
    ratios = {row.variant: (row.to_peft, row.to_peft_q1, row.to_peft_q3) for row in result.rows}
    assert ratios == {"frozen": (0.25,) * 3, "peft": (1.0,) * 3, "lorasp+fa": (0.5,) * 3}
    alone = [variant for variant in SECONDS for _ in range(5)]
    warm_up = [variant for variant in ("frozen", *SECONDS) for _ in range(2)]
    rounds = ["frozen", *["frozen", "frozen", "peft", "frozen", "lorasp+fa", "frozen"] * 2]
    assert order == [(variant, 1) for variant in (*alone, *warm_up, *rounds)]
    assert {row.reserved_bytes for row in result.rows} == {11 * 2**30}


def test_where_the_variants_do_not_fit_together_it_says_so(monkeypatch, capsys):
    result = on_cuda(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    model_memory_report.print_result(result)
    assert "NOT interleaved" in capsys.readouterr().out
    assert {row.timing for row in result.rows} == {"each in a process of its own"}
    assert {row.variant: row.ms for row in result.rows} == {v: 1e3 * seconds for v, seconds in SECONDS.items()}
    assert {row.to_peft for row in result.rows} == {None}


@pytest.mark.parametrize("fits", [True, False])
def test_the_next_models_processes_find_the_memory_that_timing_took(fits, monkeypatch):
    """No tensor of it is alive when torch's allocator gives its memory back, and that is before they start."""
    events, timed, interleave = [], [], model_memory.interleave

    def noted(base, steps, *more):
        timed.extend(weakref.ref(next(step.__self__.model.parameters()).untyped_storage()) for step in steps)
        samples = interleave(base, steps, *more)
        cycle = [steps]  # as a process's first forward leaves one
        cycle.append(cycle)
        events.append("timed")
        if not fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return samples

    def ask(setting, variant, device):
        events.append("asked")
        return measure(setting, variant, CPU)

    measure = model_memory.measure
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append(sum(one() is not None for one in timed)))
    gc.disable()  # chance must not collect what give_back() has to
    try:
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(model_memory, "interleave", noted)
                on_cuda(patch, ask=ask)
    finally:
        gc.enable()
    assert events == [0, *["asked"] * 3, "timed"] * 2


def test_a_variant_that_does_not_fit_has_no_row_and_a_reason(monkeypatch):
    def ask(setting, variant, device):
        facts = {"unavailable": "CUDA out of memory"}
        return facts if variant == "peft" else model_memory.measure(setting, variant, CPU)

    monkeypatch.setattr(Setting, "ask", ask)
    monkeypatch.setattr(model_memory, "verify_operators", lambda *a: None)
    result = model_memory.run(Setting(NAME, torch.bfloat16, 0.0), [], "measured", device=CPU)
    assert [row.variant for row in result.rows] == ["frozen"]
    assert result.unavailable == {"peft": "CUDA out of memory"}


def test_a_process_that_fails_is_an_error_with_what_it_wrote(monkeypatch):
    done = SimpleNamespace(returncode=1, stdout="", stderr="no such thing\n")
    monkeypatch.setattr(child, "subprocess", SimpleNamespace(run=lambda *a, **how: done))
    with pytest.raises(RuntimeError, match=r"--model tiny-llama --child peft .*-checkpointing failed: no such thing$"):
        Setting(NAME, torch.bfloat16, 0.0, checkpointing=True).ask("peft", CPU)


@pytest.mark.parametrize("more", [[], ["--memory", "measured"], ["--memory", "computed"]])
def test_a_child_prints_one_line_of_json(more, capsys):
    """Measured, whatever else is asked for."""
    assert cli.main(["bench", "--model", NAME, *more, "--device", "cpu", "--child", "lorasp+fa"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["peak_bytes"] > facts["accounted_bytes"] == sum(facts[part] for part in PARTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", NAME, "--checkpointing"], "--checkpointing needs --memory"),
        (["--memory", "computed"], "--memory needs --model"),
        (["--checkpointing"], "--checkpointing needs --model"),
        (["--model", "llama-70b"], "--model must be among toy-llama"),
    ],
)
def test_it_names_what_it_cannot_do(arguments, message, tmp_path, capsys):
    assert cli.main(["bench", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_out_of_memory_and_what_cannot_be_built_are_reasons(monkeypatch):
    def refuse(model, rank, dropout_p):
        raise ValueError("not around this model")

    setting = Setting(NAME, torch.bfloat16, 0.0)
    monkeypatch.setitem(VARIANTS, "refused", Variant("raises", refuse))
    want = {"unavailable": "not around this model"}
    assert model_memory.measure(setting, "refused", CPU) == compute(setting, "refused", "cuda") == want
    monkeypatch.setattr(models.Candidate, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("full\n")))
    assert model_memory.measure(setting, "lorasp", CPU) == {"unavailable": "full"}
