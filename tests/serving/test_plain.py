"""POST /v1/geometry: a picture and fields in, one file out; and the description of it all."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image

from densegeo.runtime import Estimator, Geometry
from densegeo.runtime.ready import find_bundle
from densegeo.serving import plain
from densegeo.serving.metric_options import METRES
from densegeo.serving.routes import ROWS
from tests.support.project import ROOT
from tests.support.serving import Served, metrics, served

METRIC = {"near": "1", "far": "4"}
CAMERA = {"intrinsics": "50,50,30,22"}


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, kind)
    return stream.getvalue()


def post(server: Served, content: Any, accept: str = "*/*", **fields: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/geometry", files={"image": ("p", content)}, data=fields, headers={"Accept": accept}
    )


@pytest.fixture(scope="module")
def result(toy_bundle: Path, picture: np.ndarray) -> Geometry:
    with Estimator(toy_bundle, device="cpu") as estimator:
        return estimator(picture)


def test_arrays(server: Served, picture: np.ndarray, result: Geometry) -> None:
    answer = post(server, encoded(picture))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-npz")
    with np.load(io.BytesIO(answer.content)) as arrays:
        assert set(arrays) >= {"prediction", "normals", "valid"}
        np.testing.assert_array_equal(arrays["prediction"], result.prediction)
        np.testing.assert_array_equal(arrays["normals"], result.normals)


@pytest.mark.parametrize("answer", plain.ANSWERS, ids=lambda answer: answer.format)
def test_every_answer_is_what_encode_gives(
    server: Served, picture: np.ndarray, result: Geometry, answer: plain.Answer
) -> None:
    given = encoded(picture)
    got = post(server, given, answer.media_type, **METRIC, **CAMERA)
    assert (got.status_code, got.headers["content-type"]) == (200, answer.media_type), got.text
    expected = result.to_metric(near=1.0, far=4.0).encode(answer.format, intrinsics=(50, 50, 30, 22), image=given)
    if answer.format == "json":  # times differ
        mine, theirs = json.loads(got.content), json.loads(expected)
        assert mine.pop("warnings") == []
        assert set(mine) == set(theirs)
        assert mine["calibration"] == theirs["calibration"]
    elif answer.format == "npz":
        with np.load(io.BytesIO(got.content)) as mine, np.load(io.BytesIO(expected)) as theirs:
            assert set(mine) == set(theirs) >= {"depth"}
            for name in ("depth", "normals", "prediction", "valid"):
                np.testing.assert_array_equal(mine[name], theirs[name])
    else:
        assert got.content == expected


def test_outputs_are_chosen(server: Served, picture: np.ndarray) -> None:
    for outputs, names in (("normals", {"normals"}), ("depth", {"prediction", "depth"})):
        fields = METRIC if outputs == "depth" else {}
        with np.load(io.BytesIO(post(server, encoded(picture), outputs=outputs, **fields).content)) as arrays:
            assert set(arrays) & {"prediction", "normals", "depth"} == names


def test_anchors(server: Served, picture: np.ndarray, result: Geometry) -> None:
    uv = [[3, 4], [40, 30], [20, 9], [11, 40], [55, 5]]
    metres = [float(np.exp(2 * result.prediction[v, u])) for u, v in uv]
    anchors = json.dumps([[*pair, depth] for pair, depth in zip(uv, metres, strict=True)])
    with np.load(io.BytesIO(post(server, encoded(picture), anchors=anchors).content)) as arrays:
        np.testing.assert_array_equal(arrays["depth"], result.to_metric(anchors=(uv, metres)).depth)


@pytest.mark.parametrize(
    ("content", "fields", "status", "name"),
    [
        (b"no picture", {}, 415, "ImageFormatError"),
        (b"", {}, 400, "ImageError"),
        (None, {"nera": "1"}, 400, "RequestError"),
        (None, {"near": "one", "far": "2"}, 400, "RequestError"),
        (None, {"near": "1"}, 400, "CalibrationError"),
        (None, {"near": "nan", "far": "2"}, 400, "CalibrationError"),
        (None, {"intrinsics": "1,2,3"}, 400, "RequestError"),
        (None, {"intrinsics": "0,0,0,0"}, 400, "ConfigError"),
        (None, {"intrinsics": "nan,1,1,1"}, 400, "ConfigError"),
        (None, {"outputs": "colour"}, 400, "RequestError"),
        (None, {"outputs": ""}, 400, "RequestError"),
        (None, {"deadline_ms": "0"}, 400, "RequestError"),
        (None, {"deadline_ms": "0.001"}, 504, "DeadlineError"),
        (None, {"anchors": "[[0, 0, 1]]"}, 400, "CalibrationError"),
        (None, {"near": "", "far": "2"}, 400, "RequestError"),
        (None, {"camera_height": "1.2"}, 400, "CalibrationError"),
        (None, {"camera_height": "high", **CAMERA}, 400, "RequestError"),
        (None, {"up": "0,-1", "camera_height": "1", **CAMERA}, 400, "RequestError"),
        (None, {"size": "[[1, 2], [3, 4]]", **CAMERA}, 400, "RequestError"),
        (None, {"model": "other"}, 404, "NotFoundError"),
        (None, {"model": "../bundle"}, 404, "NotFoundError"),
    ],
)
def test_bad_forms(
    server: Served, picture: np.ndarray, content: bytes | None, fields: dict[str, str], status: int, name: str
) -> None:
    answer = post(server, encoded(picture) if content is None else content, **fields)
    assert (answer.status_code, answer.json()["type"]) == (status, name), answer.text


def test_what_an_answer_needs_is_said(server: Served, picture: np.ndarray) -> None:
    answer = post(server, encoded(picture), "image/png")
    assert (answer.status_code, answer.json()["type"]) == (400, "NotMetricError")
    answer = post(server, encoded(picture), "model/ply", **METRIC)
    assert (answer.status_code, answer.json()["type"]) == (400, "ConfigError")
    answer = post(server, encoded(picture), "text/html")
    assert (answer.status_code, answer.json()["type"]) == (406, "NotAcceptableError")
    assert "application/x-npz" in answer.json()["error"]


@pytest.mark.parametrize(
    ("accept", "fields", "name", "says"),
    [
        ("*/*", {"near": "5", "far": "1"}, "CalibrationError", "0 < near < far"),
        ("*/*", {"near": "1e-320", "far": "1e-310"}, "CalibrationError", "0 < near < far"),
        ("*/*", {"scale": "nan", "shift": "0"}, "CalibrationError", "finite"),
        ("*/*", {"scale": "2", "shift": "-1000"}, "CalibrationError", "Every pixel has no depth"),
        ("*/*", {"anchors": "[]"}, "CalibrationError", "anchors is empty"),
        ("*/*", {"anchors": "[[3, 4, -1]]"}, "CalibrationError", "positive metres"),
        ("*/*", {**METRIC, "anchors": "[[3, 4, 1]]"}, "CalibrationError", "exactly one of"),
        ("*/*", {"camera_height": "-1", **CAMERA}, "CalibrationError", "metres above 0"),
        ("*/*", {"camera_height": "1"}, "CalibrationError", "needs intrinsics"),
        ("*/*", {"up": "0,-1,0", **CAMERA}, "CalibrationError", "give camera_height too"),
        ("*/*", {"size": "[[1, 2], [3, 4], 0]", **CAMERA}, "CalibrationError", "above 0"),
        ("image/png", {}, "NotMetricError", "millimetres"),
        ("image/png", {"outputs": "normals"}, "RequestError", "outputs leaves it out"),
        ("model/ply", METRIC, "ConfigError", "give intrinsics"),
        ("model/gltf-binary", {}, "NotMetricError", "alibrate"),
    ],
)
def test_what_no_picture_could_go_with_is_refused_before_anything_runs(
    server: Served, picture: np.ndarray, accept: str, fields: dict[str, str], name: str, says: str
) -> None:
    ran = metrics(server.url)['densegeo_requests_accepted_total{model="bundle"}']
    answer = post(server, encoded(picture), accept, **fields)
    assert (answer.status_code, answer.json()["type"]) == (400, name), answer.text
    assert says in answer.json()["error"]
    assert ".." not in answer.json()["error"].replace("...", "")
    assert metrics(server.url)['densegeo_requests_accepted_total{model="bundle"}'] == ran


def test_facts_that_intrinsics_help() -> None:
    """A height, by either route a size: the numbers of `to_metric`; the camera alone: a shape of unknown unit."""
    hall = Image.open(ROOT / "densegeo" / "photographs" / "hall.jpg").convert("RGB").resize((192, 144))
    bundle, given, lens = find_bundle("fe2e-tiny"), encoded(np.asarray(hall)), (166.0, 166.0, 95.5, 71.5)
    camera = {"intrinsics": "166,166,95.5,71.5"}
    with served(bundle) as server:
        with server.service.models["fe2e-tiny"].lease() as estimator:
            geometry = estimator(given)
        answer = post(server, given, camera_height="1.6", up="[0.1, -0.97, -0.15]", **camera)
        with np.load(io.BytesIO(answer.content)) as arrays:
            expected = geometry.to_metric(lens, camera_height=1.6, up=(0.1, -0.97, -0.15))
            np.testing.assert_array_equal(arrays["depth"], expected.depth)
        cloud = post(server, given, "model/ply", **camera)
        assert cloud.content == geometry.to_scale(lens).encode("ply", intrinsics=lens, image=given)
        asked = triton.InferInput("image", [144, 192, 3], "UINT8")
        asked.set_data_from_numpy(np.asarray(hall))
        parameters = {"size": "[[60, 120], [130, 121], 1.5]", "intrinsics": "[166, 166, 95.5, 71.5]"}
        with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
            depth = client.infer("fe2e-tiny", [asked], parameters=parameters).as_numpy("depth")
        sized = geometry.to_metric(lens, size=(((60, 120), (130, 121)), 1.5))
        np.testing.assert_array_equal(depth, sized.depth)


def test_other_bodies(server: Served, picture: np.ndarray) -> None:
    url = f"{server.url}/v1/geometry"
    answer = httpx.post(url, content=encoded(picture), headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["type"]) == (415, "MediaTypeError")
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x", "multipart/form-data; boundary="):
        answer = httpx.post(url, content=b"--x\r\n\r\nnothing", headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["type"]) == (400, "RequestError")
    assert httpx.post(url, files={"photo": b"x"}).status_code == 400
    assert httpx.post(url, files=[("image", b"x"), ("image", b"y")]).status_code == 400


def test_the_best_accepted_answer_is_given() -> None:
    def choose(accept: str | None) -> str:
        return plain.choose_answer(accept).format

    assert choose(None) == choose("") == choose("*/*") == choose("application/*") == "npz"
    assert choose("text/html, model/ply;q=0.5, application/json;q=0.9") == "json"
    assert choose("application/json;q=0, model/*") == "ply"
    assert choose("APPLICATION/JSON") == "json"


def test_the_description_is_of_the_table(server: Served) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    told = {(method.upper(), path) for path, row in described["paths"].items() for method in row}
    assert told == {(row.method, row.path) for row in ROWS}
    fields = set(described["components"]["schemas"]["Fields"]["properties"])
    fields |= set(described["components"]["schemas"]["Metres"]["properties"])
    assert fields == {*plain.FIELDS, *METRES}
    text = msgspec.json.encode(described).decode()
    names = [part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]]
    assert names
    assert set(names) <= set(described["components"]["schemas"])
    page = httpx.get(f"{server.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    for field in fields:
        assert f"<code>{field}</code>" in page.text
    assert "http://" not in page.text.replace("http://127.0.0.1", "")
    assert "https://" not in page.text
