"""A camera with a lidar beside it: depth in metres, newest frame only.

python examples/camera_and_lidar.py FOLDER   # 000.jpg with 000.npy, (N, 3) metres in the lidar's frame; 001.jpg ...
"""

import sys
import threading
import time
from pathlib import Path

import numpy as np

from densegeo import Camera, Estimator
from densegeo.errors import CalibrationError
from densegeo.ros.ranges import Transform

# of the camera's images, and where the lidar (x forward, y left, z up) sits in the camera's frame: 0.2 m above
CAMERA = Camera(fx=300.0, fy=300.0, cx=255.5, cy=191.5)
LIDAR = Transform.of([0.0, -0.2, 0.0, 0.5, -0.5, 0.5, 0.5])

with Estimator("fe2e-tiny") as estimator, estimator.stream() as stream:

    def drive() -> None:  # what the camera's driver does, ten times a second
        for frame in sorted(Path(sys.argv[1]).glob("*.jpg")):
            stream.put(frame.read_bytes(), stamp=time.time(), frame_id=frame)
            time.sleep(0.1)
        stream.close()

    threading.Thread(target=drive).start()
    for result in stream:
        points = LIDAR(np.load(result.frame_id.with_suffix(".npy")))
        uv = CAMERA.project(points)
        seen = (uv >= 0).all(axis=1) & (uv < result.geometry.source_size).all(axis=1)
        try:
            metric = result.geometry.to_metric(anchors=(uv[seen], points[seen, 2]))
        except CalibrationError as error:
            print(f"{result.frame_id.name}: {error}")
        else:
            print(f"{result.frame_id.name}: {np.nanmedian(metric.depth):.2f} m, {time.time() - result.stamp:.2f} s old")
