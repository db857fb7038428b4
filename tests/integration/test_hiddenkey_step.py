"""hiddenkey_step against two plain passes and the divergence written out."""

from dataclasses import replace

import pytest
import torch
import transformers
from hf_models import FAMILIES, SIZES, TOKENS, batch, bert, build, gpt2, llama, roberta, t5
from torch import Tensor, nn

from lorasp import HiddenKeyConfig, apply_hiddenkey, hiddenkey_step, remove_hiddenkey, testing

CONFIG = HiddenKeyConfig(attention_p=0.3, hidden_p=0.25, loss_weight=0.5, disable_other_dropout=True)
VARIANTS = {"kl": {}, "js": {"loss": "js"}, "both": {"both_branches": True}}


def regression(**config) -> nn.Module:
    config = transformers.RobertaConfig(**TOKENS, num_labels=1, max_position_embeddings=32, **SIZES | config)
    return transformers.RobertaForSequenceClassification(config)


def tokens(**config) -> nn.Module:
    return transformers.BertForTokenClassification(transformers.BertConfig(num_labels=5, **SIZES | config))


def decoder_classifier(**config) -> nn.Module:
    config = transformers.LlamaConfig(**TOKENS, num_labels=3, **SIZES | config)
    return transformers.LlamaForSequenceClassification(config)


def inputs_of(make) -> dict[str, Tensor]:
    inputs = batch(roberta if make in (regression, decoder_classifier) else bert)
    if make is regression:
        inputs["labels"] = torch.tensor([0.3, -1.0, 0.5])
    if make is tokens:
        inputs["labels"] = inputs["labels"].where(inputs["labels"] == -100, inputs["labels"] % 5)
    return inputs if make in (regression, decoder_classifier, tokens) else batch(make)


def applied(make, dtype=torch.float32, trained_head: bool = False) -> nn.Module:
    model = build(make, dtype)
    apply_hiddenkey(model, CONFIG)
    head = model.get_output_embeddings()
    if head is not None:
        head.requires_grad_(trained_head)
    return model.train()


def divergence(first: Tensor, second: Tensor, kind: str) -> Tensor:
    """Per row, in the formulas of the paper."""
    first, second = first.log_softmax(-1), second.log_softmax(-1)
    forth = (first.exp() * (first - second)).sum(-1)
    return forth if kind == "js" else (forth + (second.exp() * (second - first)).sum(-1)) / 2


def compared(make, outputs) -> Tensor:
    """What the two passes must agree in."""
    return outputs.hidden_states[-1] if make is regression else outputs.logits


def rows(make, inputs: dict[str, Tensor]) -> Tensor:
    """The predictions that count: where there is a label, for causal models the next token's, or a token at all."""
    labels = inputs["labels"]
    if make is regression:
        return inputs["attention_mask"].bool()
    if labels.ndim == 1:
        return torch.ones_like(labels, dtype=torch.bool)
    if make in (bert, tokens, t5):
        return labels != -100
    counts = torch.zeros_like(labels, dtype=torch.bool)
    counts[:, :-1] = labels[:, 1:] != -100
    return counts


def plain_step(model: nn.Module, make, inputs: dict[str, Tensor], config: HiddenKeyConfig) -> dict[str, Tensor]:
    """The step as anyone would write it, from two passes with all their logits."""
    arguments = inputs | ({"output_hidden_states": True} if make is regression else {})
    if config.both_branches:
        outputs = model(**{k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in arguments.items()})
        first, second = compared(make, outputs).chunk(2)
    else:
        outputs = model(**arguments)
        with torch.no_grad():
            again = (model.eval() if config.loss == "js" else model)(**arguments)
        model.train()
        first, second = compared(make, outputs), compared(make, again)
    counts = rows(make, inputs)
    consistency = divergence(first, second, config.loss)[counts].sum() / counts.sum()
    loss = outputs.loss + config.loss_weight * consistency
    return {"loss": loss, "task_loss": outputs.loss, "consistency": consistency}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if not name.endswith("key.bias")]
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("make", "trained_head"),
    [(make, False) for make in (*FAMILIES, regression, tokens, decoder_classifier)] + [(llama, True), (t5, True)],
)
def test_loss_and_gradients_are_those_of_two_plain_passes(make, trained_head, variant):
    config, inputs = replace(CONFIG, **VARIANTS[variant]), inputs_of(make)
    expected = {}
    for dtype in (torch.float32, torch.float64):
        model = applied(make, dtype, trained_head)
        torch.manual_seed(3)
        cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        step = plain_step(model, make, cast, config)
        step["loss"].backward()
        expected[dtype] = {name: value.detach() for name, value in step.items()} | gradients(model)
    model = applied(make, trained_head=trained_head)
    torch.manual_seed(3)
    result = hiddenkey_step(model, inputs, config)
    result.loss.backward()
    actual = {name: getattr(result, name).detach() for name in ("loss", "task_loss", "consistency")}
    actual |= gradients(model)
    assert actual["consistency"] > 0
    assert all(module.training for module in model.modules())
    assert actual.keys() == expected[torch.float64].keys()
    for name, tensor in actual.items():
        testing.assert_close(tensor, *(expected[dtype][name] for dtype in expected), torch.float32, name)


@pytest.mark.parametrize("make", [llama, t5])
def test_second_pass_of_a_language_model_has_no_logits(make):
    model, calls = applied(make), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    hiddenkey_step(model, inputs_of(make))
    assert len(calls) == 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [llama, roberta, t5])
def test_checkpointed_model(make, reentrant, recwarn):
    """The same step, and no warning about a pass that needs no gradient."""
    model, exact = applied(make), applied(make, torch.float64)
    expected = []
    for variant in (model, exact):
        torch.manual_seed(3)
        hiddenkey_step(variant, batch(make)).loss.backward()
        expected.append(gradients(variant))
    expected[0] = {name: gradient.clone() for name, gradient in expected[0].items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    hiddenkey_step(model, batch(make)).loss.backward()
    for name, gradient in gradients(model).items():
        testing.assert_close(gradient, expected[0][name], expected[1][name], torch.float32, name)
    assert model.is_gradient_checkpointing
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


def test_no_loss_is_one_pass():
    model = applied(gpt2)
    torch.manual_seed(3)
    outputs = model(**batch(gpt2))
    torch.manual_seed(3)
    result = hiddenkey_step(model, batch(gpt2), replace(CONFIG, loss=None))
    assert torch.equal(result.loss, outputs.loss)
    assert result.consistency == 0
    assert torch.equal(result.outputs.logits, outputs.logits)


def test_manual_seed_reproduces_a_step():
    model, losses = applied(llama), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(hiddenkey_step(model, batch(llama)).loss)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("make", [llama, regression])
def test_compiled_model(make):
    model = build(make, num_hidden_layers=1)
    apply_hiddenkey(model, CONFIG)
    torch.manual_seed(3)
    expected = hiddenkey_step(model.train(), inputs_of(make))
    torch.manual_seed(3)
    result = hiddenkey_step(torch.compile(model, backend="eager"), inputs_of(make))
    exact = model.double()
    torch.manual_seed(3)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(make).items()}
    exact = hiddenkey_step(exact, inputs)
    testing.assert_close(result.loss, expected.loss, exact.loss, torch.float32)
    testing.assert_close(result.consistency, expected.consistency, exact.consistency, torch.float32)
    torch._dynamo.reset()


def questions(**config) -> nn.Module:
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES | config))


REFUSED = [
    (llama, {"mode": False}, {}, r"model must be in training mode \(model.train\(\)\)"),
    (llama, {"drop": "labels"}, {}, "batch must hold labels, got input_ids, attention_mask"),
    (llama, {"remove": True}, {}, "the model has no HiddenKey; call apply_hiddenkey"),
    (llama, {}, {"attention_p": 0.1}, "config may differ from the applied one in loss, loss_weight and both_branches"),
    (roberta, {"labels": torch.zeros(3, 2)}, {}, "multi-label classification is not supported; set loss=None"),
    (questions, {"start_positions": torch.ones(3).long()}, {}, "must have logits to compare, got QuestionAnswering"),
]


@pytest.mark.parametrize(("make", "change", "config", "message"), REFUSED)
def test_refused(make, change, config, message):
    model, inputs = applied(make).train(change.pop("mode", True)), batch(make)
    if change.pop("remove", False):
        remove_hiddenkey(model)
    inputs.pop(change.pop("drop", None), None)
    with pytest.raises(ValueError, match=f"^hiddenkey_step: .*{message}"):
        hiddenkey_step(model, inputs | change, replace(CONFIG, **config) if config else None)


def test_wrong_types():
    for arguments, message in (
        ((3, {}), "model must be a torch.nn.Module, got int"),
        ((applied(llama), [1]), "batch must be a dict of the model's arguments, got list"),
        ((applied(llama), batch(llama), {}), "config must be a HiddenKeyConfig or None, got dict"),
    ):
        with pytest.raises(TypeError, match=f"^hiddenkey_step: {message}"):
            hiddenkey_step(*arguments)
