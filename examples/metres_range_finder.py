"""One range reading at a known pixel, and the camera's intrinsics: depth in metres everywhere, with its uncertainty.

python examples/metres_range_finder.py photo.jpg --fov 69 --pixel 320 240 --metres 2.31
"""

from __future__ import annotations

import argparse

import numpy as np

from densegeo import Camera, Estimator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image")
parser.add_argument("--fov", type=float, required=True, help="horizontal field of view, degrees")
parser.add_argument(
    "--pixel", type=float, nargs=2, required=True, help="column and row that the range finder points at"
)
parser.add_argument("--metres", type=float, required=True)
arguments = parser.parse_args()

geometry = Estimator("fe2e-tiny")(arguments.image)
camera = Camera.from_fov(arguments.fov, geometry.source_size)
metric = geometry.to_metric(camera, anchors=([arguments.pixel], [arguments.metres]))
assert metric.calibration is not None
uncertainty = np.median(metric.calibration.uncertainty(metric.prediction[metric.valid]))
print(metric)
print(f"from {', '.join(metric.calibration.sources)}; give or take {uncertainty:.0%}")
