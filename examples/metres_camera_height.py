"""A camera at a known height over a floor that it sees: depth in metres without any range finder.

python examples/metres_camera_height.py photo.jpg --fov 69 --height 1.2
"""

from __future__ import annotations

import argparse

from densegeo import Camera, Estimator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image")
parser.add_argument("--fov", type=float, required=True, help="horizontal field of view, degrees")
parser.add_argument("--height", type=float, required=True, help="of the camera over the floor, metres")
parser.add_argument(
    "--up", type=float, nargs=3, help="against gravity in the camera's frame (x right, y down, z forward)"
)
arguments = parser.parse_args()

geometry = Estimator("fe2e-tiny")(arguments.image)
camera = Camera.from_fov(arguments.fov, geometry.source_size)
print(geometry.to_metric(camera, camera_height=arguments.height, up=arguments.up))
