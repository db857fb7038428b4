"""Every call of PEFT's on an accelerated model gives what PEFT gives."""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter
from test_accelerate_models import batch, config
from test_peft import arguments, build, llama, move, peft_model

from lorasp import accelerate, testing


@pytest.fixture(scope="module")
def twins() -> tuple[PeftModel, PeftModel]:
    """A PEFT model with two adapters, and the same model accelerated; in fp64, where rounding hides nothing."""
    peft = peft_model(build(llama, torch.float64), **arguments(llama))
    peft.add_adapter("second", config(r=2, lora_alpha=3))
    fused = copy.deepcopy(peft)
    accelerate(fused)
    return peft, fused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = peft_model(build(llama, torch.float64), **arguments(llama) | {"r": 3})
    move(model)
    model.save_pretrained(folder)
    return folder


# What a PEFT user does to a model, m; the result is what it returns, or else the model's logits and gradients after it.
def set_adapter(m, saved):
    m.set_adapter("second")


def two_active(m, saved):
    m.base_model.set_adapter(["default", "second"])


def add_adapter(m, saved, **changes):
    torch.manual_seed(7)
    m.add_adapter("third", config(**changes))
    m.set_adapter("third")


def add_adapter_with_dora(m, saved):
    add_adapter(m, saved, use_dora=True)


def add_adapter_to_other_layers(m, saved):
    add_adapter(m, saved, target_modules=["lm_head", "q_proj"])


def load_adapter_(m, saved):
    m.load_adapter(saved, "loaded", is_trainable=True)
    m.set_adapter("loaded")


def load_adapter_by_meta(m, saved):
    m.load_adapter(saved, "loaded", low_cpu_mem_usage=True)
    m.set_adapter("loaded")


def load_into_an_adapter(m, saved):
    load_adapter_(m, saved)
    with torch.no_grad():
        m.get_parameter("base_model.model.model.layers.0.mlp.up_proj.lora_B.loaded.weight").zero_()
    m.load_adapter(saved, "loaded", is_trainable=True)


def hotswap(m, saved):
    m.load_adapter(saved, "loaded", is_trainable=True)
    m.set_adapter("loaded")
    hotswap_adapter(m, saved, "loaded")
    return m(**batch(m)).logits


def delete_adapter(m, saved):
    m.delete_adapter("second")


def delete_active_adapter(m, saved):
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        m.delete_adapter("default")


def disable_adapter(m, saved):
    with m.disable_adapter():
        return m(**batch(m)).logits


def disable_adapter_and_return(m, saved):
    with m.disable_adapter():
        m(**batch(m))


def merge_adapter(m, saved):
    m.merge_adapter()
    return m(**batch(m)).logits


def merge_named_adapter(m, saved):
    m.merge_adapter(["second"], safe_merge=True)
    return m(**batch(m)).logits


def unmerge_adapter(m, saved):
    m.merge_adapter()
    m.unmerge_adapter()


def merge_and_unload(m, saved):
    merged = m.merge_and_unload()
    assert not any(isinstance(module, Linear) for module in merged.modules())
    return merged(**batch(merged)).logits


def unload(m, saved):
    base = m.unload()
    return base(**batch(base)).logits


def add_weighted_adapter(m, saved, kind="linear"):
    m.add_weighted_adapter(["default", "third"], [0.5, -2.0], "sum", combination_type=kind)
    m.set_adapter("sum")


def add_weighted_adapter_linear(m, saved):
    add_adapter(m, saved)
    add_weighted_adapter(m, saved)


def add_weighted_adapter_cat(m, saved):
    add_adapter(m, saved, r=3)
    add_weighted_adapter(m, saved, "cat")


def add_weighted_adapter_svd(m, saved):
    add_adapter(m, saved, r=3)
    add_weighted_adapter(m, saved, "svd")


def mixed_batch(m, saved):
    m.eval()
    return m(**batch(m), adapter_names=["second", "__base__"]).logits


def scale(m, saved):
    for module in m.modules():
        if isinstance(module, Linear):
            module.set_scale("default", 3.0)
            module.scale_layer(0.5)
            module.unscale_layer(0.25)


def rescale(m, saved):
    with rescale_adapter_scale(m, 0.3):
        return m(**batch(m)).logits


def generate(m, saved):
    return m.generate(torch.arange(3, 9)[None], max_new_tokens=4, min_new_tokens=4)


def get_state_dict(m, saved):
    return torch.cat([tensor.flatten() for _, tensor in sorted(get_peft_model_state_dict(m).items())])


def gradient_checkpointing(m, saved):
    m.train()
    m.gradient_checkpointing_enable()
    m.enable_input_require_grads()


CALLS = (
    set_adapter, two_active, add_adapter, add_adapter_with_dora, add_adapter_to_other_layers, load_adapter_,
    load_adapter_by_meta, load_into_an_adapter, hotswap, delete_adapter, delete_active_adapter, disable_adapter,
    disable_adapter_and_return, merge_adapter, merge_named_adapter, unmerge_adapter, merge_and_unload, unload,
    add_weighted_adapter_linear, add_weighted_adapter_cat, add_weighted_adapter_svd, mixed_batch, scale, rescale,
    generate, get_state_dict, gradient_checkpointing,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.rstrip("_"))
def test_every_call_of_pefts_gives_what_peft_gives(call, twins, saved):
    results = []
    for model in twins:
        model = copy.deepcopy(model)
        found = call(model, saved)
        if found is None:
            outputs = model(**batch(model))
            outputs.loss.backward()
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found = {"logits": outputs.logits.detach()} | gradients
            assert model.get_nb_trainable_parameters()[0] > 0
        results.append(found if isinstance(found, dict) else {"found": found.detach()})
    expected, actual = results
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, expected[name], expected[name], torch.float32, name)


def test_what_peft_says_and_writes(twins, capsys, tmp_path):
    written = []
    for model, folder in zip(twins, ("peft", "fused"), strict=True):
        model.print_trainable_parameters()
        model.save_pretrained(tmp_path / folder)
        files = {}
        for path in (tmp_path / folder).rglob("adapter_*"):
            name, content = str(path.relative_to(tmp_path / folder)), path.read_bytes()
            if path.suffix == ".json":
                content = json.loads(content)
                content["target_modules"].sort()  # a set in PEFT
            files[name] = content
        written.append(files)
    theirs, ours = capsys.readouterr().out.splitlines()
    assert ours == theirs
    assert written[0] == written[1]
    assert len(written[0]) == 4
    statuses = [[(s.name, s.active_adapters, s.requires_grad) for s in model.get_layer_status()] for model in twins]
    assert statuses[0] == statuses[1]
