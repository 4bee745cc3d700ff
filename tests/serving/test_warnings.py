"""What a result is warned of comes with its answer and into its line of the log, and nothing of it is printed raw."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from densegeo.serving.front import WARNINGS_HEADER
from densegeo.serving.logs import FIELDS, WARNINGS
from tests.support.serving import Served, until

FAR = {"near": "3000", "far": "4000"}
MILLIMETRES = "looks like millimetres"


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """As around a server that the command starts."""
    with WARNINGS.collected():
        yield


def post(server: Served, picture: np.ndarray, accept: str, **fields: str) -> httpx.Response:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    files = {"image": ("p", stream.getvalue())}
    return httpx.post(f"{server.url}/v1/geometry", files=files, data=fields, headers={"Accept": accept})


def test_json_has_a_field_and_all_have_a_header(
    server: Served, picture: np.ndarray, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "densegeo.serving"):
        for kind in ("application/json", "application/x-npz", "image/png"):
            answer = post(server, picture, kind, **FAR)
            (said, *more) = json.loads(answer.headers[WARNINGS_HEADER])
            assert MILLIMETRES in said
            assert bool(more) == (kind == "image/png")  # there the log warns too: 65.5 m are all that 16 bits hold
            if kind == "application/json":
                assert answer.json()["warnings"] == [said]

        def requests() -> list[dict[str, Any]]:
            return [getattr(record, FIELDS) for record in caplog.records if record.getMessage() == "request"]

        until(lambda: len(requests()) == 3, "a line a request, each written after its answer")
    lines = requests()
    assert [MILLIMETRES in line["warnings"][0] for line in lines] == [True] * 3
    assert MILLIMETRES not in capfd.readouterr().err


def test_v2_has_a_parameter(server: Served, picture: np.ndarray) -> None:
    tensor = {"name": "image", "shape": picture.shape, "datatype": "UINT8", "data": picture.ravel().tolist()}
    for parameters, warned in (({"scale": 9.0, "shift": 9.0}, False), ({"near": 3000.0, "far": 4000.0}, True)):
        body: dict[str, Any] = {"inputs": [tensor], "parameters": parameters, "outputs": [{"name": "depth"}]}
        answer = httpx.post(f"{server.url}/v2/models/bundle/infer", json=body).json()
        assert (MILLIMETRES in answer.get("parameters", {}).get("warnings", "")) == warned, answer.get("parameters")


def test_each_request_has_its_own(server: Served, picture: np.ndarray) -> None:
    asked = [FAR if number % 2 else {"near": "1", "far": "4"} for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda fields: post(server, picture, "application/json", **fields), asked))
    assert [bool(answer.json()["warnings"]) for answer in answers] == [False, True] * 4


def test_errors_speak_of_fields(server: Served, picture: np.ndarray) -> None:
    def said(accept: str, **fields: str) -> str:
        answer = post(server, picture, accept, **fields)
        assert answer.status_code == 400
        return str(answer.json()["error"])

    assert "scale must be a number, not text" in said("*/*", scale="wide", shift="1")
    assert "image/png holds millimetres, and nothing tells the unit" in said("image/png", intrinsics="50,50,30,22")
