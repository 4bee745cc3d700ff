"""densegeo: depth and surface normals from single-step diffusion models, as fast as the hardware allows."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densegeo.runtime import Camera, Estimator, Geometry, ScaleTracker

__version__ = "0.1.0"
__all__ = ["Camera", "Estimator", "Geometry", "ScaleTracker", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy: `import densegeo.models` must not pay for the runtime, nor the runtime for anything else.
    if name in __all__:
        return getattr(import_module("densegeo.runtime"), name)
    raise AttributeError(f"module 'densegeo' has no attribute {name!r}")
