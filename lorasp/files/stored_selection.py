"""What trains of a LoRA-SP adapter, as one line of JSON beside the dense tensors of an adapter file.

{"partial": PartialConfig's fields, "layers": {name: {"active_A": bits, "active_B": bits, "draws": n}}}: bits are the
masks of adapter.selection, row-major, eight to a byte, first entry in the lowest bit, in base64; active_A is missing
where freeze_A holds.
"""

import base64
import binascii
import json
import math
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor

from lorasp.adapter.adapter import Adapter
from lorasp.adapter.partial_adapter import PartialAdapter, ResampledAdapter
from lorasp.adapter.selection import Selection
from lorasp.config import PartialConfig


class Stored(NamedTuple):
    """The selections in a file: config, and per layer the bits of its masks and the number of draws."""

    partial: PartialConfig
    layers: dict[str, dict]


def encode(partial: PartialConfig, adapters: dict[str, Adapter]) -> str:
    layers = {}
    for name, adapter in adapters.items():
        masks = zip(Selection._fields, _selection(adapter), strict=True)
        layers[name] = {field: _bits(mask) for field, mask in masks if mask is not None}
        if isinstance(adapter, ResampledAdapter):
            layers[name]["draws"] = adapter.drawn()
    return json.dumps({"layers": layers, "partial": asdict(partial)}, sort_keys=True, separators=(",", ":"))


def decode(text: str) -> Stored:
    """Raises ValueError for anything that encode() does not write."""
    try:
        found = json.loads(text)
        return Stored(PartialConfig(**found["partial"]), {name: dict(layer) for name, layer in found["layers"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its selection is not readable: {error!r}") from None


def misfits(stored: Stored, adapters: dict[str, Adapter], partial: PartialConfig | None) -> list[str]:
    """Why the stored selections cannot be those of these adapters; empty if they can."""
    have = None if partial is None else partial.granularity
    if have != stored.partial.granularity:
        return [f"granularity {stored.partial.granularity!r} in the file, {have!r} in the model"]
    wrong = [f"{name}: no such layer in the model" for name in stored.layers if name not in adapters]
    for name, adapter in adapters.items():
        if name not in stored.layers:
            wrong.append(f"{name}: no selection in the file")
            continue
        for field, mask in zip(Selection._fields, _selection(adapter), strict=True):
            bits = stored.layers[name].get(field)
            if mask is None or (bits is None and field == "active_A"):
                continue
            value = _mask(bits, tuple(mask.shape))
            if value is None:
                wrong.append(f"{name}: {field} is not a mask of shape {tuple(mask.shape)}")
            elif have == "matrix" and not isinstance(adapter, PartialAdapter) and not torch.equal(value, mask):
                wrong.append(f"{name}: {field} is {bool(value)} in the file, {bool(mask)} in the model")
            elif have != "matrix" and not value.any():
                wrong.append(f"{name}: {field} leaves nothing to train")
        if isinstance(adapter, PartialAdapter) and not any(line.startswith(f"{name}: ") for line in wrong):
            why = adapter.misfit(_chosen(adapter, stored.layers[name]))
            wrong += [f"{name}: {why}"] * bool(why)
        draws = stored.layers[name].get("draws", 0)
        if not isinstance(draws, int) or isinstance(draws, bool) or draws < 0:
            wrong.append(f"{name}: draws is {draws!r}")
    return wrong


def restore(stored: Stored, adapters: dict[str, Adapter]) -> None:
    """Take over selections that misfits() has nothing against; the effective A and B do not change."""
    for name, adapter in adapters.items():
        if not isinstance(adapter, PartialAdapter):
            continue
        bits = stored.layers[name]
        adapter.choose(_chosen(adapter, bits))
        if isinstance(adapter, ResampledAdapter):
            adapter.draws.fill_(bits.get("draws", 0))


def _chosen(adapter: PartialAdapter, bits: dict) -> Selection:
    """The stored selection; the adapter's own columns of A where the file has none, because A was frozen there."""
    masks = [
        mask if mask is None or field not in bits else _mask(bits[field], tuple(mask.shape))
        for field, mask in zip(Selection._fields, adapter.selection(), strict=True)
    ]
    return Selection(*masks)


def _selection(adapter: Adapter) -> Selection:
    if isinstance(adapter, PartialAdapter):
        return adapter.selection()
    return Selection(torch.tensor([[not adapter.freeze_A]]), torch.tensor([[not adapter.freeze_B]]))


_PLACES = (1, 2, 4, 8, 16, 32, 64, 128)


def _bits(mask: Tensor) -> str:
    flat = mask.flatten().to("cpu", torch.uint8)
    padded = flat.new_zeros(-(-flat.numel() // 8) * 8)
    padded[: flat.numel()] = flat
    data = (padded.view(-1, 8) * torch.tensor(_PLACES, dtype=torch.uint8, device="cpu")).sum(1, dtype=torch.uint8)
    return base64.b64encode(bytes(data.tolist())).decode()


def _mask(bits: object, shape: tuple[int, ...]) -> Tensor | None:
    """The mask of `shape`; None if `bits` is not one."""
    try:
        data = base64.b64decode(bits, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return None
    if len(data) != -(-math.prod(shape) // 8):
        return None
    places = torch.tensor(_PLACES, dtype=torch.uint8, device="cpu")
    flat = (torch.tensor(list(data), dtype=torch.uint8, device="cpu").unsqueeze(1) & places).flatten() != 0
    if flat[math.prod(shape) :].any():
        return None
    return flat[: math.prod(shape)].reshape(shape)
