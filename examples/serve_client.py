"""A picture sent to `densegeo serve` with the v2 inference protocol, metres back.

densegeo serve fe2e-tiny
pip install tritonclient[http]
python examples/serve_client.py photo.jpg --near 0.8 --far 25   # --url 127.0.0.1:8000 --model fe2e-tiny
"""

import argparse

import numpy as np
import tritonclient.http as triton
from PIL import Image, ImageOps

parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("--url", default="127.0.0.1:8000")
parser.add_argument("--model", default="fe2e-tiny")
parser.add_argument("--near", type=float, required=True, help="depth of the nearest point, metres")
parser.add_argument("--far", type=float, required=True, help="depth of the farthest point, metres")
options = parser.parse_args()

# The server takes pixels as they are: photographs are turned upright here.
pixels = np.asarray(ImageOps.exif_transpose(Image.open(options.picture)).convert("RGB"))
image = triton.InferInput("image", list(pixels.shape), "UINT8")
image.set_data_from_numpy(pixels)

client = triton.InferenceServerClient(options.url)
result = client.infer(options.model, [image], parameters={"near": options.near, "far": options.far})
depth = result.as_numpy("depth")  # (h, w) float32 metres, NaN where there is none
row, column = (size // 2 for size in depth.shape)
print(f"{depth.shape[1]}x{depth.shape[0]}: {np.nanmin(depth):.2f} to {np.nanmax(depth):.2f} m")
print(f"in the middle: {depth[row, column]:.2f} m")
normals = result.as_numpy("normals")  # (h, w, 3) unit, x right, y down, z forward; None where the model has none
if normals is not None:
    print(f"its normal: {np.round(normals[row, column], 2).tolist()}")
