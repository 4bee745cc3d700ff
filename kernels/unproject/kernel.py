"""`unproject` in one pass, with or without normals: a program makes a tile of the cloud."""

import torch
import triton
import triton.language as tl

from densegeo.kernels.contract import Axis, programs
from densegeo.kernels.launch import OPTIONS, require_small

BLOCK_X, BLOCK_Y = 128, 4
GRID = (Axis("width", BLOCK_X), Axis("height", BLOCK_Y))


@triton.jit
def unproject_kernel(
    depth,  # (height, width) float32, a row's pixels adjacent
    normals,  # (height, width, 3) float32, a row's values adjacent; not read without WITH_NORMALS
    cloud,  # (height, width, 3 or 6) float32, contiguous
    width,
    height,
    depth_stride,
    normals_stride,
    fx,
    fy,
    cx,
    cy,
    WITH_NORMALS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    mask = (y < height)[:, None] & (x < width)[None, :]
    z = tl.load(depth + y[:, None] * depth_stride + x[None, :], mask=mask)
    features = 6 if WITH_NORMALS else 3
    target = cloud + (y[:, None] * width + x[None, :]) * features
    tl.store(target, ((x - cx) / fx)[None, :] * z, mask=mask)
    tl.store(target + 1, ((y - cy) / fy)[:, None] * z, mask=mask)
    tl.store(target + 2, z, mask=mask)
    if WITH_NORMALS:
        source = normals + y[:, None] * normals_stride + x[None, :] * 3
        for axis in tl.static_range(3):
            tl.store(target + 3 + axis, tl.load(source + axis, mask=mask), mask=mask)


def unproject(
    depth: torch.Tensor, intrinsics: tuple[float, float, float, float], normals: torch.Tensor | None
) -> torch.Tensor:
    """See `densegeo.kernels.unproject.unproject`."""
    height, width = depth.shape
    assert depth.dtype == torch.float32
    assert depth.stride(1) == 1
    if normals is not None:
        assert normals.dtype == torch.float32
        assert normals.shape == (height, width, 3)
        assert normals.stride()[1:] == (3, 1)
        require_small(normals)
    features = 3 if normals is None else 6
    cloud = torch.empty((height, width, features), dtype=torch.float32, device=depth.device)
    require_small(depth, cloud)
    unproject_kernel[programs(GRID, width=width, height=height)](
        depth,
        depth if normals is None else normals,
        cloud,
        width,
        height,
        depth.stride(0),
        0 if normals is None else normals.stride(0),
        *(float(value) for value in intrinsics),
        WITH_NORMALS=normals is not None,
        BLOCK_X=BLOCK_X,
        BLOCK_Y=BLOCK_Y,
        **OPTIONS,
    )
    return cloud
