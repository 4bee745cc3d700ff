"""Where a model's files come from: local paths, a directory with the authors' file names, or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec

from densegeo.errors import CheckpointError
from densegeo.models.loading import Files
from densegeo.models.presets import AUTHORS_FILES, ROLES
from densegeo.runtime.bundle import Source, sha256_file

_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?(?::(.+))?")
_WHERE = {
    "dit": "published as stepfun-ai/Step1X-Edit on the Hugging Face Hub",
    "vae": "published as stepfun-ai/Step1X-Edit on the Hugging Face Hub",
    "lora": "published as exander/FE2E on the Hugging Face Hub",
    "prompt": "in the authors' code repository AMAP-ML/FE2E, folder latent/",
}


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the user named: each a path or `organisation/repository[@revision][:file]`."""

    checkpoint: str | None = None  # a directory or repository that holds several of the files
    dit: str | None = None
    vae: str | None = None
    lora: str | None = None
    prompt: str | None = None
    config: str | None = None
    no_lora: bool = False


def resolve(given: Given) -> tuple[Files, dict[str, str]]:
    """Find every role's file, downloading what is named by repository.

    Returns the local files and role -> where it came from (`repository@commit:file` for downloads).
    Raises CheckpointError that names what is missing, the file names looked for and where they are published.
    """
    paths: dict[str, Path] = {}
    origins: dict[str, str] = {}
    missing: list[str] = []
    for role in ROLES:
        if role == "lora" and given.no_lora:
            continue
        own = getattr(given, role)
        found = _find(own, role) if own else _find_in_checkpoint(given.checkpoint, role)
        if found is None:
            names = " or ".join(name for name in AUTHORS_FILES[role] if "/" not in name)
            missing.append(f"{role}: give --{role} FILE, or put {names} in --checkpoint DIR ({_WHERE[role]})")
            continue
        paths[role], origins[role] = found
    if missing:
        hint = "\nWithout the FE2E LoRA the base model edits images instead: --no-lora skips it on purpose."
        raise CheckpointError(
            "files are missing:\n  "
            + "\n  ".join(missing)
            + (hint if any(m.startswith("lora") for m in missing) else "")
        )
    config = Path(given.config) if given.config else None
    if config:
        origins["config"] = str(config)
    return Files(paths["dit"], paths["vae"], paths["prompt"], paths.get("lora"), config), origins


def _find_in_checkpoint(checkpoint: str | None, role: str) -> tuple[Path, str] | None:
    if checkpoint is None:
        return None
    directory = Path(checkpoint)
    if directory.is_dir():
        for name in AUTHORS_FILES[role]:
            if (directory / name).is_file():
                return directory / name, str(directory / name)
        return None
    if directory.exists() or not _REPOSITORY.fullmatch(checkpoint):
        raise CheckpointError(
            f"--checkpoint {checkpoint} is neither a directory nor a repository id (organisation/name)"
        )
    return _download(checkpoint, role, required=False)


def _find(value: str, role: str) -> tuple[Path, str]:
    path = Path(value)
    if path.is_file():
        return path, str(path)
    if path.is_dir():
        raise CheckpointError(f"--{role} {value} is a directory; name the file, or use --checkpoint for a directory")
    if path.suffix in {".safetensors", ".npz", ".pt", ".ckpt", ".pth", ".bin"} and not re.search(r"[@:]", value):
        raise CheckpointError(f"--{role} {value} does not exist")
    if not _REPOSITORY.fullmatch(value):
        raise CheckpointError(
            f"--{role} {value} is neither a file nor a repository id (organisation/name[@revision][:file])"
        )
    found = _download(value, role, required=True)
    assert found is not None
    return found


def _download(value: str, role: str, *, required: bool) -> tuple[Path, str] | None:
    """Download a role's file at a pinned commit; None when the repository lacks it and it is not required."""
    from huggingface_hub import HfApi, hf_hub_download

    match = _REPOSITORY.fullmatch(value)
    assert match
    repository, revision, name = match.groups()
    try:
        info = HfApi().model_info(repository, revision=revision)
        files = {sibling.rfilename for sibling in info.siblings or ()}
        wanted = [name] if name else [candidate for candidate in AUTHORS_FILES[role] if candidate in files]
        if not wanted or wanted[0] not in files:
            if not required:
                return None
            looked = name or " or ".join(AUTHORS_FILES[role])
            raise CheckpointError(f"the repository {repository} at {info.sha} has no {looked}; it has {sorted(files)}")
        local = hf_hub_download(repository, wanted[0], revision=info.sha)
    except CheckpointError:
        raise
    except Exception as error:  # network, authentication, missing repository: one message for all
        raise CheckpointError(
            f"cannot download {role} from {value}: {error}. Check the name and the network, or download the file "
            f"by hand and pass --{role} FILE"
        ) from error
    return Path(local), f"{repository}@{info.sha}:{wanted[0]}"


def digests(files: Files, origins: dict[str, str], progress: Callable[[int], object] | None = None) -> list[Source]:
    """Size and SHA-256 of every input file."""
    sources = []
    for role in (*ROLES, "config"):
        path: Path | None = getattr(files, role)
        if path is not None:
            sources.append(Source(role, origins[role], path.stat().st_size, sha256_file(path, progress)))
    return sources
