"""The runtime: a bundle directory in, `Geometry` out. Imports neither torch nor anything of the build side."""

from densegeo.runtime.camera import Camera
from densegeo.runtime.estimator import Estimator
from densegeo.runtime.geometry import Geometry
from densegeo.runtime.tracker import ScaleTracker

__all__ = ["Camera", "Estimator", "Geometry", "ScaleTracker"]
