"""Every error densegeo raises on purpose: each message names what was wrong and what to do about it."""

from __future__ import annotations


class DensegeoError(Exception):
    """Base of all densegeo errors; the command line prints its message without a traceback."""


class ImageError(DensegeoError, ValueError):
    """An image that cannot be read or used: empty, truncated, too large, too small, NaN, wrong channels."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than `max_pixels`; it was not decoded."""


class ImageFormatError(ImageError):
    """Encoded data in none of the formats that are read."""


class ImageWarning(UserWarning):
    """An image whose values look like those of another range than its type's."""


class ResultWarning(UserWarning):
    """A result that says nothing: not one pixel of it is valid."""


class BundleError(DensegeoError):
    """A directory that is no bundle, or a bundle with a missing or unusable part."""


class SchemaVersionError(BundleError):
    """A manifest written by another schema version."""


class DigestError(BundleError):
    """A bundle file whose size or SHA-256 differs from the manifest's."""


class BackendError(DensegeoError):
    """A backend that is not installed, cannot run this bundle, or failed while running it."""


class TensorSizeError(BackendError):
    """A tensor that the kernels cannot address: take fewer images at once."""


class ThrottledError(BackendError):
    """Times that were taken while a GPU's clocks were lowered: nothing is compared with them."""


class EngineError(BackendError):
    """A TensorRT engine that could not be built, is stale or foreign, or is not to be trusted."""


class QueueFullError(DensegeoError):
    """A request that was not accepted because too many wait already."""


class DeadlineError(DensegeoError, TimeoutError):
    """A request whose deadline passed before its turn came; it was not run."""


class ShutdownError(BackendError):
    """A request to a closed estimator, or one that waited when the estimator was closed without draining."""


class BackendTimeoutError(BackendError):
    """A backend that did not return within `timeout_s`: the request it was running, or one behind it."""


class RequestError(DensegeoError, ValueError):
    """A request over HTTP that says something impossible: an unknown tensor, a shape that its data have not ..."""


class BodyTooLargeError(RequestError):
    """A request's body, or what it unpacks to, beyond the server's limit."""


class MediaTypeError(RequestError):
    """A body of a type or an encoding that the server does not read."""


class NotAcceptableError(RequestError):
    """An answer asked for of a type that the server does not write."""


class MethodError(RequestError):
    """An address asked with another method than it takes."""


class SlowRequestError(RequestError):
    """A request whose body did not arrive within the server's time."""


class UnauthorizedError(RequestError):
    """A request without the server's token, or with another one."""


class ForbiddenError(RequestError):
    """A request from a page of another origin, or to a host that this server is not."""


class NotFoundError(RequestError):
    """An address, model or version that the server does not have."""


class BusyError(DensegeoError):
    """A request that was not read because too many are being answered."""


class NotReadyError(DensegeoError):
    """A request for a model that is not loaded."""


class CalibrationError(DensegeoError, ValueError):
    """Metric anchors or parameters that do not determine a depth scale."""


class CalibrationWarning(UserWarning):
    """Intrinsics or anchors that are used as given, and look as if they were of another image or unit."""


class NotMetricError(DensegeoError):
    """Metres were asked of a result whose depth kind is not `metric`."""


class MissingOutputError(DensegeoError):
    """Depth was asked of a result of normals alone, or normals of one of depth alone."""


class CheckpointError(DensegeoError):
    """A checkpoint, LoRA, VAE or prompt file that is missing, malformed, or of another model."""


class ConfigError(DensegeoError, ValueError):
    """An option or architecture setting that is invalid or contradicts the tensors."""


class ExportError(DensegeoError):
    """A graph that could not be exported, or that missed its error bound."""


class ResourceError(DensegeoError):
    """Not enough memory or disk, an output that cannot be written, or an address that cannot be had."""


class QuantizationError(DensegeoError):
    """Calibration images, statistics or a plan that 8-bit numbers cannot be made from."""


class DatasetError(DensegeoError):
    """Evaluation data that is missing, incomplete or damaged."""


class BagError(DensegeoError):
    """A ROS bag that cannot be read, or that lacks a topic, a camera or a transform that was asked for."""


class KernelError(DensegeoError):
    """A GPU kernel that cannot be compiled, spills registers, or exceeds what its architecture has."""
