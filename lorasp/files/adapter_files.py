"""Adapter files in PEFT's format: adapter_config.json and adapter_model.safetensors, never pickle.

One digest covers both files: sha256 over what the config says and over the tensors. It travels in the safetensors
metadata, where PEFT does not look (a key of ours in the config would make PEFT warn), so a pair that was not saved
together is refused. Files PEFT wrote carry none and are taken as they are. What trains of a LoRA-SP adapter stands in
the same metadata, under the same digest, beside A and B in full.

A save writes both new files beside the old ones, the config under a name that holds the digest, then renames the
weights, then the config. Killed before the first rename it leaves the old pair; killed between the two, load finds the
config by the digest in the new weights; after the second the new pair stands. Processes may save the same adapter to
one folder at once: each writes under names of its own, and again what the tidying of another took.
"""

import errno
import hashlib
import json
import math
import os
import secrets
from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from lorasp.adapter.adapter import Adapter
from lorasp.config import LoRAConfig
from lorasp.files import stored_selection

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
_DIGEST, _FREEZE_A, _PARTIAL = "lorasp.digest", "lorasp.freeze_A", "lorasp.partial"

# Fields of LoRAConfig that stand in adapter_config.json under the same name and mean the same.
SHARED_FIELDS = tuple(
    field.name
    for field in fields(LoRAConfig)
    if field.name not in ("freeze_A", "prepack", "adapter_dtype", "partial", "share_input", "recompute_mlp")
)
# PEFT's fields that do not change what a finished adapter computes.
_NEUTRAL_FIELDS = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "fan_in_fan_out", "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
# PEFT initialisations that only choose where A and B start; the others rewrite the base weights.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def _parse_config(text: bytes, file: Path) -> LoRAConfig:
    """A LoRAConfig from adapter_config.json; ValueError for anything beyond plain LoRA."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"load_adapter: {file} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"load_adapter: peft_type must be LORA in {file}, got {kind!r}")
    beyond = {k: v for k, v in found.items() if k not in SHARED_FIELDS and k not in _NEUTRAL_FIELDS and v}
    if found.get("init_lora_weights", True) not in _PLAIN_INITS:
        beyond["init_lora_weights"] = found["init_lora_weights"]
    if beyond:
        asked = ", ".join(f"{key}={value!r}" for key, value in beyond.items())
        raise ValueError(f"load_adapter: {file} asks for what lorasp does not do: {asked}")
    known = {name: found[name] for name in SHARED_FIELDS if name in found}
    if known.get("init_lora_weights") in ("eva", "orthogonal"):
        known["init_lora_weights"] = True
    try:
        return LoRAConfig(**known)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_adapter: {file}: {error}") from None


def _digest(config: LoRAConfig, weights: bytes, selections: str | None) -> str:
    """sha256 over what the config says (init aside: it is spent), the selections and the tensors of a weights file."""
    header, data = _split(weights)
    header.pop("__metadata__", None)
    said = {name: getattr(config, name) for name in (*SHARED_FIELDS, "freeze_A") if name != "init_lora_weights"}
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


def write_pair(
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
    """source, which holds data, becomes target; as often as another process has tidied it away it is written again."""
    while True:
        try:
            return os.replace(source, target)
        except FileNotFoundError:
            _write_durably(draft, data)  # raises it where the folder is what is gone
            source = draft


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


def read_pair(path: Path) -> tuple[dict[str, Tensor], LoRAConfig, stored_selection.Stored | None]:
    """The tensors, the config and the selections of a folder, checked against each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    weights_file, config_file = path / WEIGHTS_NAME, path / CONFIG_NAME
    weights = _read(weights_file)
    try:
        values = dict(sorted(load(weights).items()))  # load's own order changes from process to process
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
        raise named(error, f"load_adapter: cannot read {file}", pickle) from error


def named(error: OSError, what: str, hint: str = "") -> OSError:
    """The same kind of OSError, saying what was being done."""
    return OSError(error.errno or errno.EIO, f"{what}: {error.strerror}{hint}")
