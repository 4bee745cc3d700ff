"""Whether a bundle's numbers come out right here: its stored pictures go the way that every image goes.

The pictures, of odd sizes, are sent through `estimator(image)`, `batch` (of every number of images that run together)
and `submit`, and what comes back is compared with what PyTorch's float32 networks made of them when the bundle was
built. Only that counts. Where it fails the networks are run one by one on stored inputs: a network that is off shows
there, and what is around them does not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from densegeo.backends import NETWORKS
from densegeo.errors import BackendError, BundleError
from densegeo.outputs import Decode
from densegeo.runtime import verified
from densegeo.runtime.bundle import STAGES, Bucket, Check, Manifest, read_manifest, require_listed
from densegeo.runtime.estimator import Estimator
from densegeo.runtime.faults import NoSuchStageError, breaking
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.ready import find_bundle
from densegeo.runtime.resample import single
from densegeo.runtime.tensorfile import Array, read_tensors

IMAGE = "image_"  # before the names of what belongs to a picture at its own size
WAIT_S = 600.0  # for a submitted picture
PICTURES = 2  # stored of every size


class Verdict(msgspec.Struct, frozen=True):
    """What `verify` found. backend, device: those that really ran. stages: their own errors, where `served` is off."""

    backend: str
    device: str
    served: list[Check]
    stages: list[Check]

    @property
    def good(self) -> bool:
        """Whether images may be run here."""
        return bool(self.served) and all(within(check) for check in self.served)

    @property
    def wrong(self) -> list[Check]:
        """What is beyond its bound, a broken stage before what follows from it."""
        return [check for check in (*self.stages, *self.served) if not within(check)]

    @property
    def in_words(self) -> str:
        """The first that is wrong, where there is one."""
        if not self.wrong:
            return "nothing was compared"
        first = self.wrong[0]
        return (
            f"{first.output} at {first.bucket} ({first.reference}) is off by {first.error:.1e}, {first.bound:.1e} is "
            "allowed"
        )

    def require_good(self, bundle: Path, consequence: str = "") -> None:
        """Raises BackendError that names what is wrong, after the words in `consequence`."""
        if not self.good:
            raise BackendError(
                f"{consequence}{bundle} does not give its reference outputs with {self.backend} on {self.device}: "
                f"{self.in_words}. Do not use it here with {self.backend}; `densegeo verify {bundle} --backend "
                f"{self.backend}` shows all."
            )


def verify(
    bundle: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "auto",
    *,
    frames_on_cpu: bool = False,
    broken: str | None = None,
) -> Verdict:
    """Send the stored pictures the way of every image, and note the result for this backend on this machine.

    frames_on_cpu: torch's way on a GPU, on a CPU. broken: a stage to break on purpose, see `faults.breaking`; nothing
    is noted in either case. Digests are not checked here. Raises BundleError when the stored pictures are missing or
    misshapen, BackendError when something does not run, NoSuchStageError for a stage that this way does not have.
    """
    directory = find_bundle(bundle)
    if frames_on_cpu and backend not in ("auto", NETWORKS.name):
        raise NoSuchStageError(f"{backend} takes no images on a CPU's device: {NETWORKS.name} does")
    require_listed(directory, read_manifest(directory))

    def opened(name: str) -> Estimator:
        return _frames_on_cpu(directory) if frames_on_cpu else Estimator(directory, name, device, check_digests=False)

    if broken is not None:
        with opened(backend) as estimator:
            breaking_it = breaking(broken, estimator)
        with breaking_it, opened(estimator.backend) as estimator:
            return _verdict(estimator, directory)
    with opened(backend) as estimator:
        if not frames_on_cpu:
            verified.forget(directory, estimator.backend)  # until it passes again
        try:
            verdict = _verdict(estimator, directory)
        except BackendError as error:
            if not frames_on_cpu:
                verified.remember(directory, estimator.backend, estimator.device, wrong=str(error))
            raise
    if not frames_on_cpu:
        wrong = "" if verdict.good else verdict.in_words
        verified.remember(directory, verdict.backend, verdict.device, wrong)
    return verdict


def _frames_on_cpu(directory: Path) -> Estimator:
    from densegeo.runtime.backends.torch_modules import TorchBackend

    manifest = read_manifest(directory)
    backend = TorchBackend(directory, manifest, "cpu", frames_on_cpu=True)
    return Estimator.from_backend(backend, manifest, max_batch=2)


def _verdict(estimator: Estimator, directory: Path) -> Verdict:
    path = directory / estimator.manifest.verification.inputs
    tensors = read_tensors(path)
    verdict = Verdict(estimator.backend, estimator.device, serve(estimator, tensors, path), [])
    return verdict if verdict.good else msgspec.structs.replace(verdict, stages=run_stages(estimator, tensors, path))


def serve(estimator: Estimator, tensors: dict[str, Array], path: Path) -> list[Check]:
    """For each size, way and number of images together the largest error of an image's outputs.

    No two images that are sent together are the same. The stored pictures are held to what is stored; the others, which
    are those shifted, to what they give alone.
    """
    checks = []
    outputs = estimator.manifest.decode.names
    for bucket in single(estimator.manifest.buckets):
        pictures = stored(tensors, path, bucket, ("image", *(f"{IMAGE}{name}" for name in outputs)))
        images = [picture["image"] for picture in pictures]
        references = [{name: picture[f"{IMAGE}{name}"] for name in outputs} for picture in pictures]

        def compare(
            way: str, results: Sequence[Geometry], size: str = str(bucket.size), references: Any = references
        ) -> None:
            for name in outputs:
                pairs = zip(results, references, strict=False)
                error = float(
                    np.max([relative_error(getattr(result, name), reference[name]) for result, reference in pairs])
                )
                checks.append(Check(size, name, f"stored float32: {way}", error, _bound(estimator.manifest, name)))

        compare("estimator(image)", [estimator(image) for image in images])
        for index in range(len(images), estimator.images_together):
            images.append(_shifted(images[index % PICTURES], index))
            alone = estimator(images[-1])
            references.append({name: getattr(alone, name) for name in outputs})
        for count in _together(estimator, bucket):
            compare(f"batch of {count}", estimator.batch(images[:count]))
        compare("submit", [future.result(WAIT_S) for future in [estimator.submit(image) for image in images]])
    return checks


def _together(estimator: Estimator, bucket: Bucket) -> list[int]:
    """Every number of images that run at once: of the size's graphs, or, where recordings decide, powers of two."""
    built = {other.batch for other in estimator.manifest.buckets if other.size == bucket.size}
    powers = {1 << power for power in range(estimator.images_together.bit_length())} if estimator.frames else set()
    largest_batch = max(PICTURES, estimator.images_together)
    return sorted(count for count in {PICTURES, *built, *powers} if count <= largest_batch)


def _shifted(image: Array, index: int) -> Array:
    """Another picture for every index: each row and column moved on, round the edges."""
    return np.roll(image, (3 * index, 5 * index), (0, 1))


def _bound(manifest: Manifest, output: str) -> float:
    """Raises BundleError where the manifest has none."""
    try:
        return manifest.verification.bounds[output]
    except KeyError:
        raise BundleError(f"The manifest has no bound for {output}. Rebuild the bundle.") from None


def run_stages(estimator: Estimator, tensors: dict[str, Array], path: Path) -> list[Check]:
    """Every stage's output in every bucket, run from end to end, against the stored ones."""
    manifest, checks = estimator.manifest, []
    for bucket in manifest.buckets:
        pictures = stored(tensors, path, bucket, ("rgb", *outputs_of(manifest.decode)))
        for picture in pictures:
            if picture["rgb"].shape != (1, 3, bucket.height, bucket.width):
                shape = picture["rgb"].shape
                raise BundleError(f"{path}: rgb of {bucket.size} has shape {shape}. Rebuild the bundle.")
        references = alternating(pictures, bucket.batch)
        outputs = estimator.replay(references.pop("rgb"))
        for output, reference in references.items():
            error = relative_error(outputs[output], reference)
            checks.append(Check(bucket.name, output, "stored float32", error, manifest.verification.replay_bound))
    return checks


def outputs_of(decode: Decode) -> tuple[str, ...]:
    """What the stages of a bucket give, in order."""
    return (*STAGES, *decode.names)


def stored(tensors: dict[str, Array], path: Path, bucket: Bucket, names: Sequence[str]) -> list[dict[str, Array]]:
    """The pictures of a bucket's size: of each what has these names. Raises BundleError where one is missing."""
    count = len({key for key in tensors if key.startswith(f"{bucket.size}.") and key.endswith(".image")})
    if count < PICTURES:
        raise BundleError(
            f"{path} has {count} of the {PICTURES} pictures that {bucket.size} is verified with. Rebuild the bundle."
        )
    return [{name: _tensor(tensors, path, f"{bucket.size}.{index}.{name}") for name in names} for index in range(count)]


def alternating(pictures: Sequence[Mapping[str, Array]], batch: int) -> dict[str, NDArray[np.float32]]:
    """Inputs and outputs of single pictures -> those of a batch in which the pictures alternate, float32.

    Decoded pictures come as the decoder gives them: all of the first output, then all of the second.
    """
    images = [pictures[i % len(pictures)] for i in range(batch)]
    joined = {}
    for name in images[0]:
        if name.startswith("image"):  # of its own size
            continue
        parts = [image[name].astype(np.float32, copy=False) for image in images]
        if name == "decoder":
            parts = [part[i : i + 1] for i in range(len(parts[0])) for part in parts]
        joined[name] = np.concatenate(parts)
    return joined


def within(check: Check) -> bool:
    """Whether a check holds; an error that is not a number does not."""
    return check.error <= check.bound


def relative_error(actual: NDArray[np.float32], reference: Array) -> float:
    """Relative L2 norm of the difference, in float64; infinite for another shape or any non-finite value."""
    if actual.shape != reference.shape or not (np.isfinite(actual).all() and np.isfinite(reference).all()):
        return float("inf")
    expected = reference.astype(np.float64).ravel()
    difference = float(np.linalg.norm(actual.astype(np.float64).ravel() - expected))
    scale = float(np.linalg.norm(expected))
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def _tensor(tensors: dict[str, Array], path: Path, name: str) -> Array:
    try:
        return tensors[name]
    except KeyError:
        raise BundleError(f"{path} lacks the verification tensor {name}. Rebuild the bundle.") from None
