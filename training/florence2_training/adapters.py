"""LoRA on the native class: adapters put in, saved and read, those of other trainers on Microsoft's layout included."""

import json
import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from florence2_export.layouts import name_in
from florence2_export.source import CheckpointError, one_line
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from florence2_training.recipe import Lora
from florence2_training.trainable import targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LORA = re.compile(
    r"^(?:base_model\.model\.)?(.+?)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.weight)?$"
)
_SAVED = re.compile(r"^(?:base_model\.model\.)?(.+?)\.(?:modules_to_save\.)?(weight|bias)$")
_HEAD = "lm_head"


def add_adapters(model: Any, lora: Lora, base: str, revision: str | None = None) -> Any:
    """Puts adapters into `model`, in place, and freezes the rest -> peft's view. `base` and its `revision` are named in
    the adapter's file."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets(model, lora.targets),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
    )
    # peft takes the base's name from here.
    model.name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    return _adapted(model, config, revision)


def _adapted(model: Any, config: LoraConfig, revision: str | None = None) -> Any:
    with warnings.catch_warnings():
        # peft asks transformers in a way that will end with its version 6.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        return get_peft_model(model, config, revision=revision)


def load_adapter(model: Any, folder: Path) -> Any:
    """Puts a saved adapter into the native `model`, in place; returns peft's view of it.

    Names may be those of the native class or of Microsoft's code, as ms-swift and peft leave them there. Modules that
    were trained whole (`modules_to_save`) replace the model's. Raises CheckpointError.
    """
    config, state = _read(folder)
    native = _native_names(model)
    try:
        tensors, whole = _translated(state, native)
    except KeyError as error:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {error.args[0]} belongs to no layer of this model; give the base that it was made for"
        ) from None
    modules = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors})
    _refuse_convolutions(model, modules, folder)
    if _HEAD in modules or f"{_HEAD}.weight" in whole:
        _untie_head(model)
    _replace(model, whole, folder)
    settings = {
        "target_modules": modules,
        "modules_to_save": None,
        "rank_pattern": _patterns(config.get("rank_pattern"), modules, native),
        "alpha_pattern": _patterns(config.get("alpha_pattern"), modules, native),
    }
    kept = {key: value for key, value in config.items() if key in _KEPT and value is not None}
    try:
        adapted = _adapted(model, LoraConfig(**kept | settings))
        result: Any = set_peft_model_state_dict(adapted, tensors)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: {one_line(error)}") from error
    unread = list(result.unexpected_keys)
    absent = [name for name in result.missing_keys if "lora_" in name]
    if unread or absent:
        name = (unread + absent)[0]
        raise CheckpointError(f"{folder / WEIGHTS}: {name} does not fit {CONFIG}; save the adapter again")
    return adapted


_KEPT = ("r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out")


_INITS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")


def base_of(folder: Path) -> tuple[str | None, str | None]:
    """The checkpoint that the adapter says it belongs to, and its revision."""
    config = json.loads((folder / CONFIG).read_text())
    return config.get("base_model_name_or_path"), config.get("revision")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = folder / WEIGHTS
        if weights.exists():
            state = load_file(weights)
        else:
            state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(f"{folder}: no adapter that can be read ({one_line(error)})") from error
    if config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type {config['peft_type']}; only LoRA (and DoRA) can be merged")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f'{folder / CONFIG}: bias {config["bias"]!r} is trained, too; only "none" can be merged')
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights {init!r} changed the base, too, and the adapter doesn't hold how; "
            "save it with peft's save_pretrained(path_initial_model_for_weight_conversion=...), then merge that"
        )
    return config, {name: tensor.float() for name, tensor in state.items()}


def _native_names(model: Any) -> dict[str, str]:
    """Of every module with weights: its name in either layout -> the native one."""
    names = {name.removesuffix(".weight") for name in model.state_dict() if name.endswith(".weight")}
    names |= {_HEAD}
    microsoft = {name_in("microsoft", f"{name}.weight").removesuffix(".weight"): name for name in names}
    return microsoft | {name: name for name in names}


def _translated(state: dict[str, Tensor], native: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapters' tensors as peft names them on the native class, and parameters that replace the model's.

    KeyError, with the name, for a layer that is not there."""
    tensors, whole = {}, {}
    for name, tensor in state.items():
        found = _LORA.match(name)
        if found:
            module, kind, weight = found.groups()
            if module not in native:
                raise KeyError(name)
            tensors[f"base_model.model.{native[module]}.{kind}{weight or ''}"] = tensor
            continue
        saved = _SAVED.match(name)
        module = saved.group(1).removesuffix(".base_layer") if saved else ""
        if saved is None or module not in native:
            raise KeyError(name)
        # peft saves a resized embedding's own weights beside its adapter.
        whole[f"{native[module]}.{saved.group(2)}"] = tensor
    return tensors, whole


def _patterns(given: dict[str, Any] | None, modules: list[str], native: dict[str, str]) -> dict[str, Any]:
    """peft's patterns are ends of names; ours are whole names."""
    others = {own: other for other, own in native.items() if other != own}
    found = {}
    for pattern, value in (given or {}).items():
        for module in modules:
            if any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in (module, others.get(module, module))):
                found[f"^{re.escape(module)}$"] = value
    return found


def _refuse_convolutions(model: nn.Module, modules: list[str], folder: Path) -> None:
    for name in modules:
        module = model.get_submodule(name)
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            raise CheckpointError(
                f"{folder}: {name} is a depthwise convolution, whose adapter can't be merged (peft); train without it"
            )


def _untie_head(model: Any) -> None:
    """What is merged into the head must not reach the embeddings."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.text_config.tie_word_embeddings = True


@torch.no_grad()
def _replace(model: Any, whole: dict[str, Tensor], folder: Path) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in whole.items():
        own = parameters.get(name)
        if own is None or own.shape != tensor.shape:
            shapes = f"{list(tensor.shape)} where the base has {None if own is None else list(own.shape)}"
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is {shapes}; give the base that it was made for")
        own.copy_(tensor)
    for name, tensor in whole.items():
        if not torch.equal(parameters[name], tensor):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} differs from another copy of it, but in Florence-2 the two are tied: it "
                "can't be merged"
            )
