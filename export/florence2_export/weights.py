"""A checkpoint's weights: named at once, read one tensor at a time."""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from florence2.fields import short
from florence2_export.layouts import (
    IMAGE_PROJECTION,
    Layout,
    find_layout,
    name_in,
)
from florence2_export.source import BIN, SAFETENSORS, CheckpointError, Source, one_line

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SHARD = re.compile(r"[A-Za-z0-9_.-]{1,200}")


@dataclass(frozen=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Weights:
    """Tensors by their native names, whatever the checkpoint calls them."""

    def __init__(self, entries: dict[str, _Entry], where: Path):
        self.entries = entries
        self.where = where
        self.layout: Layout = find_layout(entries, str(where))
        self.read_names: set[str] = set()

    def has(self, name: str) -> bool:
        return name_in(self.layout, name) in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self.entries[name_in(self.layout, name)].shape
        return shape[::-1] if self._is_transposed(name) else shape

    def read(self, name: str) -> Tensor:
        """A float32 copy, independent of the file."""
        original = name_in(self.layout, name)
        self.read_names.add(original)
        tensor, file = self._raw(original), self.entries[original].file
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(f"{file}: {original} is {tensor.dtype}; save it as float32, float16 or bfloat16")
        if self._is_transposed(name):
            tensor = tensor.T
        # contiguous() first: a transposed copy would keep its strides.
        values = tensor.detach().contiguous().to(torch.float32, copy=True)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{file}: {original} holds NaN or infinity; save the model as it was before")
        return values

    def ignore_zeros(self, original: str) -> None:
        if original in self.entries:
            self.read_names.add(original)
            if torch.any(self._raw(original) != 0):
                file = self.entries[original].file
                raise CheckpointError(
                    f"{file}: {original} is not zero, and Florence-2 in transformers adds no such bias"
                )

    def refuse_unread(self) -> None:
        surplus = sorted(set(self.entries) - self.read_names)
        if surplus:
            file = self.entries[surplus[0]].file
            more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
            raise CheckpointError(
                f"{file}: surplus tensor {surplus[0][:200]}{more}: Florence-2 has no such tensor; save without"
            )

    def missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: tensor {name_in(self.layout, name)} is missing; save the whole model again"
        )

    def wrong_shape(self, name: str, expected: tuple[int, ...]) -> CheckpointError:
        original = name_in(self.layout, name)
        entry = self.entries[original]
        wanted = expected[::-1] if self._is_transposed(name) else expected
        found = f"has shape {list(entry.shape)} where config.json gives {list(wanted)}"
        return CheckpointError(f"{entry.file}: {original} {found}; the two must come from the same model")

    def _raw(self, original: str) -> Tensor:
        entry = self.entries[original]
        try:
            return entry.read()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{entry.file}: {original} cannot be read ({one_line(error)}); get it again"
            ) from error

    def _is_transposed(self, name: str) -> bool:
        return self.layout == "microsoft" and name == IMAGE_PROJECTION


def open_weights(source: Source) -> Weights:
    """Safetensors where there are any, else PyTorch's pickles: the order in which transformers looks."""
    for patterns, entries_of in ((SAFETENSORS, _safetensors), (BIN, _bin)):
        source.fetch(patterns)
        single, index = patterns[:2]
        if source.has(single):
            path = source.path(single)
            return Weights(entries_of(path), path)
        if source.has(index):
            return _open_shards(source, index, entries_of)
    if source.has("adapter_config.json"):
        raise adapter_error(source)
    raise CheckpointError(f"{source.folder}: no weights; expected one of {', '.join(SAFETENSORS[:2] + BIN[:2])}")


def adapter_error(source: Source) -> CheckpointError:
    named = source.json("adapter_config.json").get("base_model_name_or_path")
    base = named if isinstance(named, str) and named else "its base model"
    path = source.folder / "adapter_config.json"
    return CheckpointError(
        f"{path}: a LoRA adapter without model weights; merge it into {base} first and give the result"
    )


def _open_shards(source: Source, index: str, entries_of: Callable[[Path], dict[str, _Entry]]) -> Weights:
    weight_map = source.json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source.folder / index} has no weight_map; get it again")
    entries: dict[str, _Entry] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{source.folder / index}: weight_map[{short(name)}] is {short(shard)}, which is no file of the "
                "checkpoint's folder; get it again"
            )
    for shard in sorted(set(weight_map.values())):
        if not source.has(shard):
            raise CheckpointError(f"{source.folder / shard} is missing, and {index} names it; get it again")
        entries |= entries_of(source.path(shard))
    for name, shard in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{source.folder / shard}: tensor {name[:200]} is missing, and {index} names it; get it again"
            )
    return Weights(entries, source.folder / index)


def _safetensors(path: Path) -> dict[str, _Entry]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); get it again") from error

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(name)

    return {name: _Entry(path, shape, reader(name)) for name, shape in shapes.items()}


def _bin(path: Path) -> dict[str, _Entry]:
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name; save model.state_dict()")
    for name, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            what = f"{str(name)[:200]} is a {type(value).__name__}"
            raise CheckpointError(f"{path}: {what}, not a tensor by its name; save model.state_dict()")
        if not _is_whole(value):
            # A tensor of another kind, or a few bytes that are to be read as gigabytes, by strides of zero.
            raise CheckpointError(
                f"{path}: {name[:200]} is not an array in memory; save the model as model.safetensors"
            )

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {name: _Entry(path, tuple(tensor.shape), reader(tensor)) for name, tensor in content.items()}


def _is_whole(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _unpickle(path: Path) -> object:
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        if is_zip and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            # PyTorch stores; a few megabytes that were packed can be a thousand times as many.
            raise CheckpointError(f"{path} is compressed; save the model as model.safetensors")
        # mmap keeps a second copy out of memory; PyTorch has it for its zip format only.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error):
            raise CheckpointError(
                f"{path} holds Python objects beside weights, and unpickling them could run code: refused; "
                "save the model as model.safetensors"
            ) from error
        raise CheckpointError(f"{path} is damaged or cut short; get it again") from error
    except CheckpointError:
        raise
    except Exception as error:  # what the unpickler is led to call raises what it likes
        raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); get it again") from error
