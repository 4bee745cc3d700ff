"""The v2 protocol, spoken by Triton's own client and by hand."""

from __future__ import annotations

import gzip
import json
import platform
import sys
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from densegeo.runtime import Estimator, Geometry
from tests.support.serving import Served, served

if sys.version_info < (3, 11) and platform.machine() == "aarch64":
    pytest.skip("the client's gevent has no wheels here", allow_module_level=True)
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def estimator(toy_bundle: Path) -> Any:
    with Estimator(toy_bundle, device="cpu") as opened:
        yield opened


@pytest.fixture
def client(server: Served) -> Any:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as opened:
        yield opened


def asked(image: np.ndarray, binary: bool = True) -> list[triton.InferInput]:
    tensor = triton.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image, binary_data=binary)
    return [tensor]


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def same(result: triton.InferResult, geometry: Geometry, *names: str) -> None:
    for name in names:
        np.testing.assert_array_equal(result.as_numpy(name), getattr(geometry, name), strict=True)


def post(server: Served, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}/v2/models/bundle/infer", content=content, headers=given)


def body(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "shape": [16, 16, 3], "datatype": "UINT8", "data": [7] * 768}
    return {"inputs": [{key: value for key, value in (tensor | changes).items() if value is not None}]}


def test_health_and_metadata(client: triton.InferenceServerClient, estimator: Estimator) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("bundle")
    assert set(client.get_server_metadata()) == {"name", "version", "extensions"}
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    actual = client.get_model_metadata("bundle")
    assert actual["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, -1, 3]}]
    assert actual["outputs"] == [
        {"name": "prediction", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "normals", "datatype": "FP32", "shape": [-1, -1, 3]},
    ]
    assert actual["parameters"]["depth_kind"] == "log_affine"
    (version,) = actual["versions"]
    assert version == estimator.manifest.build_key[:12]
    assert client.is_model_ready("bundle", version)
    assert client.get_model_metadata("bundle", version) == actual
    assert not client.is_model_ready("bundle", "2")
    assert not client.is_model_ready("other")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_numbers_are_the_estimators(
    client: triton.InferenceServerClient,
    estimator: Estimator,
    picture: np.ndarray,
    binary_in: bool,
    binary_out: bool,
) -> None:
    names = ("normals", "prediction")
    result = client.infer(
        "bundle", asked(picture, binary_in), outputs=wanted(*names, binary=binary_out), request_id="a 7"
    )
    same(result, estimator(picture), *names)
    answer = result.get_response()
    assert answer["id"] == "a 7"
    assert answer["model_name"] == "bundle"
    assert [output["name"] for output in answer["outputs"]] == list(names)


def test_all_outputs_by_default(
    client: triton.InferenceServerClient, estimator: Estimator, picture: np.ndarray
) -> None:
    same(client.infer("bundle", asked(picture)), estimator(picture), "prediction", "normals")


def test_a_batch_is_its_images(client: triton.InferenceServerClient, estimator: Estimator, picture: np.ndarray) -> None:
    images = np.stack([picture, picture[::-1], picture[:, ::-1]])
    result = client.infer("bundle", asked(images))
    assert result.as_numpy("normals").shape == (3, 45, 61, 3)
    for index, geometry in enumerate(estimator.batch(images)):
        for name in ("prediction", "normals"):
            np.testing.assert_allclose(result.as_numpy(name)[index], getattr(geometry, name), rtol=0, atol=1e-4)
    one = client.infer("bundle", asked(images[:1]))
    assert one.as_numpy("prediction").shape == (1, 45, 61)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_packed_bodies(
    client: triton.InferenceServerClient, estimator: Estimator, picture: np.ndarray, coding: str
) -> None:
    result = client.infer(
        "bundle", asked(picture), request_compression_algorithm=coding, response_compression_algorithm=coding
    )
    same(result, estimator(picture), "prediction", "normals")


@pytest.mark.parametrize(
    ("measurements", "metric"),
    [
        ({"near": 1.0, "far": 5.0}, {"near": 1.0, "far": 5.0}),
        ({"scale": "2", "shift": 0.5}, {"scale": 2.0, "shift": 0.5}),
        (
            {"anchors": "[[3, 4, 1.0], [40, 30, 2.0], [20, 9, 1.5], [11, 40, 1.2], [55, 5, 3.0]]"},
            {"anchors": ([[3, 4], [40, 30], [20, 9], [11, 40], [55, 5]], [1.0, 2.0, 1.5, 1.2, 3.0])},
        ),
    ],
)
def test_metres(
    client: triton.InferenceServerClient,
    estimator: Estimator,
    measurements: dict[str, Any],
    metric: dict[str, Any],
) -> None:
    ramp = np.tile(np.linspace(0, 255, 61).astype(np.uint8)[None, :, None], (45, 1, 3))
    if "anchors" in metric:  # measured on the result itself, so that they fit
        columns, rows = np.array(metric["anchors"][0]).T
        metres = np.exp(1.5 * estimator(ramp).prediction[rows, columns].astype(float))
        metric = {"anchors": (metric["anchors"][0], metres)}
        measurements = {
            "anchors": json.dumps([[int(u), int(v), m] for u, v, m in zip(columns, rows, metres, strict=True)])
        }
    for binary in (True, False):
        result = client.infer(
            "bundle", asked(ramp), outputs=wanted("depth", "prediction", binary=binary), parameters=measurements
        )
        same(result, estimator(ramp).to_metric(**metric), "depth", "prediction")
    assert client.infer("bundle", asked(ramp), parameters=measurements).as_numpy("depth") is not None


def test_invalid_depth_is_nan_in_bytes_and_null_in_json(server: Served) -> None:
    ramp = np.tile(np.linspace(0, 255, 16).astype(np.uint8)[None, :, None], (16, 1, 3)).ravel().tolist()
    request = body(data=ramp) | {"parameters": {"scale": 1e3, "shift": 0.0}, "outputs": [{"name": "depth"}]}
    (depth,) = post(server, request).json()["outputs"]
    assert None in depth["data"]
    assert any(value is not None for value in depth["data"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "picture"}, "has one input, 'image'; this one has 'picture'"),
        ({"datatype": "FP32"}, "UINT8"),
        ({"shape": [16, 16]}, "height, width, 3"),
        ({"shape": [16, 12, 4]}, "height, width, 3"),
        ({"shape": [16, 0, 3]}, "height, width, 3"),
        ({"shape": [-1, 16, 3]}, "not valid"),
        ({"shape": [2**40, 2**40, 3]}, "needs"),
        ({"shape": [17, 16, 3]}, "needs 816 numbers; there are 768"),
        ({"shape": [65, 2, 2, 3], "data": [1] * 780}, "at most 64"),
        ({"data": [7] * 767 + [256]}, "not pixels"),
        ({"data": [7] * 767 + [0.5]}, "not pixels"),
        ({"data": [[[7] * 3] * 16] * 15}, "of shape \\[15, 16, 3\\], and it says \\[16, 16, 3\\]"),
        ({"data": [[[7] * 3] * 16, [[7]]]}, "not of one length"),
        ({"data": None}, "neither data nor"),
        ({"parameters": {"binary_data_size": 768}}, "0 bytes follow"),
        ({"parameters": {"shared_memory_region": "x"}}, "[Ss]hared memory"),
        ({"shape": [8, 32, 3]}, "at least 16 pixels"),
    ],
)
def test_bad_inputs(server: Served, changes: dict[str, Any], says: str) -> None:
    answer = post(server, body(**changes))
    assert answer.status_code == 400
    assert set(answer.json()) == {"error", "type"}
    assert answer.json()["type"] in ("RequestError", "ImageError")
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(answer.json()["error"])


@pytest.mark.parametrize(
    ("changes", "name", "says"),
    [
        ({"outputs": [{"name": "colour"}]}, "RequestError", "prediction, normals"),
        ({"outputs": [{"name": "depth"}]}, "NotMetricError", "near and far"),
        ({"outputs": [{"name": "normals"}] * 2}, "RequestError", "twice"),
        ({"outputs": [{"name": "normals", "parameters": {"classification": 3}}]}, "RequestError", "classification"),
        ({"outputs": [{"name": "normals", "parameters": {"binary_data": 1}}]}, "RequestError", "true or false"),
        ({"parameters": {"nera": 1}}, "RequestError", "near, far"),
        ({"parameters": {"sequence_id": 1}}, "RequestError", "sequence_id"),
        ({"parameters": {"near": 1}}, "CalibrationError", "near with far"),
        ({"parameters": {"near": 5, "far": 1}}, "CalibrationError", "near"),
        ({"parameters": {"camera_height": 1.0}}, "CalibrationError", "needs intrinsics"),
        ({"parameters": {"size": "[[1, 2], [3, 4], -1]", "intrinsics": "50,50,8,8"}}, "CalibrationError", "above 0"),
        ({"parameters": {"anchors": "[[1, 2]]"}}, "RequestError", "anchors"),
        ({"parameters": {"anchors": "[[1, 2"}}, "RequestError", "metric"),
        ({"parameters": {"timeout": -1}}, "RequestError", "microseconds"),
        ({"parameters": {"timeout": True}}, "RequestError", "microseconds"),
        ({"id": 7}, "RequestError", "id"),
        ({"inputs": []}, "RequestError", "none"),
        ({"inputs": [body()["inputs"][0]] * 2}, "RequestError", "one input"),
    ],
)
def test_bad_requests(server: Served, changes: dict[str, Any], name: str, says: str) -> None:
    answer = post(server, body() | changes)
    assert (answer.status_code, answer.json()["type"]) == (400, name)
    assert says in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "1e3", "99999999999999999999999999", "", "0x2", "9" * 5000])
def test_bad_lengths(server: Served, length: str) -> None:
    answer = post(server, b"{}", Inference_Header_Content_Length=length)
    assert answer.status_code == 400
    assert "Inference-Header-Content-Length" in answer.json()["error"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"inputs": 3}'])
def test_bad_json(server: Served, content: bytes) -> None:
    answer = post(server, content)
    assert (answer.status_code, answer.json()["type"]) == (400, "RequestError")


def test_deep_data_is_refused(server: Served) -> None:
    request = json.dumps(body(data="HERE")).replace('"HERE"', "[" * 50_000 + "]" * 50_000).encode()
    assert post(server, request).status_code == 400


def test_bytes_that_nobody_described_are_refused(server: Served) -> None:
    header = json.dumps(body()).encode()
    answer = post(server, header + b"xyz", Inference_Header_Content_Length=str(len(header)))
    assert answer.status_code == 400
    assert "3 bytes follow the JSON" in answer.json()["error"]


def test_damaged_packed_bodies_are_refused(server: Served) -> None:
    whole = gzip.compress(json.dumps(body()).encode())
    assert post(server, whole, Content_Encoding="gzip").status_code == 200
    for content in (whole[:-9], whole + b"x", b"nothing packed", b""):
        assert post(server, content, Content_Encoding="gzip").status_code == 400
    answer = post(server, zlib.compress(b"{}"), Content_Encoding="br")
    assert (answer.status_code, answer.json()["type"]) == (415, "MediaTypeError")


def test_unknown_models_and_addresses(server: Served, client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="no model 'other' here; there are bundle") as caught:
        client.get_model_metadata("other")
    assert caught.value.status() == "404"
    for method, path, status in (
        ("GET", "/v2/models/bundle/versions/9", 404),
        ("GET", "/v3", 404),
        ("PUT", "/v2", 405),
        ("GET", "/v2/models/bundle/infer", 405),
        ("GET", "/v2/models/bundle/config", 404),
    ):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status, path
        assert answer.json()["type"] == ("MethodError" if status == 405 else "NotFoundError")
    refused = httpx.put(f"{server.url}/v2")
    assert refused.json()["error"].startswith("/v2 takes ")
    assert "GET" in refused.headers["allow"]
    assert refused.headers["allow"] in refused.json()["error"]


def test_models_are_listed_and_indexed(toy_bundle: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.symlink_to(toy_bundle)
    with served([toy_bundle, second]) as server:
        assert httpx.get(f"{server.url}/v2/models").json() == {"models": ["bundle", "second"]}
        with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            client.unload_model("second")
            index = client.get_model_repository_index()
            assert [(row["name"], row["state"]) for row in index] == [("bundle", "READY"), ("second", "UNAVAILABLE")]
            assert "unloaded" in index[1]["reason"]
            assert client.is_server_ready(), "what is not to take requests is not waited for"
            assert not client.is_model_ready("second")
            with pytest.raises(InferenceServerException, match="not loaded"):
                client.infer("second", asked(np.zeros((16, 16, 3), np.uint8)))
            client.load_model("second")
            assert client.is_server_ready()
            with pytest.raises(InferenceServerException, match="config"):
                client.load_model("second", config="{}")
