"""Where a model's files come from: local paths, a directory with the authors' file names, or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.conversion import converted, empty_prompt
from densegeo.export.places import (
    REPOSITORY,
    Folder,
    Place,
    describe,
    open_place,
    open_repository,
    snapshot,
    subfolders,
)
from densegeo.models.containers import INDEX, PICKLES, is_pickle, require_readable
from densegeo.models.families import Family
from densegeo.models.loading import Files
from densegeo.models.roles import Role
from densegeo.models.weight_file import is_index, require_whole

_WEIGHTS = ".safetensors"
_HALF = "fp16"  # the variant that is taken where there is no other
_FILE_SUFFIXES = {_WEIGHTS, ".npz", ".json", ".gguf", *PICKLES}


class SourceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user named: each a path or `organisation/repository[@revision][:file]`."""

    checkpoint: str | None = None  # a directory or repository that holds several of the files
    variant: str | None = None  # of the weights in it: fp16 for NAME.fp16.safetensors
    dit: str | None = None
    vae: str | None = None
    lora: str | None = None
    prompt: str | None = None
    config: str | None = None
    no_lora: bool = False
    any_digest: bool = False  # take published files that are not the recorded ones
    offline: bool = False  # take files that were fetched before, and fetch none
    convert_bin: bool = False  # read pickled weights, as weights alone, where there are no safetensors


@dataclass(frozen=True)
class LocatedFile:
    """A role's file, not fetched yet. encoder: whether it is a text encoder, from which the prompt is computed."""

    place: Place
    name: str
    encoder: bool = False


def unnamed(options: SourceOptions, family: Family) -> list[str]:
    """The roles for which the user named neither a file nor a place that may hold it."""
    if options.checkpoint is not None:
        return []
    needless = {role.name for role in family.roles if role.optional or _skipped(options, role) or _named(options, role)}
    return [role.name for role in family.roles if role.name not in needless]


def named(options: SourceOptions, family: Family) -> list[str]:
    """The options by which the user named files or a place that holds them."""
    flags = [role.name for role in family.roles if role.flag]
    return [name for name in ("checkpoint", "variant", *flags) if getattr(options, name)]


def _named(options: SourceOptions, role: Role) -> str | None:
    """What the user named for a role."""
    return getattr(options, role.name) if role.flag else None


def _skipped(options: SourceOptions, role: Role) -> bool:
    """Whether the user left a role out on purpose."""
    return bool(role.skip) and getattr(options, role.skip)


def resolve(
    options: SourceOptions,
    family: Family,
    fetched: Mapping[str, tuple[Path, str]] | None = None,
    scratch: Path | None = None,
) -> tuple[Files, dict[str, str]]:
    """Find every role's file, downloading what is named by repository.

    fetched: role -> (file, origin) of files that the user did not name. scratch: see `conversion`.

    Returns the local files and role -> where it came from (`repository@commit:file` for downloads).
    Raises ConfigError for an option that is none of this family's, CheckpointError that names what is missing, what
    lies there instead, the file names looked for and where they are published.
    """
    located = locate(options, family, set(fetched or ()))
    files = dict(fetched or {}) | {
        role.name: _take(located[role.name], role, options, scratch) for role in family.roles if role.name in located
    }
    order = [role.name for role in family.roles if role.name in files]
    return Files(family, {role: files[role][0] for role in order}), {role: files[role][1] for role in order}


def to_fetch(options: SourceOptions, family: Family) -> list[tuple[str, int]]:
    """(origin, bytes) of what `resolve` would download from repositories that the user named. Raises as it does."""
    fetched = set(unnamed(options, family))
    located = locate(options, family, fetched).values()
    sizes = {(file.place.origin(name), file.place.to_fetch(name)) for file in located for name in _all_names(file)}
    return sorted((origin, size) for origin, size in sizes if size is not None)


def locate(options: SourceOptions, family: Family, fetched: set[str]) -> dict[str, LocatedFile]:
    """Each role's file, where the user named it or a place that holds it. fetched: roles that need none."""
    _check_options(options, family)
    place = None if options.checkpoint is None else open_place(options.checkpoint, offline=options.offline)
    located: dict[str, LocatedFile] = {}
    missing: list[str] = []
    hints: list[str] = []
    for role in family.roles:
        if _skipped(options, role):
            continue
        file: LocatedFile | None = None
        if stated := _named(options, role):
            file = _find(stated, role, options)
        elif place is not None:
            file = _look(place, role, _variant(role, family, options))
        if file is not None:
            located[role.name] = file
        elif not role.optional and role.name not in fetched:
            missing.append(_missing_line(role, None if role.made_from else _variant(role, family, options)))
            hints += [role.hint] if role.hint else []
    if missing:
        lines = ["files are missing:", *(f"  {line}" for line in missing), *hints]
        raise CheckpointError("\n".join(lines + (_instead(place, family, options) if place else [])))
    return located


def _check_options(source: SourceOptions, family: Family) -> None:
    """Refuse options for files that this family does not have."""
    flags = [role.name for role in family.roles if role.flag]
    accepted = {"checkpoint", "variant", "convert_bin", "any_digest", "offline", *flags}
    accepted |= {role.skip for role in family.roles}
    strange = [name for name in source.__struct_fields__ if getattr(source, name) and name not in accepted]
    if strange:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        takes = " and ".join(["--checkpoint DIR", *(f"--{name} FILE" for name in flags)])
        raise ConfigError(f"{options}: {family.name} has no such file; it takes {takes}")
    if source.variant is not None and (source.checkpoint is None or not re.fullmatch(r"[\w-]+", source.variant)):
        raise ConfigError(
            f"--variant {source.variant} goes with --checkpoint: the word before .safetensors in its weights' names"
        )


def _variant(role: Role, family: Family, options: SourceOptions) -> str | None:
    """Networks have variants; adapters and prompts have none."""
    return options.variant if role.name in family.weights or role.made_from else None


def _missing_line(role: Role, variant: str | None) -> str:
    """One line on a missing file."""
    names = [next(_stored_names(name, variant)) for name in role.files]
    shards = f", or an index of shards ({names[0]}.index.json)" if names[0].endswith(_WEIGHTS) else ""
    option = f"give --{role.name} FILE, or put" if role.flag else "put"
    return f"{role.name}: {option} {' or '.join(names)}{shards} in --checkpoint DIR ({role.where})"


def _instead(place: Place, family: Family, source: SourceOptions) -> list[str]:
    """What lies in the place, and where in it the files are, if they are somewhere in it."""
    lines = describe(place)
    needed = [role for role in family.roles if role.name in family.weights]
    for folder in subfolders(place):
        if all(_look(place.inside(folder), role, source.variant) is not None for role in needed):
            option = f"--checkpoint {source.checkpoint}{'/' if isinstance(place, Folder) else ':'}{folder}"
            return [*lines, f"  its folder {folder} holds them: say {option}"]
    weights = sorted(
        f"{folder}/{name}" if folder else name
        for folder in {"", *(name.rpartition("/")[0] for role in needed for name in role.files)}
        for name in place.names(folder)
        if name.endswith((_WEIGHTS, ".index.json"))
    )
    variant = re.compile(r"\.(\w+)(-\d{5}-of-\d{5})?\.safetensors$")
    if variants := sorted({match[1] for name in weights if (match := variant.search(name))}):
        lines.append(f"  there are weights of the variant {' and '.join(variants)}: --variant {variants[0]} takes them")
    elif weights and all(role.flag for role in needed):
        options = " or ".join(f"--{role.name}" for role in needed)
        lines.append(f"  if {weights[0]} is one of them under another name, say so with {options}")
    return lines


def _stored_names(name: str, variant: str | None) -> Iterator[str]:
    """The names under which diffusers and the Hub keep a file: whole or in shards, and in a variant."""
    if not name.endswith(_WEIGHTS):
        yield name
        return
    stem = name.removesuffix(_WEIGHTS)
    for kind in (variant,) if variant else ("", _HALF):
        file_name = f"{stem}.{kind}{_WEIGHTS}" if kind else name
        yield file_name
        yield f"{file_name}.index.json"
        if kind:
            yield f"{name}.index.{kind}.json"


def _look(place: Place, role: Role, variant: str | None) -> LocatedFile | None:
    """A role's file in a place: safetensors before pickles, and what it can be computed from at last."""
    if (name := _first(place, role.files, None if role.made_from else variant)) is not None:
        return LocatedFile(place, name)
    encoder = [f"{role.made_from}/{stem}{_WEIGHTS}" for stem in ("model", "pytorch_model")] if role.made_from else []
    if (name := _first(place, encoder, variant) or _first(place, encoder, None)) is not None:
        return LocatedFile(place, name, encoder=True)
    return None


def _first(place: Place, names: tuple[str, ...] | list[str], variant: str | None) -> str | None:
    candidates = [candidate for name in names for candidate in _stored_names(name, variant)]
    if (first := next(filter(place.has, candidates), None)) is not None:
        return first
    for stem in (candidate.removesuffix(_WEIGHTS) for candidate in candidates):
        for suffix in PICKLES:
            if place.has(f"{stem}{suffix}"):
                return f"{stem}{suffix}"
            if place.has(f"{stem}{suffix}.index.json"):
                raise CheckpointError(
                    f"{place.origin(stem + suffix)}.index.json names shards that are pickle files. Load the model "
                    "where you trust it and save it again in safetensors (save_pretrained)"
                )
    return None


def _all_names(file: LocatedFile) -> list[str]:
    """A file's name and those of the files that come with it: its shards, or what a text encoder is run with."""
    folder, _, name = file.name.rpartition("/")
    names = [file.name]
    if is_index(Path(name)):
        stem = re.escape(name.partition(_WEIGHTS)[0])
        shards = [entry for entry in file.place.names(folder) if re.fullmatch(rf"{stem}.*-of-\d+\.safetensors", entry)]
        names += [f"{folder}/{shard}" if folder else shard for shard in shards]
    if file.encoder:
        names += [f"{folder}/config.json"]
        names += [f"tokenizer/{entry}" for entry in file.place.names("tokenizer") if not entry.endswith("/")]
    return names


def _take(file: LocatedFile, role: Role, options: SourceOptions, scratch: Path | None) -> tuple[Path, str]:
    """The file on this machine, in a form that is read, and where it came from."""
    path, origin = file.place.get(file.name), file.place.origin(file.name)
    path, note = _readable(path, convert=options.convert_bin, scratch=scratch)
    if not file.encoder:
        return path, origin + note
    config = file.place.get(f"{role.made_from}/config.json")
    for name in _all_names(file)[1:]:
        file.place.get(name)
    directory = config.parent.parent
    return empty_prompt(directory, path, scratch), f"computed with {origin.rpartition('/')[0]}"


def _readable(path: Path, *, convert: bool, scratch: Path | None) -> tuple[Path, str]:
    """The file, or what was made of a pickle, and a note on that. Raises CheckpointError for what cannot be read."""
    require_readable(path)
    require_whole(path)
    if path.suffix in (".json", ".npz") or not is_pickle(path):
        return path, ""
    if not convert:
        raise CheckpointError(
            f"{path} is a pickle file, which can run any code when it is loaded, and there is no safetensors file. "
            "With --convert-bin densegeo reads it as weights alone (torch.load with weights_only=True) and keeps "
            "them as safetensors in its cache"
        )
    return converted(path, scratch), " (converted)"


def _find(value: str, role: Role, options: SourceOptions) -> LocatedFile:
    """What an option of its own names. Raises CheckpointError."""
    path = Path(value).expanduser()
    if path.is_file() or path.is_symlink():
        return LocatedFile(Folder(path.parent), path.name)
    if path.is_dir():
        return _in_folder(path, role, options)
    if path.suffix in _FILE_SUFFIXES and not re.search(r"[@:]", value):
        raise CheckpointError(f"--{role.name} {value} does not exist")
    match = REPOSITORY.fullmatch(value)
    if not match:
        raise CheckpointError(
            f"--{role.name} {value} is neither a file nor a repository id (organisation/name[@revision][:file])"
        )
    repository, revision, name = match.groups()
    place = open_repository(repository, revision, None, offline=options.offline)
    if name is not None and place.has(name):
        return LocatedFile(place, name)
    if name is None and (file := _look(place, role, None)) is not None:
        return file
    names = name or " or ".join(role.files)
    raise CheckpointError("\n".join([f"the repository {place.title} has no {names}", *describe(place)]))


def _in_folder(path: Path, role: Role, options: SourceOptions) -> LocatedFile:
    """The one file of weights in a directory that was named for a role. Raises CheckpointError where it is not one."""
    place = Folder(snapshot(path))
    if (file := _look(place, role, options.variant)) is not None and not file.encoder:
        return file
    names = place.names()
    indices = [name for name in names if name.endswith(INDEX)]
    weights = indices or [name for name in names if name.endswith(_WEIGHTS)]
    if len(weights) == 1:
        return LocatedFile(place, weights[0])
    raise CheckpointError(
        "\n".join([f"--{role.name} {path} is a directory: name the file in it, or use --checkpoint", *describe(place)])
    )
