"""The bundle: a directory holding everything the runtime needs, described by `manifest.json`.

The builder writes it (`densegeo.export`), the runtime reads it; this module is all the two share.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from densegeo.errors import BundleError, DigestError, SchemaVersionError
from densegeo.kernels.contract import LaunchContract
from densegeo.outputs import Decode
from densegeo.precision import PRECISIONS
from densegeo.runtime.ready import FOLDER
from densegeo.size import Size

SCHEMA_VERSION = 10
MANIFEST = "manifest.json"
KERNELS = "kernels"  # the folder of compiled kernels

Stage = Literal["encoder", "denoiser", "decoder"]
STAGES: tuple[Stage, ...] = ("encoder", "denoiser", "decoder")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all manifest records: immutable, and strict about unknown fields."""


class TensorSpec(Record, frozen=True):
    name: str
    dtype: str  # numpy name: "float32"
    shape: list[int]


class Graph(Record, frozen=True):
    """One ONNX graph, with what it costs."""

    file: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    nodes: int
    parameters: int  # elements of the floating-point initialisers
    flops: int  # per run; multiply-add = 2; MatMul, Gemm, Conv, ConvTranspose


def bucket_name(size: Size, batch: int = 1) -> str:
    """ "1024x768"; "1024x768_b4" of four images at once."""
    return f"{size}" + (f"_b{batch}" if batch > 1 else "")


class Bucket(Record, frozen=True):
    """One fixed image size, and three graphs that take `batch` images of it at once (B below).

    encoder: rgb (B, 3, H, W) in [-1, 1] -> latent (B, C, h, w), scaled and shifted; h, w: H / 8, W / 8 rounded down.
    denoiser: latent -> output, see `outputs.Decode`.
    decoder: latents (N, C, h, w) -> decoded (N, 3 or 1, 8h, 8w), all pictures of the first output first; N: B times as
    many as the model has outputs, or B.
    """

    width: Annotated[int, msgspec.Meta(ge=1)]
    height: Annotated[int, msgspec.Meta(ge=1)]
    encoder: Graph
    denoiser: Graph
    decoder: Graph
    batch: Annotated[int, msgspec.Meta(ge=1)] = 1

    @property
    def size(self) -> Size:
        """Of its images."""
        return Size(self.width, self.height)

    @property
    def name(self) -> str:
        """What tells it from the bundle's others, see `bucket_name`."""
        return bucket_name(self.size, self.batch)

    @property
    def decodes_at_once(self) -> int:
        """How many latents one run of the decoder takes."""
        return self.decoder.inputs[0].shape[0]


class Networks(Record, frozen=True):
    """What the torch backend makes the modules from that the weight files belong to."""

    family: str  # of models.families: "fe2e", "fiffdepth"
    denoiser: dict[str, Any]  # fields of models.config.TransformerConfig or UNetConfig
    vae: dict[str, Any]  # fields of models.config.VAEConfig
    prompt: str  # file with the prompt's embedding


class Engine(Record, frozen=True, kw_only=True):
    """One TensorRT engine: everything it depends on, where it lies, and what its build told.

    `fingerprint` covers the fields before it (see `runtime.engines.fingerprint`): equal ones need no rebuild.
    """

    stage: Stage
    bucket: str  # its name: "1024x768", "1024x768_b4"
    graph_sha256: str
    weights_sha256: str
    precision: str
    library: str  # "tensorrt" or "tensorrt_rtx"
    version: str  # of the library
    architectures: list[str]  # "sm_89"; empty: every GPU from Ampere on that the library knows
    weights: Literal["constant", "input"]  # in the engine, or bound from the stage's weight file
    options: dict[str, int]  # those of the builder that shape the engine
    fingerprint: str
    file: str
    log: str  # the builder's, compressed: what it fused, which formats it chose
    weight_inputs: list[str]  # inputs besides the image: names in the stage's weight file
    seconds: float  # of building
    peak_bytes: int  # resident memory of the builder
    activation_bytes: int  # workspace that a run needs on the device
    weight_bytes: int  # weights in the engine


class FileDigest(Record, frozen=True):
    bytes: int
    sha256: str


class Source(Record, frozen=True):
    """A file the bundle was built from."""

    role: str  # of models.roles: "dit", "unet", "vae", "lora", "prompt", "config" ...
    path: str  # as given, or `repository@revision:file`
    bytes: int
    sha256: str


class Check(Record, frozen=True):
    """One measured error of the build's verification: `error` must not exceed `bound`."""

    bucket: str  # its name
    output: str  # "encoder", "denoiser", "decoder", "prediction", and "normals" where there are any
    reference: str  # what it was compared with
    error: float  # relative L2 norm
    bound: float


class Verification(Record, frozen=True):
    """What was measured when the bundle was built, and what is measured anew where it is to serve.

    inputs: a safetensors file. Of picture n of a size it holds "{size}.{n}.image", uint8 (h, w, 3) of the picture's own
    odd sides; "{size}.{n}.image_prediction" (h, w) and, where there are any, "{size}.{n}.image_normals" (h, w, 3; unit,
    OpenCV frame), which PyTorch's float32 networks make of it; and for diagnosis "{size}.{n}.rgb", what the picture is
    in the bucket, with every stage's float32 "{size}.{n}.{output}" of a run from end to end.
    bounds: relative L2 bounds of a served image's "prediction" and "normals"; replay_bound: of all stages' outputs.
    checks: what the build measured, every stage from the reference of the one before.
    """

    inputs: str
    bounds: dict[str, float]
    replay_bound: float
    checks: list[Check]


class Quantization(Record, frozen=True, kw_only=True):
    """Which layers are 8-bit, and what that did to the calibration's images.

    Layers of the denoiser have their own names, those of the autoencoder "encoder." or "decoder." before theirs.
    depth_error: root mean square change of predictions; normal_error: mean change in degrees; None: not measured.
    """

    format: str  # "fp8" (E4M3) or "int8"
    method: str  # how the inputs' ranges were chosen: "max", "percentile", "mse", "entropy"
    smooth: float  # SmoothQuant's exponent, 0 for none
    linears: list[str]
    attentions: list[str]  # whose two products have fp8 operands
    share: float  # of the parameters of all linears
    depth_error: float | None
    normal_error: float | None
    convolutions: list[str] = []
    convolution_share: float = 0.0  # of the multiply-adds of all convolutions, at the first size
    weight_bits: int = 8  # 7: int8 whose products no processor's sums cut off
    twice: list[str] = []  # of the convolutions: in two products, of the rounded input and of what rounding left
    twice_share: float = 0.0  # as convolution_share, of these


class Choice(Record, frozen=True, kw_only=True):
    """What a build made for which backend, and why: as it was said when it began."""

    backend: str  # of `densegeo.backends`
    precision: str
    architectures: list[int]  # of engines and kernels: 89 is sm_89
    what: str
    why: str
    instead: str  # what to type for another choice


def amount_quantized(share: float, attentions: int, convolutions: float, twice: float = 0.0) -> str:
    """How much of a model is 8-bit, in words.

    share: of the linears' parameters. attentions: how many. convolutions: share of their multiply-adds. twice: of these
    what is done in two products.
    """
    parts = [f"{share:.1%} of the linears' parameters"] if share or not (attentions or convolutions) else []
    parts += [f"{attentions} attentions"] if attentions else []
    doubled = f" ({twice:.1%} in two products)" if twice else ""
    parts += [f"{convolutions:.1%} of the convolutions' operations{doubled}"] if convolutions else []
    return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


class Manifest(Record, frozen=True):
    schema_version: int
    model: str  # a name of models.presets
    precision: str  # a name of precision.PRECISIONS
    base: str  # the floating-point type: the precision itself, or what an 8-bit one leaves
    quantization: Quantization | None  # of 8-bit precisions
    weights_note: str  # empty, or a plain sentence such as "random weights: the picture is not meaningful"
    buckets: list[Bucket]
    decode: Decode
    networks: Networks | None  # None: the graphs alone
    rewrites: list[str]  # applied, in order
    files: dict[str, FileDigest]  # every file of the bundle but the manifest
    sources: list[Source]
    build_key: str  # digest of all inputs and options: equal keys need no rebuild
    versions: dict[str, str]  # of the builder and the libraries it used
    target_architectures: list[str]  # GPU architectures of compiled parts; empty for plain ONNX
    kernels: list[LaunchContract]  # one a binary in `kernels/`
    engines: list[Engine]
    verification: Verification
    options: dict[str, list[str]]  # of `densegeo build`, that make it again: flag -> values, none for a switch
    choice: Choice | None = None  # None: built from Python, with everything given

    def __post_init__(self) -> None:
        row = PRECISIONS.get(self.precision)
        if row is None or self.base not in row.bases:
            raise ValueError(f"there is no precision {self.precision!r} over {self.base!r}")
        if row.calibrated != (self.quantization is not None):
            raise ValueError(f"{self.precision} {'has no' if row.calibrated else 'has a'} plan of what is 8-bit")


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file as hex; `progress` is called with the number of bytes read each time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, indented for people.

    Args:
        directory: The bundle's.
        manifest: What stands in it.
    """
    encoded = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (directory / MANIFEST).write_bytes(encoded + b"\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and validate a bundle's manifest.

    Args:
        directory: The bundle's.

    Returns:
        The manifest; the files that it lists are not looked at, see `check_files`.

    Raises:
        BundleError: The directory is no bundle, or the manifest is malformed or names a file outside.
        SchemaVersionError: It was written by another schema version.

    Example:
        >>> from densegeo.runtime.ready import find_bundle
        >>> directory = find_bundle("fe2e-tiny")
        >>> manifest = read_manifest(directory)
        >>> manifest.model, manifest.precision
        ('fe2e-tiny', 'fp32')
        >>> check_files(directory, manifest)  # raises where a file is not the manifest's
    """
    require_bundle(directory)
    path = directory / MANIFEST
    raw = path.read_bytes()
    try:
        version = msgspec.json.decode(raw, type=_Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise SchemaVersionError(_other_version(directory, raw, version))
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is not a valid manifest ({error}). Rebuild the bundle.") from error
    if outside := sorted(name for name in _file_names(manifest) if not stays_inside(name)):
        raise BundleError(
            f"{path} names a file outside the bundle: {outside[0]!r}. It was tampered with; do not use this bundle."
        )
    return manifest


def require_bundle(directory: Path) -> None:
    """Raises BundleError for what is no bundle at all."""
    if (directory / MANIFEST).is_file():
        return
    lacks = f"it has no {MANIFEST}" if directory.exists() else "there is nothing of that name"
    raise BundleError(
        f"{directory} is not a densegeo bundle: {lacks}. Make one with `densegeo build`, or name the one that comes "
        "with densegeo, fe2e-tiny, from a folder that has nothing of that name."
    )


def _other_version(directory: Path, raw: bytes, version: int) -> str:
    """What becomes of a bundle of another schema version: it is not read, and one sentence says what makes it anew."""
    message = f"{directory} has schema version {version}; this densegeo reads version {SCHEMA_VERSION}. "
    if version > SCHEMA_VERSION:
        return message + "Install the densegeo that built it, or build the bundle again with this one."
    try:
        built = msgspec.json.decode(raw, type=_Built)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        built = _Built()
    return message + f"Rebuild it: {rebuild_command(built.options or {'--model': [built.model]}, directory)}"


def rebuild_command(options: dict[str, list[str]], directory: Path) -> str:
    """What to type to make a bundle anew in its place. options: of `densegeo build`, see `Manifest.options`."""
    output = Path(directory.name) if directory.parent == FOLDER else directory  # not into the package
    arguments = options | {"--output": [str(output)]}
    words = [word for flag, values in arguments.items() for word in _typed(flag, values)]
    return shlex.join(["densegeo", "build", *words])


def _typed(flag: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (flag, value)] if values else [flag]


def require_listed(directory: Path, manifest: Manifest) -> None:
    """Raises BundleError unless the manifest has a size and a digest of every file that it names."""
    if unlisted := sorted(_file_names(manifest) - set(manifest.files)):
        raise BundleError(
            f"{directory / MANIFEST} names {unlisted[0]} without its digest. Copy the bundle again or rebuild it."
        )


def _file_names(manifest: Manifest) -> set[str]:
    """Every file that the manifest names."""
    graphs = {getattr(bucket, stage).file for bucket in manifest.buckets for stage in STAGES}
    built = {name for engine in manifest.engines for name in (engine.file, engine.log)}
    kernels = {f"{KERNELS}/{contract.file}" for contract in manifest.kernels}
    others = {manifest.verification.inputs, manifest.networks.prompt if manifest.networks else ""}
    return {*manifest.files, *graphs, *built, *kernels, *others} - {""}


def stays_inside(name: str) -> bool:
    """Whether a name is a plain path below the bundle's directory, on every system."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and not set(name) & {"\\", ":", "\0"}


class _Versioned(msgspec.Struct):
    schema_version: int


class _Built(msgspec.Struct):
    model: str = "MODEL"
    options: dict[str, list[str]] = {}


def check_files(
    directory: Path, manifest: Manifest, *, digests: bool = True, progress: Callable[[int], object] | None = None
) -> None:
    """Check that the files of a bundle are those of its manifest.

    Args:
        directory: The bundle's.
        manifest: What `read_manifest` gives.
        digests: Compare each file's SHA-256, and not its size alone.
        progress: Called with the number of bytes of each piece that was read for a digest.

    Raises:
        BundleError: A file is missing.
        DigestError: A file differs. Each names the file.
    """
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise BundleError(f"{directory} lacks {name}, which its manifest lists. Copy it again or rebuild it.")
        size = path.stat().st_size
        if size != expected.bytes:
            raise DigestError(
                f"{path} has {size} bytes, the manifest says {expected.bytes}: it is truncated or was replaced. "
                "Copy it again or rebuild the bundle."
            )
        if digests and (actual := sha256_file(path, progress)) != expected.sha256:
            raise DigestError(
                f"{path} is corrupted: its SHA-256 is {actual[:16]}…, the manifest says {expected.sha256[:16]}…. "
                "Copy it again or rebuild the bundle."
            )
