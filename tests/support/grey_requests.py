"""Inference requests of grey pictures to a server over the toy bundle, which gives each picture's grey back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from densegeo.runtime.bundle import read_manifest, write_manifest
from tests.support.doubles import constant_image, level_of

HEADER = "Inference-Header-Content-Length"


def request(image: np.ndarray, **parameters: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request in bytes."""
    tensor = {
        "name": "image",
        "shape": image.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": image.nbytes},
    }
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True} | parameters}).encode()
    return header + image.tobytes(), {HEADER: str(len(header))}


def pixels(level: float) -> np.ndarray:
    return np.round(255 * constant_image(level)).astype(np.uint8)


def infer(server: Any, level: float, name: str = "bundle", **parameters: Any) -> httpx.Response:
    body, headers = request(pixels(level), **parameters)
    return httpx.post(f"{server.url}/v2/models/{name}/infer", content=body, headers=headers, timeout=30)


def level_in(answer: httpx.Response) -> float:
    assert answer.status_code == 200, answer.text
    length = int(answer.headers[HEADER])
    return level_of(np.frombuffer(answer.content[length:], "<f4")[: 16 * 16].reshape(16, 16))


def other_version(bundle: Path, key: str) -> None:
    """Put a bundle of another build key in this one's place."""
    write_manifest(bundle, msgspec.structs.replace(read_manifest(bundle), build_key=key * 64))
