"""Where a model's files come from: local paths, a directory with the authors' file names, or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from densegeo.errors import CheckpointError, ConfigError
from densegeo.export.conversion import converted, empty_prompt
from densegeo.models.families import Family
from densegeo.models.loading import Files
from densegeo.models.roles import Role

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the user named: each a path or `organisation/repository[@revision][:file]`."""

    checkpoint: str | None = None  # a directory or repository that holds several of the files
    dit: str | None = None
    vae: str | None = None
    lora: str | None = None
    prompt: str | None = None
    config: str | None = None
    no_lora: bool = False
    any_digest: bool = False  # take published files that are not the recorded ones
    offline: bool = False  # take published files that were fetched before, and fetch none
    convert_bin: bool = False  # read pickled weights, as weights alone, where a directory has no safetensors


def unnamed(given: Given, family: Family) -> list[str]:
    """The roles for which the user named neither a file nor a place that may hold it."""
    if given.checkpoint is not None:
        return []
    return [role.name for role in family.roles if not (role.optional or _skipped(given, role) or _named(given, role))]


def _named(given: Given, role: Role) -> str | None:
    """What the user named for a role."""
    return getattr(given, role.name) if role.flag else None


def _skipped(given: Given, role: Role) -> bool:
    """Whether the user left a role out on purpose."""
    return bool(role.skip) and getattr(given, role.skip)


def resolve(
    given: Given, family: Family, fetched: Mapping[str, tuple[Path, str]] | None = None
) -> tuple[Files, dict[str, str]]:
    """Find every role's file, downloading what is named by repository.

    fetched: role -> (file, origin) of files that the user did not name.

    Returns the local files and role -> where it came from (`repository@commit:file` for downloads).
    Raises ConfigError for an option that is none of this family's, CheckpointError that names what is missing, the
    file names looked for and where they are published.
    """
    _check_options(given, family)
    paths: dict[str, Path] = {}
    origins: dict[str, str] = {}
    missing: list[str] = []
    hints: list[str] = []
    for role in family.roles:
        if _skipped(given, role):
            continue
        own = _named(given, role)
        found = _find(own, role) if own else _find_in_checkpoint(given.checkpoint, role)
        if found is None:
            found = (fetched or {}).get(role.name)
        if found is None and given.checkpoint is not None:
            found = _make(Path(given.checkpoint), role, convert=given.convert_bin)
        if found is None and not role.optional:
            names = " or ".join(role.files)
            option = f"give --{role.name} FILE, or put" if role.flag else "put"
            missing.append(f"{role.name}: {option} {names} in --checkpoint DIR ({role.where})")
            hints += [role.hint] if role.hint else []
        if found is not None:
            paths[role.name], origins[role.name] = found
    if missing:
        raise CheckpointError("\n".join(["files are missing:", *(f"  {line}" for line in missing), *hints]))
    return Files(family, paths), origins


def _check_options(given: Given, family: Family) -> None:
    """Refuse options for files that this family does not have."""
    flags = [role.name for role in family.roles if role.flag]
    known = {"checkpoint", "convert_bin", "any_digest", "offline", *flags, *(role.skip for role in family.roles)}
    strange = [name for name in given.__struct_fields__ if getattr(given, name) and name not in known]
    if strange:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in strange)
        takes = " and ".join(["--checkpoint DIR", *(f"--{name} FILE" for name in flags)])
        raise ConfigError(f"{options}: {family.name} has no such file; it takes {takes}")


def _find_in_checkpoint(checkpoint: str | None, role: Role) -> tuple[Path, str] | None:
    if checkpoint is None or not role.files:
        return None
    directory = Path(checkpoint)
    if directory.is_dir():
        for name in role.files:
            if (directory / name).is_file():
                return directory / name, str(directory / name)
        return None
    if directory.exists() or not _REPOSITORY.fullmatch(checkpoint):
        raise CheckpointError(
            f"--checkpoint {checkpoint} is neither a directory nor a repository id (organisation/name)"
        )
    return _download(checkpoint, role, required=False)


def _make(directory: Path, role: Role, *, convert: bool) -> tuple[Path, str] | None:
    """What a diffusers directory holds in another form, or what can be computed from it."""
    for name in role.files:
        pickle = (directory / name).with_suffix(".bin")
        if "/" in name and name.endswith(".safetensors") and pickle.is_file():
            if not convert:
                raise CheckpointError(
                    f"{pickle} is a pickle file, and there is no {name}. With --convert-bin densegeo reads it as "
                    "weights alone (torch.load with weights_only=True) and keeps them as safetensors in its cache."
                )
            return converted(pickle), f"{pickle} (converted)"
    if role.made_from and (directory / role.made_from).is_dir():
        return empty_prompt(directory), f"computed with {directory / role.made_from}"
    return None


def _find(value: str, role: Role) -> tuple[Path, str]:
    path = Path(value)
    if path.is_file():
        return path, str(path)
    if path.is_dir():
        raise CheckpointError(
            f"--{role.name} {value} is a directory; name the file, or use --checkpoint for a directory"
        )
    if path.suffix in {".safetensors", ".npz", ".pt", ".ckpt", ".pth", ".bin"} and not re.search(r"[@:]", value):
        raise CheckpointError(f"--{role.name} {value} does not exist")
    if not _REPOSITORY.fullmatch(value):
        raise CheckpointError(
            f"--{role.name} {value} is neither a file nor a repository id (organisation/name[@revision][:file])"
        )
    found = _download(value, role, required=True)
    assert found is not None
    return found


def _download(value: str, role: Role, *, required: bool) -> tuple[Path, str] | None:
    """Download a role's file at a pinned commit; None when the repository lacks it and it is not required."""
    from huggingface_hub import HfApi, hf_hub_download

    match = _REPOSITORY.fullmatch(value)
    assert match
    repository, revision, name = match.groups()
    try:
        info = HfApi().model_info(repository, revision=revision)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        wanted = [name] if name else [candidate for candidate in role.files if candidate in files]
        if not wanted or wanted[0] not in files:
            if not required:
                return None
            looked = name or " or ".join(role.files)
            raise CheckpointError(f"the repository {repository} at {info.sha} has no {looked}; it has {sorted(files)}")
        local = hf_hub_download(repository, wanted[0], revision=info.sha)
    except CheckpointError:
        raise
    except Exception as error:  # network, authentication, missing repository: one message for all
        raise CheckpointError(
            f"cannot download {role.name} from {value}: {error}. Check the name and the network, or download the files "
            + (f"by hand and pass --{role.name} FILE" if role.flag else "by hand and pass --checkpoint DIR")
        ) from error
    return Path(local), f"{repository}@{info.sha}:{wanted[0]}"
