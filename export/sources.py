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


class Given(msgspec.Struct, frozen=True, kw_only=True):
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
class Found:
    """A role's file, not fetched yet. made: whether the file is a text encoder, from which the prompt is computed."""

    place: Place
    name: str
    made: bool = False


def unnamed(given: Given, family: Family) -> list[str]:
    """The roles for which the user named neither a file nor a place that may hold it."""
    if given.checkpoint is not None:
        return []
    return [role.name for role in family.roles if not (role.optional or _skipped(given, role) or _named(given, role))]


def named(given: Given, family: Family) -> list[str]:
    """The options by which the user named files or a place that holds them."""
    flags = [role.name for role in family.roles if role.flag]
    return [name for name in ("checkpoint", "variant", *flags) if getattr(given, name)]


def _named(given: Given, role: Role) -> str | None:
    """What the user named for a role."""
    return getattr(given, role.name) if role.flag else None


def _skipped(given: Given, role: Role) -> bool:
    """Whether the user left a role out on purpose."""
    return bool(role.skip) and getattr(given, role.skip)


def resolve(
    given: Given,
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
    found = locate(given, family, set(fetched or ()))
    taken = dict(fetched or {}) | {
        role.name: _take(found[role.name], role, given, scratch) for role in family.roles if role.name in found
    }
    order = [role.name for role in family.roles if role.name in taken]
    return Files(family, {role: taken[role][0] for role in order}), {role: taken[role][1] for role in order}


def to_fetch(given: Given, family: Family) -> list[tuple[str, int]]:
    """(origin, bytes) of what `resolve` would download from repositories that the user named. Raises as it does."""
    fetched = set(unnamed(given, family))
    found = locate(given, family, fetched).values()
    wanted = {(one.place.origin(name), one.place.to_fetch(name)) for one in found for name in _all_names(one)}
    return sorted((origin, size) for origin, size in wanted if size is not None)


def locate(given: Given, family: Family, fetched: set[str]) -> dict[str, Found]:
    """Each role's file, where the user named it or a place that holds it. fetched: roles that need none."""
    _check_options(given, family)
    place = None if given.checkpoint is None else open_place(given.checkpoint, offline=given.offline)
    found: dict[str, Found] = {}
    missing: list[str] = []
    hints: list[str] = []
    for role in family.roles:
        if _skipped(given, role):
            continue
        own = _named(given, role)
        one = _find(own, role, given) if own else _look(place, role, _variant(role, family, given)) if place else None
        if one is not None:
            found[role.name] = one
        elif not role.optional and role.name not in fetched:
            missing.append(_wanted(role, None if role.made_from else _variant(role, family, given)))
            hints += [role.hint] if role.hint else []
    if missing:
        lines = ["files are missing:", *(f"  {line}" for line in missing), *hints]
        raise CheckpointError("\n".join(lines + (_instead(place, family, given) if place else [])))
    return found


def _check_options(given: Given, family: Family) -> None:
    """Refuse options for files that this family does not have."""
    flags = [role.name for role in family.roles if role.flag]
    known = {"checkpoint", "variant", "convert_bin", "any_digest", "offline", *flags}
    known |= {role.skip for role in family.roles}
    strange = [name for name in given.__struct_fields__ if getattr(given, name) and name not in known]
    if strange:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        takes = " and ".join(["--checkpoint DIR", *(f"--{name} FILE" for name in flags)])
        raise ConfigError(f"{options}: {family.name} has no such file; it takes {takes}")
    if given.variant is not None and (given.checkpoint is None or not re.fullmatch(r"[\w-]+", given.variant)):
        raise ConfigError(
            f"--variant {given.variant} goes with --checkpoint: the word before .safetensors in its weights' names"
        )


def _variant(role: Role, family: Family, given: Given) -> str | None:
    """Networks have variants; adapters and prompts have none."""
    return given.variant if role.name in family.weights or role.made_from else None


def _wanted(role: Role, variant: str | None) -> str:
    """One line on a missing file."""
    names = [next(_forms(name, variant)) for name in role.files]
    shards = f", or an index of shards ({names[0]}.index.json)" if names[0].endswith(_WEIGHTS) else ""
    option = f"give --{role.name} FILE, or put" if role.flag else "put"
    return f"{role.name}: {option} {' or '.join(names)}{shards} in --checkpoint DIR ({role.where})"


def _instead(place: Place, family: Family, given: Given) -> list[str]:
    """What lies in the place, and where in it the files are, if they are somewhere in it."""
    lines = describe(place)
    needed = [role for role in family.roles if role.name in family.weights]
    for folder in subfolders(place):
        if all(_look(place.inside(folder), role, given.variant) is not None for role in needed):
            where = f"--checkpoint {given.checkpoint}{'/' if isinstance(place, Folder) else ':'}{folder}"
            return [*lines, f"  its folder {folder} holds them: say {where}"]
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


def _forms(name: str, variant: str | None) -> Iterator[str]:
    """The names under which diffusers and the Hub keep a file: whole or in shards, and in a variant."""
    if not name.endswith(_WEIGHTS):
        yield name
        return
    stem = name.removesuffix(_WEIGHTS)
    for kind in (variant,) if variant else ("", _HALF):
        whole = f"{stem}.{kind}{_WEIGHTS}" if kind else name
        yield whole
        yield f"{whole}.index.json"
        if kind:
            yield f"{name}.index.{kind}.json"


def _look(place: Place, role: Role, variant: str | None) -> Found | None:
    """A role's file in a place: safetensors before pickles, and what it can be computed from at last."""
    if (name := _first(place, role.files, None if role.made_from else variant)) is not None:
        return Found(place, name)
    encoder = [f"{role.made_from}/{stem}{_WEIGHTS}" for stem in ("model", "pytorch_model")] if role.made_from else []
    if (name := _first(place, encoder, variant) or _first(place, encoder, None)) is not None:
        return Found(place, name, made=True)
    return None


def _first(place: Place, names: tuple[str, ...] | list[str], variant: str | None) -> str | None:
    if (found := next((form for name in names for form in _forms(name, variant) if place.has(form)), None)) is not None:
        return found
    for stem in (form.removesuffix(_WEIGHTS) for name in names for form in _forms(name, variant)):
        for suffix in PICKLES:
            if place.has(f"{stem}{suffix}"):
                return f"{stem}{suffix}"
            if place.has(f"{stem}{suffix}.index.json"):
                raise CheckpointError(
                    f"{place.origin(stem + suffix)}.index.json names shards that are pickle files. Load the model "
                    "where you trust it and save it again in safetensors (save_pretrained)"
                )
    return None


def _all_names(found: Found) -> list[str]:
    """A file's name and those of the files that come with it: its shards, or what a text encoder is run with."""
    folder, _, name = found.name.rpartition("/")
    names = [found.name]
    if is_index(Path(name)):
        stem = re.escape(name.partition(_WEIGHTS)[0])
        shards = [one for one in found.place.names(folder) if re.fullmatch(rf"{stem}.*-of-\d+\.safetensors", one)]
        names += [f"{folder}/{shard}" if folder else shard for shard in shards]
    if found.made:
        names += [f"{folder}/config.json"]
        names += [f"tokenizer/{one}" for one in found.place.names("tokenizer") if not one.endswith("/")]
    return names


def _take(found: Found, role: Role, given: Given, scratch: Path | None) -> tuple[Path, str]:
    """The file on this machine, in a form that is read, and where it came from."""
    path, origin = found.place.get(found.name), found.place.origin(found.name)
    path, note = _readable(path, convert=given.convert_bin, scratch=scratch)
    if not found.made:
        return path, origin + note
    config = found.place.get(f"{role.made_from}/config.json")
    for name in _all_names(found)[1:]:
        found.place.get(name)
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


def _find(value: str, role: Role, given: Given) -> Found:
    """What an option of its own names. Raises CheckpointError."""
    path = Path(value).expanduser()
    if path.is_file() or path.is_symlink():
        return Found(Folder(path.parent), path.name)
    if path.is_dir():
        return _in_folder(path, role, given)
    if path.suffix in _FILE_SUFFIXES and not re.search(r"[@:]", value):
        raise CheckpointError(f"--{role.name} {value} does not exist")
    match = REPOSITORY.fullmatch(value)
    if not match:
        raise CheckpointError(
            f"--{role.name} {value} is neither a file nor a repository id (organisation/name[@revision][:file])"
        )
    repository, revision, name = match.groups()
    place = open_repository(repository, revision, None, offline=given.offline)
    if name is not None and place.has(name):
        return Found(place, name)
    if name is None and (found := _look(place, role, None)) is not None:
        return found
    looked = name or " or ".join(role.files)
    raise CheckpointError("\n".join([f"the repository {place.title} has no {looked}", *describe(place)]))


def _in_folder(path: Path, role: Role, given: Given) -> Found:
    """The one file of weights in a directory that was named for a role. Raises CheckpointError where it is not one."""
    place = Folder(snapshot(path))
    if (found := _look(place, role, given.variant)) is not None and not found.made:
        return found
    names = place.names()
    indices = [name for name in names if name.endswith(INDEX)]
    weights = indices or [name for name in names if name.endswith(_WEIGHTS)]
    if len(weights) == 1:
        return Found(place, weights[0])
    raise CheckpointError(
        "\n".join([f"--{role.name} {path} is a directory: name the file in it, or use --checkpoint", *describe(place)])
    )
