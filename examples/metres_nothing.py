"""No measurement at all: the scene's true shape in an unknown unit, as points.

python examples/metres_nothing.py photo.jpg --fov 69 --output out
"""

from __future__ import annotations

import argparse

from densegeo import Camera, Estimator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("image")
parser.add_argument("--fov", type=float, required=True, help="horizontal field of view, degrees")
parser.add_argument("--output", default="out")
arguments = parser.parse_args()

geometry = Estimator("fe2e-tiny")(arguments.image)
camera = Camera.from_fov(arguments.fov, geometry.source_size)
shape = geometry.to_scale(camera)
print(shape)
print(*shape.save(arguments.output, ["ply"], intrinsics=camera, image=arguments.image))
