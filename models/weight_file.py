"""Tensors of one model: from a safetensors file, or from the shards that a `*.safetensors.index.json` names.

Names are read without what training wrappers and other programs put before them (`module.`, `_orig_mod.`,
`model.diffusion_model.` ...).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from densegeo.errors import CheckpointError
from densegeo.models.containers import INDEX, PICKLES, is_pickle, require_readable, unreadable_safetensors

# What torch.compile, FSDP and activation checkpointing put anywhere into a name.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What DataParallel, trainers and single-file checkpoints put before every name.
_BEFORE = (
    "module.",
    "model.diffusion_model.",
    "diffusion_model.",
    "first_stage_model.",
    "state_dict.",
    "model.",
    "transformer.",
    "unet.",
    "vae.",
    "net.",
)
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Entry:
    """A tensor as the file's header describes it."""

    shape: tuple[int, ...]
    dtype: str  # safetensors name: F32, BF16, F16, F8_E4M3, ...


def is_index(path: Path) -> bool:
    """Whether the name is that of a list of shards: `NAME.safetensors.index.json`, with or without a variant."""
    return re.search(r"\.safetensors\.index(\.[\w-]+)?\.json$", path.name) is not None


def parts(path: Path) -> list[Path]:
    """The files that a file of weights consists of: itself, or an index and its shards.

    Raises CheckpointError for an index that is damaged or names what is not beside it.
    """
    require_readable(path)
    return [path, *(path.parent / name for name in shard_names(path))] if is_index(path) else [path]


def shard_names(index: Path) -> list[str]:
    """The shards that an index names, in order. Raises CheckpointError for what is no index."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = list(dict.fromkeys(places.values()))
        plain = all(isinstance(name, str) and len(PurePosixPath(name).parts) == 1 for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of shards ({error!r}): it must hold a weight_map") from error
    if not names or not plain:
        raise CheckpointError(f"{index} is no index of shards: its weight_map must name files beside it, not {names}")
    return sorted(names)


class WeightFile:
    """Open files of one model, by plain names. path: what was asked for; prefix: what stood before every name."""

    def __init__(self, path: Path, opened: dict[Path, Any]) -> None:
        self.path = path
        stored: dict[str, tuple[Path, Any]] = {}
        for part, file in opened.items():
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in stored:
                    raise CheckpointError(f"{part} and {stored[key][0]} both hold {key}: shards of different models?")
                stored[key] = part, file
        names, self.prefix = plain_names(stored)
        self._tensors = {name: (key, *stored[key]) for name, key in names.items()}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def entry(self, name: str) -> Entry:
        """What the header says."""
        key, _, file = self._tensors[name]
        part = file.get_slice(key)
        return Entry(tuple(part.get_shape()), part.get_dtype())

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        key, _, file = self._tensors[name]
        stored_tensor: Tensor = file.get_tensor(key)
        return stored_tensor

    def finite(self, name: str) -> Tensor:
        """The same. Raises CheckpointError for NaN or infinity in it, with the tensor's name and its file's."""
        tensor = self.tensor(name)
        wide = tensor if tensor.element_size() > 1 else tensor.float()  # 8-bit numbers have no sum
        if torch.isfinite(wide.sum(dtype=torch.float32)):  # NaN and infinity stay in it
            return tensor
        wrong = ~torch.isfinite(wide)
        count = int(wrong.sum())
        if count == 0:  # the sum overflowed
            return tensor
        key, part, _ = self._tensors[name]
        kinds = [kind for kind, present in (("NaN", wide.isnan().any()), ("infinite", wide.isinf().any())) if present]
        first = [int(index) for index in wrong.nonzero()[0]]
        raise CheckpointError(
            f"{part}: {key} holds {count:,} {' and '.join(kinds)} of {tensor.numel():,} values, the first at {first}. "
            "The file is damaged, or its training went wrong: compare its SHA-256 with the published one, or download "
            "it again."
        )


@contextmanager
def opened(path: Path) -> Iterator[WeightFile]:
    """Open a safetensors file, or an index with its shards. Raises CheckpointError that says what else it is."""
    with ExitStack() as stack:
        files = {part: stack.enter_context(_safetensors(part)) for part in parts(path) if not is_index(part)}
        weight_file = WeightFile(path, files)
        if is_index(path):
            _check_index(path, files)
        yield weight_file


def read_entries(path: Path) -> dict[str, Entry]:
    """Names, shapes and dtypes of a model's tensors, from headers alone.

    Raises CheckpointError when a file is missing, unreadable, or another kind of file.
    """
    with opened(path) as file:
        return {name: file.entry(name) for name in file.keys()}  # noqa: SIM118


def plain_names(keys: Iterable[str]) -> tuple[dict[str, str], str]:
    """Name without wrappers -> name in the file, and what all names began with. Names stay where two would be one."""
    keys = list(keys)
    names = {_INSIDE.sub("", key): key for key in keys}
    if len(names) != len(keys):
        return {key: key for key in keys}, ""
    prefix = ""
    while wrapper := next((text for text in _BEFORE if names and all(name.startswith(text) for name in names)), ""):
        names = {name.removeprefix(wrapper): key for name, key in names.items()}
        prefix += wrapper
    return names, prefix


def _check_index(index: Path, files: dict[Path, Any]) -> None:
    """Raise CheckpointError for tensors that an index promises and its shards lack."""
    places = json.loads(index.read_bytes())["weight_map"]
    keys_of = {part.name: set(file.keys()) for part, file in files.items()}
    missing = sorted(key for key, name in places.items() if key not in keys_of[name])
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} tensors that their shards lack: {'; '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}. Index and shards are of different models: download them together."
        )


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    require_readable(path)
    if is_pickle(path):
        raise CheckpointError(
            f"{path} is a pickle file, which can run any code when it is loaded, so densegeo reads safetensors. With "
            "--convert-bin it is read as weights alone (torch.load with weights_only=True) and kept as safetensors"
        )
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path} is named like a pickle file of torch.save and is none: download it again")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise unreadable_safetensors(path, error) from error


def require_whole(path: Path) -> None:
    """Raise CheckpointError where a file is one shard of several, which its index must be named for."""
    if match := _SHARD.fullmatch(path.name):
        index = path.with_name(match[1] + INDEX)
        remedy = f"name {index} instead" if index.is_file() else f"its index, {index.name}, must lie beside all of them"
        raise CheckpointError(f"{path} is one of {int(match[2])} shards: {remedy}")
