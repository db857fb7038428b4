"""save_adapter and load_adapter: a model's adapters and the files adapter_files reads and writes.

The processes a model is sharded among save and load together: they compare what they hold before anything happens, the
first one writes, and an error on one of them is raised on all.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lorasp.adapter.adapter import Adapter
from lorasp.config import ALL_LINEAR, LoRAConfig, matches_names
from lorasp.files import stored_selection
from lorasp.files.adapter_files import PREFIX, SHARED_FIELDS, named, read_pair, write_pair
from lorasp.layers.lora_linear import DEFAULT_ADAPTER, LoRALinear
from lorasp.models.adapted import active_adapter, adapted_layers, adapter_configs, unwrap, whole_keys
from lorasp.models.inject import InjectReport, install, report
from lorasp.models.plan import Plan, make_plan
from lorasp.models.processes import agree, description, tensor_digest
from lorasp.models.whole_tensors import whole_tensors
from lorasp.sharding import Processes, assign, full, own_class


def save_adapter(model: nn.Module, path: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Write an adapter of `model` (None: the active one) to the folder `path`: files that PEFT and load_adapter read.

    adapter_config.json says "all-linear" as the list of names it stood for. Tensors keep their dtype; A and B are
    written whole where a part trains (config.partial), with the selection in the weights file's metadata. The folder is
    made if need be; what it held is replaced only once the new files are complete, and a killed save leaves an adapter
    that loads. Raises ValueError if the model has no such adapter, OSError if the folder cannot be written.

    A sharded model (fully_shard) is saved by its processes together: each must call this; rank 0 writes. What fails on
    one is raised on all, as is ValueError where their adapters differ (check_processes). Any other model is whole in
    its process, which saves it alone: under DistributedDataParallel one rank's call is enough.
    """
    model, path = unwrap(model), Path(path)
    processes = Processes.of(model, "save_adapter")
    if processes.groups:
        agree(processes, "save_adapter", description(model, values=True))
    adapter_name = _known_adapter(model, "save_adapter", adapter_name)
    config = adapter_configs(model)[adapter_name]
    layers = _layers_with(model, adapter_name)
    with torch.no_grad():
        tensors = {key: tensor.detach() for key, tensor in _slots(model, layers, adapter_name).items()}
    if on_meta := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"save_adapter: these tensors hold no data (meta device): {_listed(on_meta)}")
    if processes.groups:
        for key, tensor in tensors.items():
            whole = full(tensor)
            tensors[key] = whole.cpu() if processes.first else None
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config = _by_name(model, config, layers)
    adapters = {name: layer.adapters[adapter_name] for name, layer in layers.items()}

    def write() -> None:
        try:
            write_pair(path, _file_config(model, layers, config), tensors, config, adapters)
        except OSError as error:
            raise named(error, f"save_adapter: cannot write to {path}") from error

    processes.run(lambda: processes.first and write())


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    freeze_A: bool | None = None,
    prepack: bool = False,
) -> InjectReport:
    """Load the adapter in the folder `path`, written by save_adapter or by PEFT, and report as inject() does.

    A model without an adapter of this name gets it as the file's config says; A and B keep the file's dtype where it is
    their weight's or float32. It acts and trains if it is the model's first, otherwise from set_adapter on. freeze_A:
    None is as it was saved (PEFT's files: it trains); prepack: as in LoRAConfig. A model that has the adapter, from
    inject() or from a file, gets the values, in its own dtypes, and keeps its own freeze_A and prepack.

    What trains of an adapter saved with a PartialConfig trains again, in a model that inject() prepared if that has a
    PartialConfig too (load before making the optimizer: packed parameters may change their size). Frozen entries take
    the file's values, whatever they are.

    Raises, with the model as it was: OSError for what cannot be read; ValueError for damaged files, files that were not
    saved together, PEFT features other than plain LoRA, a rank, scale or shape that differs, and tensors that are
    missing or unknown, by name, for a selection that does not fit, and while an adapter is merged.

    Into a sharded model, prepared before fully_shard, its processes load together: each must call this and reads the
    files itself. What fails on one is raised on all, as is ValueError where their adapters or files differ.
    """
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    model, path = unwrap(model), Path(path)
    if wrapped and adapter_name not in adapter_configs(model):
        raise ValueError(
            "load_adapter: model must not be wrapped in DistributedDataParallel to get a new adapter, "
            f"{adapter_name!r}; load first, then wrap"
        )
    processes = Processes.of(model, "load_adapter")
    values, config, stored = processes.run(lambda: read_pair(path))
    if processes.groups:
        read = {f"the file's {key}": tensor_digest(value) for key, value in values.items()}
        read |= {"the file's config": repr(config), "the file's selection": repr(stored)}
        agree(processes, "load_adapter", description(model, values=False) | read)
    plan = None
    if adapter_name in adapter_configs(model):
        if freeze_A is not None or prepack:
            raise ValueError(
                f"load_adapter: freeze_A and prepack are for a new adapter; the model has {adapter_name!r} already"
            )
        layers = _layers_with(model, adapter_name)
        if merged := [name for name, layer in layers.items() if layer.merged_adapter == adapter_name]:
            raise ValueError(f"load_adapter: {adapter_name!r} must not be merged, it is in {merged[0]}; unmerge first")
        own = adapter_configs(model)[adapter_name]
        adapters = {name: layer.adapters[adapter_name] for name, layer in layers.items()}
        _check_same_scale(path, adapters, config)
    else:
        config = replace(
            config,
            freeze_A=config.freeze_A if freeze_A is None else freeze_A,
            prepack=prepack,
            adapter_dtype=_adapter_dtype(model, values),
        )
        plan = make_plan(model, config, f"load_adapter: {path}", adapter_name, strict=False)
        own, layers, adapters = config, plan.layers, plan.adapters
    with torch.no_grad():
        slots = _slots(model, layers, adapter_name, plan)
    _check_fit(path, slots, values, own)
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
        for key, slot in _slots(model, layers, adapter_name).items():
            if key not in factors:
                assign(slot, values[key])
    return report(model, skipped, tuple(layers))


def _known_adapter(model: nn.Module, where: str, adapter_name: str | None) -> str:
    configs = adapter_configs(model)
    if not configs:
        raise ValueError(f"{where}: {type(model).__name__} has no adapter of its own; pass the model given to inject()")
    if adapter_name is None:
        return active_adapter(model)
    if adapter_name not in configs:
        raise ValueError(f"{where}: adapter_name must be one of {', '.join(configs)}, got {adapter_name!r}")
    return adapter_name


def _layers_with(model: nn.Module, adapter_name: str) -> dict[str, LoRALinear]:
    return {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.adapters}


def _by_name(model: nn.Module, config: LoRAConfig, layers: dict[str, LoRALinear]) -> LoRAConfig:
    """The config with "all-linear" as names; what their ends also fit, and was skipped, is excluded by name."""
    names, inside = list(layers), tuple(f"{name}." for name in layers)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if not name.startswith(inside)]
    skipped = [name for name in modules if name not in layers and matches_names(names, name)]
    exclude = config.exclude_modules
    if skipped and not isinstance(exclude, str):
        exclude = [*(exclude or ()), *skipped]
    return replace(config, target_modules=names, exclude_modules=exclude)


def _factor_keys(name: str) -> tuple[str, str]:
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _slots(
    model: nn.Module, layers: dict[str, LoRALinear], adapter_name: str, plan: Plan | None = None
) -> dict[str, Tensor]:
    """Every tensor of the adapter under its key in the file; of a plan not carried out, whole tensors of the base."""
    slots = {}
    for name, layer in layers.items():
        adapter = plan.adapters[name] if plan else layer.adapters[adapter_name]
        key_A, key_B = _factor_keys(name)
        slots[key_A], slots[key_B] = adapter.dense_A(), adapter.dense_B()
    config = plan.config if plan else adapter_configs(model)[adapter_name]
    whole = whole_tensors(model)
    adapted = adapted_layers(model)
    for key in whole_keys(model, config, layers):
        owner, _, leaf = key.rpartition(".")
        # Of a quantised layer the bias stands inside; in the file it does where this adapter adapts the layer.
        name = owner.removesuffix(".base_layer") if owner.removesuffix(".base_layer") in adapted else owner
        file_key = f"{name}.base_layer.{leaf}" if name in layers else f"{name}.{leaf}" if name else leaf
        slots[f"{PREFIX}{file_key}"] = whole.value(model, adapter_name, key)
    return slots


def _file_config(model: nn.Module, layers: dict[str, LoRALinear], config: LoRAConfig) -> dict:
    """adapter_config.json as PEFT writes it; patterns keep their order, since the first match wins."""
    shared, cls = {name: getattr(config, name) for name in SHARED_FIELDS}, own_class(model)
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


def _check_same_scale(path: Path, adapters: dict[str, Adapter], config: LoRAConfig) -> None:
    """The model's ranks and scales against the file's; a layer the file does not know is the key check's business."""
    wrong = []
    for name, adapter in adapters.items():
        wanted = config.for_module(name)
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
        name = key.removeprefix(PREFIX).partition(".lora_")[0]
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
