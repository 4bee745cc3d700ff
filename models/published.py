"""Where the models' files are published, as rows: pinned revisions, digests and licences, for downloads and errors.

Imports nothing heavy: `densegeo fetch` runs without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from densegeo.models.roles import FE2E_ROLES, FIFFDEPTH_ROLES, Role


@dataclass(frozen=True)
class Published:
    """One file. sha256, git_blob: the digests that are known of it; the latter is git's SHA-1 of a blob.

    licence: in words, or empty where none is known. The file's size is what the server says.
    """

    role: str  # of the model's family
    repository: str  # organisation/name
    revision: str  # a commit
    path: str
    licence: str
    site: Literal["hub", "github"] = "hub"
    sha256: str = ""
    git_blob: str = ""
    mirrored_in: str = ""  # for a file of GitHub: the Hub's repository whose mirrors may hold it too, under its name

    @property
    def origin(self) -> str:
        """How manifests and messages name it."""
        return f"{'github:' if self.site == 'github' else ''}{self.repository}@{self.revision}:{self.path}"

    @property
    def page(self) -> str:
        """Where people find it."""
        host = "https://github.com" if self.site == "github" else "https://huggingface.co"
        return f"{host}/{self.repository}/blob/{self.revision}/{self.path}"


@dataclass(frozen=True)
class Publication:
    """A model's files. nowhere: what to do where it is not known where they are published. carried: with densegeo.

    roles: of the model's family, which say what can be left out.
    """

    model: str
    files: tuple[Published, ...] = ()
    nowhere: str = ""
    carried: bool = False
    roles: tuple[Role, ...] = ()

    def needed_roles(self, *skipped: str) -> list[str]:
        """The roles of the files, without those that a switch in `skipped` leaves out."""
        left_out = {role.name for role in self.roles if role.skip in skipped}
        return [file.role for file in self.files if file.role not in left_out]


_FE2E, _FE2E_REVISION = "exander/FE2E", "4c52e5e3d133e4111f6099b57879d517dd8677b8"
_STEP1X = "a file of stepfun-ai/Step1X-Edit, which is Apache-2.0"

_FE2E_FILES = (
    Published(
        "dit",
        _FE2E,
        _FE2E_REVISION,
        "pretrain/step1x-edit-i1258.safetensors",
        _STEP1X,
        sha256="f378db311e6db3535bbed367160fda7f65661c1d2474cffeaded47288c00a24a",
    ),
    Published(
        "vae",
        _FE2E,
        _FE2E_REVISION,
        "pretrain/vae.safetensors",
        _STEP1X,
        sha256="afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38",
    ),
    Published(
        "lora",
        _FE2E,
        _FE2E_REVISION,
        "LDRN.safetensors",
        "",
        sha256="9c2112d3697d6057a60d59b3d83fc0d88ea12d73f933666eded0c5dbf5e0f410",
    ),
    Published(
        "prompt",
        "AMAP-ML/FE2E",
        "262d4c9d4c37752c984304f57ca7d7066f34ad5d",
        "latent/no_info.npz",
        "MIT, as the authors' code",
        site="github",
        git_blob="cda077b9c036ca576d7f96eb7633dff1a26c2ea3",
        mirrored_in=_FE2E,
    ),
)
_FIFFDEPTH = (
    "FiffDepth's authors (github.com/yunpeng1998/FiffDepth) do not say where their weights are published, and their "
    "repository has no licence: get the diffusers directory that their code calls checkpoints/fiffdepth from them, and "
    "pass --checkpoint DIR."
)
PUBLICATIONS = {
    row.model: row
    for row in (
        Publication("fe2e", _FE2E_FILES, roles=FE2E_ROLES),
        Publication("fiffdepth", nowhere=_FIFFDEPTH, roles=FIFFDEPTH_ROLES),
        Publication("fe2e-tiny", carried=True, roles=FE2E_ROLES),
    )
}
