"""HiddenKey beside what else is done to a model: adapters, checkpointing, copies, files, compilation, autocast."""

import copy
import pickle

import pytest
import torch
import transformers
from hf_models import (
    FAMILIES,
    RATES,
    TARGETS,
    applied,
    assert_meets_rule,
    assert_same,
    batch,
    build,
    llama,
    loss_and_gradients,
    peft_model,
    precisions,
    roberta,
    t5,
)
from peft import PeftModel

import lorasp
from lorasp import HiddenKeyConfig, apply_hiddenkey, hiddenkey_step, remove_hiddenkey, testing


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", FAMILIES)
def test_checkpointed_layers_drop_the_same_again(make, reentrant):
    model = applied(make).double()
    expected = precisions(model, make)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_meets_rule(loss_and_gradients(model, batch(make)), expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_peft_before_or_after_is_the_same_model(make):
    before, after = build(make), build(make)
    torch.manual_seed(5)
    before = peft_model(before, make)
    apply_hiddenkey(before, HiddenKeyConfig(**RATES))
    apply_hiddenkey(after, HiddenKeyConfig(**RATES))
    torch.manual_seed(5)
    after = peft_model(after, make)
    expected = loss_and_gradients(before.train(), batch(make))
    assert_same(loss_and_gradients(after.train(), batch(make)), expected)


@pytest.mark.parametrize("make", FAMILIES)
def test_peft_model_trains_saves_and_merges(make, tmp_path):
    model = peft_model(build(make), make, lora_dropout=0.1)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES, disable_other_dropout=True))
    inputs = batch(make)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [model.eval()(**inputs).loss.item()]
    for _ in range(3):
        hiddenkey_step(model.train(), inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(model.eval()(**inputs).loss.item())
    assert losses[-1] < losses[0]
    trained = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(make), tmp_path)
    assert torch.equal(loaded.eval()(**inputs).logits, trained)
    merged = model.merge_and_unload()
    remove_hiddenkey(merged)
    reference = loaded.merge_and_unload()
    assert torch.equal(merged(**inputs).logits, reference(**inputs).logits)


@pytest.mark.parametrize("make", FAMILIES)
def test_lorasp_adapters_before_or_after_are_the_same_model(make):
    losses = []
    for first in (True, False):
        model = build(make)
        if first:
            apply_hiddenkey(model, HiddenKeyConfig(**RATES))
        torch.manual_seed(5)
        lorasp.inject(model, lorasp.LoRAConfig(r=4, target_modules=TARGETS[make], init_lora_weights=False))
        if not first:
            apply_hiddenkey(model, HiddenKeyConfig(**RATES))
        losses.append(loss_and_gradients(model.train(), batch(make)))
    assert_same(*losses)


@pytest.mark.parametrize("follow", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_drop_too(follow):
    model = applied(t5, disable_other_dropout=True)
    other = follow(model)
    expected = loss_and_gradients(model, batch(t5))
    remove_hiddenkey(model)
    assert_same(loss_and_gradients(other, batch(t5)), expected)
    remove_hiddenkey(other)
    assert torch.equal(other.eval()(**batch(t5)).logits, model.eval()(**batch(t5)).logits)


def test_state_dict_and_saved_config_do_not_know_of_it(tmp_path):
    model = build(llama)
    keys, config = list(model.state_dict()), model.config.to_dict()
    apply_hiddenkey(model, HiddenKeyConfig(**RATES))
    assert (list(model.state_dict()), model.config.to_dict()) == (keys, config)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch(llama)).logits, model(**batch(llama)).logits)


@pytest.mark.parametrize("make", [llama, roberta])
def test_compiles_to_one_graph(make):
    model = build(make, num_hidden_layers=1)
    apply_hiddenkey(model, HiddenKeyConfig(**RATES, disable_other_dropout=True))
    expected = precisions(model.train(), make)
    actual = loss_and_gradients(torch.compile(model, backend="aot_eager", fullgraph=True), batch(make))
    assert_meets_rule({name.removeprefix("_orig_mod."): tensor for name, tensor in actual.items()}, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("make", FAMILIES)
def test_autocast(make):
    """Half-precision passes are as close to fp64 as the same model in that dtype."""
    model, inputs = applied(make, disable_other_dropout=True), batch(make)
    reference64 = loss_and_gradients(copy.deepcopy(model).double(), inputs)["logits"]
    own = loss_and_gradients(copy.deepcopy(model).bfloat16(), inputs)["logits"]
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(**inputs).logits
    testing.assert_close(actual, own, reference64, torch.bfloat16)
