"""hiddenkey_step: the task loss and how well two dropout passes agree, in one call."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorasp.config import HiddenKeyConfig
from lorasp.functional import consistency_loss, linear_consistency_loss
from lorasp.integrations.transformers import home
from lorasp.models.adapted import unwrap

_IGNORED = -100


@dataclass(frozen=True)
class HiddenKeyResult:
    """loss = task_loss + loss_weight * consistency, 0-d each; outputs: the model's, of the pass with gradient."""

    loss: Tensor
    task_loss: Tensor
    consistency: Tensor
    outputs: Any


def hiddenkey_step(
    model: nn.Module, batch: Mapping[str, Any], config: HiddenKeyConfig | None = None
) -> HiddenKeyResult:
    """The loss of one HiddenKey training step; call .loss.backward() on the result.

    loss = task_loss + loss_weight * consistency. The model runs twice on `batch` (its keyword arguments, labels
    included), each pass drawing its own dropout: the second without gradient, or, with both_branches, both as one
    doubled batch, whose outputs are returned. kind "js" runs the second in inference mode.

    Compared are the classifier's logits (classification, per token with labels != -100 where it labels tokens), the
    last hidden layer, over tokens that are no padding (regression), or the next-token distributions where the label is
    not -100 (language models: from the output layer's input, so that the second pass has no logits and the comparison
    needs a small workspace; from the logits themselves if the model is compiled or its output layer adapted or, without
    both_branches, trained).

    config: default the one apply_hiddenkey got; another may differ in loss, loss_weight and both_branches only.
    Raises ValueError if the model is in eval mode or has no HiddenKey, if the batch has no labels, or if the model's
    outputs cannot be compared (question answering, multi-label classification).
    Source: HiddenKey arXiv 2403.00812, section 3.3.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"hiddenkey_step: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"hiddenkey_step: batch must be a dict of the model's arguments, got {type(batch).__name__}")
    inner = home(model)
    config = _config(inner, config)
    if not model.training:
        raise ValueError("hiddenkey_step: model must be in training mode (model.train()): eval mode drops nothing")
    if not isinstance(batch.get("labels"), Tensor):
        raise ValueError(f"hiddenkey_step: batch must hold labels, got {', '.join(batch) or 'nothing'}")
    if config.loss is None:
        outputs = model(**batch)
        return _result(outputs, outputs.loss.new_zeros(()), config)
    compare = _comparison(model, inner, batch, config)
    if config.both_branches:
        batch = _doubled(batch)
        outputs, seen = compare.run(model, batch)
        first, second = seen.chunk(2)
        # Halves of one batch have the same labels and padding.
        mask = compare.rows(batch, seen)
        mask = None if mask is None else mask[: len(first)]
    else:
        outputs, first = compare.run(model, batch)
        mask = compare.rows(batch, first)
        with _without_gradient(inner, inference=config.loss == "js"):
            second = compare.run_again(model, batch)
    return _result(outputs, compare.loss(first, second, config.loss, mask), config)


def _result(outputs, consistency: Tensor, config: HiddenKeyConfig) -> HiddenKeyResult:
    return HiddenKeyResult(outputs.loss + config.loss_weight * consistency, outputs.loss, consistency, outputs)


def _config(inner: nn.Module, config: HiddenKeyConfig | None) -> HiddenKeyConfig:
    applied = getattr(inner, "lorasp_hiddenkey", None)
    if applied is None:
        raise ValueError("hiddenkey_step: the model has no HiddenKey; call apply_hiddenkey(model, config) first")
    if config is None:
        return applied
    if not isinstance(config, HiddenKeyConfig):
        raise TypeError(f"hiddenkey_step: config must be a HiddenKeyConfig or None, got {type(config).__name__}")
    step = {name: getattr(config, name) for name in ("loss", "loss_weight", "both_branches")}
    if replace(applied, **step) != config:
        raise ValueError(
            "hiddenkey_step: config may differ from the applied one in loss, loss_weight and both_branches only; "
            "call apply_hiddenkey again to change what is dropped"
        )
    return config


def _doubled(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor of the batch's size twice over."""
    size = len(batch["labels"])
    fits = {name: isinstance(value, Tensor) and value.ndim > 0 and len(value) == size for name, value in batch.items()}
    return {name: torch.cat([value, value]) if fits[name] else value for name, value in batch.items()}


@contextmanager
def _without_gradient(model: nn.Module, inference: bool) -> Iterator[None]:
    """no_grad, where checkpointing would save nothing and warn; in inference mode if asked."""
    training = [module for module in model.modules() if inference and module.training]
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing")]
    try:
        for module in training:
            module.training = False
        for module in checkpointed:
            module.gradient_checkpointing = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module in checkpointed:
            module.gradient_checkpointing = True


def _is_compiled(model: nn.Module, inner: nn.Module) -> bool:
    chain = (model, unwrap(model), inner)
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in chain)


def _comparison(model: nn.Module, inner: nn.Module, batch: Mapping[str, Any], config: HiddenKeyConfig) -> "_Logits":
    """What the two passes are compared by, chosen by the kind of model."""
    head = inner.get_output_embeddings()
    if head is not None:
        attention = next((m for m in inner.modules() if hasattr(m, "lorasp_dropkey") or hasattr(m, "is_causal")), None)
        shifted = bool(getattr(attention, "is_causal", False)) and not inner.config.is_encoder_decoder
        # linear_consistency_loss hands a trainable head the gradient of both passes.
        one_gradient = config.both_branches or not any(p.requires_grad for p in head.parameters())
        streamed = type(head) is nn.Linear and one_gradient and not _is_compiled(model, inner)
        return _Head(head, shifted) if streamed else _Logits(shifted)
    kind = getattr(inner.config, "problem_type", None)
    if kind == "regression" or (kind is None and getattr(inner.config, "num_labels", None) == 1):
        return _LastHidden()
    if kind == "multi_label_classification" or batch["labels"].is_floating_point():
        raise ValueError("hiddenkey_step: multi-label classification is not supported; set loss=None")
    return _Logits(shifted=False)


class _Logits:
    """The logits: of a classifier, or of a language model that cannot be looked into."""

    def __init__(self, shifted: bool):
        self.shifted = shifted

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        outputs = model(**batch)
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"hiddenkey_step: the model's outputs must have logits to compare, got {type(outputs).__name__}; "
                "set loss=None"
            )
        return outputs, logits

    def run_again(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self.run(model, batch)[1]

    def rows(self, batch: Mapping[str, Any], seen: Tensor) -> Tensor | None:
        """The rows with a label (..., S) of per-token logits (..., S, V); None for one label per sequence."""
        return None if seen.ndim == 2 else _labelled(batch["labels"], self.shifted)

    def loss(self, first: Tensor, second: Tensor, kind: str, mask: Tensor | None) -> Tensor:
        return consistency_loss(first, second, kind, mask)


class _LastHidden(_Logits):
    """The last hidden layer, softmax over its features, for regression."""

    def __init__(self):
        super().__init__(shifted=False)

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        outputs = model(**{**batch, "output_hidden_states": True})
        states = getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states
        return outputs, states[-1]

    def rows(self, batch: Mapping[str, Any], seen: Tensor) -> Tensor | None:
        mask = batch.get("attention_mask")
        return mask.bool() if isinstance(mask, Tensor) and mask.shape == seen.shape[:-1] else None


class _Stop(Exception):
    """The output layer was reached in a pass that needs no logits."""


class _Head(_Logits):
    """The input of a language model's output layer: the logits are compared without being held."""

    def __init__(self, head: nn.Linear, shifted: bool):
        super().__init__(shifted)
        self.head = head

    @contextmanager
    def _watched(self, stop: bool) -> Iterator[list[Tensor]]:
        seen = []

        def hook(module, args):
            seen.append(args[0])
            if stop:
                raise _Stop

        handle = self.head.register_forward_pre_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()

    def run(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Tensor]:
        with self._watched(stop=False) as seen:
            outputs = model(**batch)
        return outputs, seen[-1]

    def run_again(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        with self._watched(stop=True) as seen:
            try:
                # Below DistributedDataParallel, which must not see a pass that ends early.
                unwrap(model)(**batch)
            except _Stop:
                return seen[-1]
        raise ValueError("hiddenkey_step: the model did not reach its output layer")

    def rows(self, batch: Mapping[str, Any], seen: Tensor) -> Tensor | None:
        return _labelled(batch["labels"], self.shifted)

    def loss(self, first: Tensor, second: Tensor, kind: str, mask: Tensor | None) -> Tensor:
        return linear_consistency_loss(first, second, self.head.weight, self.head.bias, kind, mask)


def _labelled(labels: Tensor, shifted: bool) -> Tensor:
    """Which positions predict a label; a causal model's predict the next one."""
    if shifted:
        labels = nn.functional.pad(labels[..., 1:], (0, 1), value=_IGNORED)
    return labels != _IGNORED
