"""Adapter files in PEFT's format: adapter_config.json and adapter_model.safetensors, never pickle.

One digest covers both files: sha256 over what the config says and over the tensors. It travels in the safetensors
metadata, where PEFT does not look (a key of ours in the config would make PEFT warn), so a pair that was not saved
together is refused. Files PEFT wrote carry none and are taken as they are. What trains of a LoRA-SP adapter stands in
the same metadata, under the same digest, beside A and B in full.

A save writes both new files beside the old ones, the config under a name that holds the digest, then renames the
weights, then the config. Killed before the first rename it leaves the old pair; killed between the two, load finds the
config by the digest in the new weights; after the second the new pair stands. Processes may save the same adapter to
one folder at once: each writes under names of its own, and again what the tidying of another took.

The processes a model is sharded among save and load together: they compare what they hold before anything happens, the
first one writes, and an error on one of them is raised on all.
"""

import errno
import hashlib
import json
import math
import os
import secrets
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasp import stored_selection
from lorasp.adapter import Adapter
from lorasp.config import ALL_LINEAR, LoRAConfig
from lorasp.inject import InjectReport, adapted_layers, install, make_plan, modules_to_save, report, unwrap
from lorasp.nn import DEFAULT_ADAPTER, LoRALinear
from lorasp.processes import agree, description, tensor_digest
from lorasp.sharding import Processes, assign, full, own_class

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DIGEST, _FREEZE_A, _PARTIAL = "lorasp.digest", "lorasp.freeze_A", "lorasp.partial"

# Fields of LoRAConfig that stand in adapter_config.json under the same name and mean the same.
_SHARED_FIELDS = tuple(
    field.name
    for field in fields(LoRAConfig)
    if field.name not in ("freeze_A", "prepack", "adapter_dtype", "partial", "share_input")
)
# PEFT's fields that do not change what a finished adapter computes.
_NEUTRAL_FIELDS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# PEFT initialisations that only choose where A and B start; the others rewrite the base weights.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapter injected into `model` to the folder `path`: files that PEFT and load_adapter read.

    adapter_config.json says "all-linear" as the list of names it stood for. Tensors keep their dtype; A and B are
    written whole where a part trains (config.partial), with the selection in the weights file's metadata. The folder is
    made if need be; what it held is replaced only once the new files are complete, and a killed save leaves an adapter
    that loads. Raises ValueError if the model has no injected adapter, OSError if the folder cannot be written.

    A sharded model (fully_shard) is saved by its processes together: each must call this; rank 0 writes. What fails on
    one is raised on all, as is ValueError where their adapters differ (check_processes). Any other model is whole in
    its process, which saves it alone: under DistributedDataParallel one rank's call is enough.
    """
    model, path = unwrap(model), Path(path)
    processes = Processes.of(model, "save_adapter")
    if processes.groups:
        agree(processes, "save_adapter", description(model, values=True))
    config = _injected_config(model, "save_adapter")
    layers = adapted_layers(model)
    with torch.no_grad():
        tensors = {key: tensor.detach() for key, tensor in _slots(model, layers, config).items()}
    if on_meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"save_adapter: these tensors hold no data (meta device): {_listed(on_meta)}")
    if processes.groups:
        for key, tensor in tensors.items():
            whole = full(tensor)
            tensors[key] = whole.cpu() if processes.first else None
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config = replace(config, target_modules=list(layers))

    def write() -> None:
        try:
            _write_pair(path, _file_config(model, layers, config), tensors, config, _adapters(layers))
        except OSError as error:
            raise _named(error, f"save_adapter: cannot write to {path}") from error

    processes.run(lambda: processes.first and write())


def load_adapter(
    model: nn.Module, path: str | os.PathLike, *, freeze_A: bool | None = None, prepack: bool = False
) -> InjectReport:
    """Load the adapter in the folder `path`, written by save_adapter or by PEFT, and report as inject() does.

    A model without adapters gets them as the file's config says; A and B keep the file's dtype where it is their
    weight's or float32. freeze_A: None is as it was saved (PEFT's files: it trains); prepack: as in LoRAConfig. A model
    that inject() prepared gets the values, in its own dtypes, and keeps its own freeze_A and prepack.

    What trains of an adapter saved with a PartialConfig trains again, in a model that inject() prepared if that has a
    PartialConfig too (load before making the optimizer: packed parameters may change their size). Frozen entries take
    the file's values, whatever they are.

    Raises, with the model as it was: OSError for what cannot be read; ValueError for damaged files, files that were not
    saved together, PEFT features other than plain LoRA, a rank, scale or shape that differs, and tensors that are
    missing or unknown, by name, and for a selection that does not fit.

    Into a sharded model, prepared before fully_shard, its processes load together: each must call this and reads the
    files itself. What fails on one is raised on all, as is ValueError where their adapters or files differ.
    """
    model, path = unwrap(model), Path(path)
    processes = Processes.of(model, "load_adapter")
    values, config, stored = processes.run(lambda: _read_pair(path))
    if processes.groups:
        read = {f"the file's {key}": tensor_digest(value) for key, value in values.items()}
        read |= {"the file's config": repr(config), "the file's selection": repr(stored)}
        agree(processes, "load_adapter", description(model, values=False) | read)
    plan = None
    if adapted_layers(model):
        if freeze_A is not None or prepack:
            raise ValueError("load_adapter: freeze_A and prepack are for a model without adapters; this one has them")
        own, layers = _injected_config(model, "load_adapter"), adapted_layers(model)
        _check_same_scale(path, layers, config)
    else:
        config = replace(
            config,
            freeze_A=config.freeze_A if freeze_A is None else freeze_A,
            prepack=prepack,
            adapter_dtype=_adapter_dtype(model, values),
        )
        plan = make_plan(model, config, f"load_adapter: {path}", strict=False)
        own, layers = config, plan.layers
    with torch.no_grad():
        slots = _slots(model, layers, own)
    _check_fit(path, slots, values, own)
    adapters = _adapters(layers)
    stored = None if own.partial is None else stored
    if stored is not None and (wrong := stored_selection.misfits(stored, adapters, own.partial)):
        raise ValueError(f"load_adapter: {path}: its selection does not fit this model: {_listed(wrong, '; ')}")
    if on_meta := [key for key, slot in slots.items() if slot.is_meta]:
        raise ValueError(f"load_adapter: the model must be on a real device, these tensors are not: {_listed(on_meta)}")
    skipped = {} if plan is None else install(plan).skipped
    with torch.no_grad():
        if stored is not None:
            stored_selection.restore(stored, adapters)
        for name, adapter in adapters.items():
            adapter.set_dense(*(values[key] for key in _factor_keys(name)))
        factors = {key for name in adapters for key in _factor_keys(name)}
        for key, slot in slots.items():
            if key not in factors:
                assign(slot, values[key])
    return report(model, skipped)


def _injected_config(model: nn.Module, where: str) -> LoRAConfig:
    configs = getattr(model, "lorasp_configs", None)
    if not configs:
        raise ValueError(f"{where}: {type(model).__name__} has no adapter of its own; pass the model given to inject()")
    return configs[DEFAULT_ADAPTER]


def _adapters(layers: dict[str, LoRALinear]) -> dict[str, Adapter]:
    return {name: layer.adapters[DEFAULT_ADAPTER] for name, layer in layers.items()}


def _factor_keys(name: str) -> tuple[str, str]:
    return f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight"


def _slots(model: nn.Module, layers: dict[str, LoRALinear], config: LoRAConfig) -> dict[str, Tensor]:
    """Every tensor of the adapter under its key in the file."""
    slots = {}
    for name, layer in layers.items():
        adapter, (key_A, key_B) = layer.adapters[DEFAULT_ADAPTER], _factor_keys(name)
        slots[key_A], slots[key_B] = adapter.dense_A(), adapter.dense_B()
        if config.bias != "none" and layer.bias is not None:
            slots[f"{_PREFIX}{name}.base_layer.bias"] = layer.bias
    if config.bias == "all":
        for key, tensor in model.state_dict(keep_vars=True).items():
            owner, _, leaf = key.rpartition(".")
            if leaf == "bias" and owner not in layers:
                slots[f"{_PREFIX}{key}"] = tensor
    for name, module in modules_to_save(model, config).items():
        for key, tensor in module.state_dict(keep_vars=True).items():
            slots[f"{_PREFIX}{name}.{key}"] = tensor
    return slots


def _file_config(model: nn.Module, layers: dict[str, LoRALinear], config: LoRAConfig) -> dict:
    """adapter_config.json as PEFT writes it; patterns keep their order, since the first match wins."""
    shared, cls = {name: getattr(config, name) for name in _SHARED_FIELDS}, own_class(model)
    return {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()},
        "auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__},
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "inference_mode": True,
        "peft_type": "LORA",
        "revision": None,
        "task_type": None,
    }


def _parse_config(text: bytes, file: Path) -> LoRAConfig:
    """A LoRAConfig from adapter_config.json; ValueError for anything beyond plain LoRA."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"load_adapter: {file} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"load_adapter: peft_type must be LORA in {file}, got {kind!r}")
    beyond = {k: v for k, v in found.items() if k not in _SHARED_FIELDS and k not in _NEUTRAL_FIELDS and v}
    if found.get("init_lora_weights", True) not in _PLAIN_INITS:
        beyond["init_lora_weights"] = found["init_lora_weights"]
    if beyond:
        asked = ", ".join(f"{key}={value!r}" for key, value in beyond.items())
        raise ValueError(f"load_adapter: {file} asks for what lorasp does not do: {asked}")
    known = {name: found[name] for name in _SHARED_FIELDS if name in found}
    if known.get("init_lora_weights") in ("eva", "orthogonal"):
        known["init_lora_weights"] = True
    try:
        return LoRAConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {file}: {error}") from None


def _check_same_scale(path: Path, layers: dict[str, LoRALinear], config: LoRAConfig) -> None:
    """The model's ranks and scales against the file's; a layer the file does not know is the key check's business."""
    wrong = []
    for name, layer in layers.items():
        adapter, wanted = layer.adapters[DEFAULT_ADAPTER], config.for_module(name)
        have = (adapter.r, adapter.lora_alpha, adapter.use_rslora)
        if have != (wanted.r, wanted.lora_alpha, wanted.use_rslora):
            wrong.append(
                f"{name}: r={wanted.r}, lora_alpha={wanted.lora_alpha}, use_rslora={wanted.use_rslora} in the file, "
                f"r={have[0]}, lora_alpha={have[1]}, use_rslora={have[2]} in the model"
            )
    if wrong:
        raise ValueError(f"load_adapter: {path} does not fit the model's adapters: {_listed(wrong, '; ')}")


def _adapter_dtype(model: nn.Module, values: dict[str, Tensor]) -> torch.dtype | None:
    """float32 masters if some A or B in the file would lose by being cast to the dtype of its half-precision weight."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, value in values.items():
        name = key.removeprefix(_PREFIX).partition(".lora_")[0]
        weight = parameters.get(f"{name}.weight")
        if ".lora_" in key and weight is not None and weight.dtype.itemsize == 2 and value.dtype != weight.dtype:
            return torch.float32
    return None


def _check_fit(path: Path, slots: dict[str, Tensor], values: dict[str, Tensor], config: LoRAConfig) -> None:
    # With bias="all" PEFT also writes its modules_to_save wrappers' own copies.
    ends, parts = config.modules_to_save or (), ("original_module", "modules_to_save")
    copies = tuple(f"{name}.{part}." for name in ends for part in parts)
    unknown = [key for key in values if key not in slots and not any(copy in key for copy in copies)]
    complaints = [
        ("missing", [key for key in slots if key not in values]),
        ("unknown", unknown),
        (
            "of another shape",
            [
                f"{key} {tuple(values[key].shape)} in the file, {tuple(slot.shape)} in the model"
                for key, slot in slots.items()
                if key in values and values[key].shape != slot.shape
            ],
        ),
    ]
    found = "; ".join(f"{len(keys)} {what}: {_listed(keys)}" for what, keys in complaints if keys)
    if found:
        raise ValueError(f"load_adapter: {path} does not fit this model: {found}")
    by_storage: dict[int, str] = {}
    for key, slot in slots.items():
        first = by_storage.setdefault(id(slot), key)
        if first != key and not torch.equal(values[first], values[key]):
            raise ValueError(f"load_adapter: {path} has two values for one tied tensor: {first} and {key}")


def _listed(items: list[str], separator: str = ", ", most: int = 8) -> str:
    return separator.join(items[:most]) + (f"{separator}and {len(items) - most} more" if len(items) > most else "")


def _digest(config: LoRAConfig, weights: bytes, selections: str | None) -> str:
    """sha256 over what the config says (init aside: it is spent), the selections and the tensors of a weights file."""
    header, data = _split(weights)
    header.pop("__metadata__", None)
    said = {name: getattr(config, name) for name in (*_SHARED_FIELDS, "freeze_A") if name != "init_lora_weights"}
    for name in ("target_modules", "exclude_modules", "modules_to_save"):  # PEFT writes sets, in any order
        said[name] = sorted(said[name]) if isinstance(said[name], tuple) else said[name]
    for name in ("rank_pattern", "alpha_pattern"):
        said[name] = list(said[name].items())
    parts = [said, header] if selections is None else [said, header, selections]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _split(weights: bytes) -> tuple[dict, memoryview]:
    """A safetensors file's header and data: 8 bytes of header size, JSON, tensors."""
    end = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:end]), memoryview(weights)[end:]


def _with_metadata(weights: bytes, metadata: dict[str, str]) -> bytes:
    """safetensors' own save() orders metadata at random; ours gives the same bytes for the same adapter."""
    header, data = _split(weights)
    text = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, data))


def _staged_name(digest: str) -> str:
    return f".adapter_config.{digest[:16]}.json"


def _write_pair(
    path: Path, file_config: dict, tensors: dict[str, Tensor], config: LoRAConfig, adapters: dict[str, Adapter]
) -> None:
    from safetensors.torch import save

    seen: set[int] = set()
    plain = {}
    for key, tensor in sorted(tensors.items()):
        storage = tensor.untyped_storage()._cdata
        # safetensors refuses two tensors in one storage (tied modules_to_save).
        plain[key] = tensor.to("cpu", copy=storage in seen).contiguous()
        seen.add(storage)
    bare = save(plain)
    selections = None if config.partial is None else stored_selection.encode(config.partial, adapters)
    digest = _digest(config, bare, selections)
    metadata = {"format": "pt", _DIGEST: digest, _FREEZE_A: str(config.freeze_A).lower()}
    weights = _with_metadata(bare, metadata if selections is None else metadata | {_PARTIAL: selections})
    text = json.dumps(dict(sorted(file_config.items())), indent=2).encode()

    path.mkdir(parents=True, exist_ok=True)
    leftovers = _leftovers(path)
    own = secrets.token_hex(8)
    draft, partial = path / f".adapter_config.{own}.partial", path / f".adapter_model.{own}.partial"
    staged = path / _staged_name(digest)
    try:
        _write_durably(draft, text)
        _rename(draft, staged, text, draft)
        _write_durably(partial, weights)
        _sync_folder(path)
        _rename(partial, path / WEIGHTS_NAME, weights, partial)
    except BaseException:
        for file in (draft, partial, staged):
            file.unlink(missing_ok=True)
        raise
    _sync_folder(path)
    _rename(staged, path / CONFIG_NAME, text, draft)
    _sync_folder(path)
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)


def _leftovers(path: Path) -> list[Path]:
    """What killed saves left; anything newer than the weights in place may belong to a save under way elsewhere."""
    weights = path / WEIGHTS_NAME
    if not weights.exists():
        return []
    candidates = [*path.glob(".adapter_config.*.json"), *path.glob(".adapter_*.partial")]
    return [file for file in candidates if _modified(file) < _modified(weights)]


def _modified(file: Path) -> float:
    """Time of the last change; of a file that another process has moved meanwhile, the end of time."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return math.inf


def _rename(source: Path, target: Path, data: bytes, draft: Path) -> None:
    """source, which holds data, becomes target; where another process has tidied it away it is written again."""
    try:
        os.replace(source, target)
    except FileNotFoundError:
        _write_durably(draft, data)
        os.replace(draft, target)


def _write_durably(file: Path, data: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_pair(path: Path) -> tuple[dict[str, Tensor], LoRAConfig, stored_selection.Stored | None]:
    """The tensors, the config and the selections of a folder, checked against each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    weights_file, config_file = path / WEIGHTS_NAME, path / CONFIG_NAME
    weights = _read(weights_file)
    try:
        values = load(weights)
    except SafetensorError as error:
        raise ValueError(f"load_adapter: {weights_file} is damaged or truncated: {error}") from None
    metadata = _split(weights)[0].get("__metadata__", {})
    digest = metadata.get(_DIGEST)
    freeze_A = metadata.get(_FREEZE_A) == "true"
    candidates = [config_file] if digest is None else [config_file, path / _staged_name(digest)]
    for file in [file for file in candidates if file.exists()] or [config_file]:
        config = replace(_parse_config(_read(file), file), freeze_A=freeze_A)
        if digest is None or _digest(config, weights, metadata.get(_PARTIAL)) == digest:
            if _PARTIAL not in metadata:
                return values, config, None
            try:
                stored = stored_selection.decode(metadata[_PARTIAL])
                return values, replace(config, partial=stored.partial), stored
            except (TypeError, ValueError) as error:
                raise ValueError(f"load_adapter: {weights_file}: {error}") from None
    raise ValueError(
        f"load_adapter: {CONFIG_NAME} and {WEIGHTS_NAME} in {path} were not saved together, or one was changed since; "
        "save the adapter again"
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        pickle = " (adapter_model.bin is a pickle: not opened)" if (file.parent / "adapter_model.bin").exists() else ""
        raise _named(error, f"load_adapter: cannot read {file}", pickle) from error


def _named(error: OSError, what: str, hint: str = "") -> OSError:
    """The same kind of OSError, saying what was being done."""
    return OSError(error.errno or errno.EIO, f"{what}: {error.strerror}{hint}")
