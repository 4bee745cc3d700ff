"""Every public method with arguments of wrong types: a typed error that shows what came, none of Python's own."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from densegeo import Estimator, Geometry
from densegeo.errors import CalibrationError, DensegeoError
from densegeo.runtime import Camera, ScaleTracker
from densegeo.runtime.metric import Calibration
from densegeo.runtime.stream import Stream

ODD = (
    None,
    5,
    "x",
    b"x",
    [],
    {},
    object(),
    float("nan"),
    (1,),
    [None],
    np.zeros(2),
    lambda: 0,
    True,
    "x\0",
    np.array(True),
)
LENS = (50.0, 50.0, 32.0, 24.0)
PIXELS = np.stack(np.meshgrid(np.arange(64) * 4, np.arange(48) * 5), axis=-1)[..., [0, 1, 1]].astype(np.uint8)
ANCHORS = ([[1, 1], [5, 5], [9, 40]], [1, 2, 3])


class Things:
    """One of each class, and a folder to write to."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self.bundle, self.folder = bundle, folder
        self.estimator = Estimator(bundle, "onnxruntime")
        self.geometry = self.estimator(PIXELS)
        self.metric = self.geometry.to_metric(near=1, far=9)
        self.camera = Camera.of(LENS).at((64, 48))

    def opened(self, **options: Any) -> None:
        Estimator(self.bundle, **({"backend": "onnxruntime"} | options)).close()

    def save(self, **options: Any) -> None:
        self.metric.save(**({"directory": self.folder, "formats": ["json"]} | options))


@pytest.fixture(scope="module")
def things(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Things]:
    made = Things(toy_bundle, tmp_path_factory.mktemp("given"))
    with made.estimator:
        yield made


def option(name: str) -> Callable[[Things, object], object]:
    return lambda things, value: things.opened(**{name: value})


def saved(name: str, **more: Any) -> Callable[[Things, object], object]:
    return lambda things, value: things.save(**{name: value}, **more)


# method -> argument -> (how it is called with a value; which odd values are right there, by their place in ODD)
Call = tuple[Callable[[Things, object], object], tuple[int, ...]]
NONE, FIVE, WORD, LIST, DICT, NAN, ONE, CALL, FLAG, NUL, FLAG_ARRAY = 0, 1, 2, 4, 5, 7, 8, 11, 12, 13, 14
ZEROS = 10
FLAGS = (FIVE, FLAG, FLAG_ARRAY)
LINE = Calibration("log_affine", 1.0, 0.0, variance=(0.1, 0.1, 0.0))
JSON = (NONE, FIVE, WORD, LIST, DICT, ONE, 9, FLAG, NUL)
PAIRS = {"ply": {"formats": ["ply"], "intrinsics": LENS}}
ESTIMATOR: dict[str, dict[str, Call]] = {
    "__init__": {
        "bundle": (lambda _, value: Estimator(value), ()),  # type: ignore[arg-type]
        **{name: (option(name), ()) for name in ("backend", "device", "fit", "preprocessing", "resolution")},
        **{name: (option(name), (FIVE,)) for name in ("max_pixels", "max_batch", "max_queue", "max_wait_ms")},
        **{name: (option(name), FLAGS) for name in ("check_digests", "keep_replaced", "truncated")},
        "calls_at_once": (option("calls_at_once"), (FIVE,)),
        **{name: (option(name), (NONE, FIVE)) for name in ("threads", "timeout_s")},
        "priority": (option("priority"), ()),
        "memory_limit": (option("memory_limit"), (NONE,)),
    },
    "__call__": {
        "image": (lambda things, value: things.estimator(value), ()),
        "color": (lambda things, value: things.estimator(PIXELS, value), ()),  # type: ignore[arg-type]
        "value_range": (lambda things, value: things.estimator(PIXELS, value_range=value), (NONE,)),  # type: ignore[arg-type]
    },
    "submit": {
        "image": (lambda things, value: things.estimator.submit(value), ()),
        "color": (lambda things, value: things.estimator.submit(PIXELS, value), ()),  # type: ignore[arg-type]
        "value_range": (lambda things, value: things.estimator.submit(PIXELS, value_range=value), (NONE,)),  # type: ignore[arg-type]
        "deadline_ms": (lambda things, value: things.estimator.submit(PIXELS, deadline_ms=value), (NONE, FIVE)),  # type: ignore[arg-type]
    },
    "batch": {
        "images": (lambda things, value: things.estimator.batch(value), (LIST, DICT)),  # type: ignore[arg-type]
        "color": (lambda things, value: things.estimator.batch([PIXELS], value), ()),  # type: ignore[arg-type]
        "value_range": (lambda things, value: things.estimator.batch([PIXELS], value_range=value), (NONE,)),  # type: ignore[arg-type]
    },
    "stream": {
        "latest": (lambda things, value: things.estimator.stream(latest=value), FLAGS),  # type: ignore[arg-type]
        "color": (lambda things, value: things.estimator.stream(color=value), ()),  # type: ignore[arg-type]
        "depth": (lambda things, value: things.estimator.stream(depth=value), (FIVE,)),  # type: ignore[arg-type]
        "value_range": (lambda things, value: things.estimator.stream(value_range=value), (NONE,)),  # type: ignore[arg-type]
    },
    "tensors": {"image": (lambda things, value: things.estimator.tensors(value), ())},
    "replay": {"rgb": (lambda things, value: things.estimator.replay(value), ())},  # type: ignore[arg-type]
}
GEOMETRY: dict[str, dict[str, Call]] = {
    "to_scale": {"intrinsics": (lambda things, value: things.geometry.to_scale(value), ())},
    "to_metric": {
        "intrinsics": (lambda things, value: things.geometry.to_metric(value, camera_height=1.0), ()),
        **{
            name: (lambda things, value, name=name, more=more: things.geometry.to_metric(**{name: value}, **more), good)
            for name, more, good in (
                ("scale", {"shift": 0}, (FIVE,)),
                ("shift", {"scale": 1}, (FIVE,)),
                ("near", {"far": 9}, (FIVE,)),
                ("far", {"near": 1}, (FIVE,)),
                ("anchors", {}, ()),
                ("camera_height", {"intrinsics": LENS}, ()),
                ("size", {"intrinsics": LENS}, ()),
                ("up", {"intrinsics": LENS, "camera_height": 1.0}, ()),
                ("method", {"anchors": ANCHORS}, ()),
                ("prior", {"anchors": ANCHORS}, (NONE,)),
            )
        },
    },
    "normals_in": {"frame": (lambda things, value: things.geometry.normals_in(value), ())},  # type: ignore[arg-type]
    "calibrated": {"calibration": (lambda things, value: things.geometry.calibrated(value), ())},  # type: ignore[arg-type]
    "points": {
        "intrinsics": (lambda things, value: things.metric.points(value), ()),
        "drop_flying": (lambda things, value: things.metric.points(LENS, drop_flying=value), FLAGS),  # type: ignore[arg-type]
    },
    "camera": {"intrinsics": (lambda things, value: things.metric.camera(value), ())},
    "points_in": {
        "frame": (lambda things, value: things.metric.points_in(value, LENS), ()),  # type: ignore[arg-type]
        "intrinsics": (lambda things, value: things.metric.points_in("ros_body", value), ()),
    },
    "encode": {
        "drop_flying": (lambda things, value: things.geometry.encode("json", drop_flying=value), FLAGS),  # type: ignore[arg-type]
        "source": (lambda things, value: things.geometry.encode("json", source={"a": value}), JSON),
        "format": (lambda things, value: things.geometry.encode(value), ()),  # type: ignore[arg-type]
        "file": (lambda things, value: things.geometry.encode("png", file=value), ()),  # type: ignore[arg-type]
    },
    "save": {
        "directory": (saved("directory"), (WORD,)),
        "formats": (saved("formats"), (LIST, DICT)),
        "stem": (saved("stem"), (WORD,)),
        "intrinsics": (saved("intrinsics", formats=["ply"]), ()),
        "image": (saved("image", **PAIRS["ply"]), (NONE,)),
        "color": (saved("color", image=PIXELS, **PAIRS["ply"]), ()),
        "dtype": (saved("dtype"), ()),
        "source": (saved("source"), (NONE, DICT)),
    },
    "visualize": {
        "image": (lambda things, value: things.geometry.visualize(value), (NONE,)),
        "color": (lambda things, value: things.geometry.visualize(PIXELS, color=value), ()),  # type: ignore[arg-type]
        "span": (lambda things, value: things.geometry.visualize(span=value), (NONE,)),  # type: ignore[arg-type]
    },
}
CAMERA: dict[str, dict[str, Call]] = {
    "__init__": {
        **{
            name: (
                lambda _, value, name=name: Camera(**({"fx": 9.0, "fy": 9.0, "cx": 5.0, "cy": 5.0} | {name: value})),
                good,
            )
            for name, good in (
                *((name, (FIVE,)) for name in ("fx", "fy", "cx", "cy")),
                ("size", (NONE,)),
                ("lens", ()),
                ("distortion", (LIST, DICT)),
            )
        }
    },
    "of": {"intrinsics": (lambda _, value: Camera.of(value), ())},
    "from_fov": {
        "degrees": (lambda _, value: Camera.from_fov(value, (64, 48)), (FIVE,)),  # type: ignore[arg-type]
        "size": (lambda _, value: Camera.from_fov(60, value), ()),  # type: ignore[arg-type]
        "axis": (lambda _, value: Camera.from_fov(60, (64, 48), value), (WORD,)),  # type: ignore[arg-type]
    },
    "from_camera_info": {"info": (lambda _, value: Camera.from_camera_info(value), ())},
    "read": {"path": (lambda _, value: Camera.read(value), ())},  # type: ignore[arg-type]
    "at": {"size": (lambda things, value: things.camera.at(value), ())},  # type: ignore[arg-type]
    "stretched": {"size": (lambda things, value: things.camera.stretched(value), ())},  # type: ignore[arg-type]
    "rays": {"size": (lambda things, value: things.camera.rays(value), ())},  # type: ignore[arg-type]
    "rays_at": {"uv": (lambda things, value: things.camera.rays_at(value), ())},
    "project": {"points": (lambda things, value: things.camera.project(value), ())},
}


def stream(act: Callable[[Stream, Any], object]) -> Callable[[Things, object], object]:
    def call(things: Things, value: object) -> None:
        with things.estimator.stream() as opened:
            act(opened, value)

    return call


def updated(things: Things, **observations: Any) -> Geometry:
    """By a tracker that knows metres already, as it stands after a first frame."""
    tracker = ScaleTracker()
    tracker.update(things.geometry, anchors=ANCHORS)
    return tracker.update(things.geometry, **observations)


NUMBERS = (FIVE, NAN, ONE, ZEROS)
STREAM: dict[str, dict[str, Call]] = {
    "put": {
        name: (stream(lambda opened, value, name=name: opened.put(PIXELS, **{name: value})), (NONE,))
        for name in ("intrinsics", "motion")
    },
    "get": {"timeout": (stream(lambda opened, value: opened.get(value)), (NONE, FIVE))},
    "subscribe": {"callback": (stream(lambda opened, value: opened.subscribe(value)), (CALL,))},
}
TRACKER: dict[str, dict[str, Call]] = {
    "update": {
        "geometry": (lambda _, value: ScaleTracker().update(value, LENS), ()),  # type: ignore[arg-type]
        **{
            name: (lambda things, value, name=name, more=more: updated(things, **(more | {name: value})), good)
            for name, more, good in (
                ("intrinsics", {}, ()),
                ("anchors", {"intrinsics": LENS}, (NONE,)),
                ("up", {"intrinsics": LENS}, (NONE,)),
                ("camera_height", {"intrinsics": LENS}, (NONE, FIVE)),
                ("size", {"intrinsics": LENS}, (NONE,)),
                ("motion", {"intrinsics": LENS}, (NONE,)),
                ("method", {"intrinsics": LENS}, ()),
            )
        },
    },
}
CALIBRATION: dict[str, dict[str, Call]] = {
    name: {"prediction": (lambda _, value, name=name: getattr(LINE, name)(value), NUMBERS + more)}
    for name, more in (("uncertainty", (LIST,)), ("prior_for", ()))
}
TABLES = {
    Estimator: ESTIMATOR,
    Geometry: GEOMETRY,
    Camera: CAMERA,
    Stream: STREAM,
    ScaleTracker: TRACKER,
    Calibration: CALIBRATION,
}
# what takes anything at all, or what the tables hold for another method that hands it on
ANYTHING = {
    ("require_prediction", "product"), ("require_depth", "product"), ("put", "image"), ("put", "stamp"),
    ("put", "frame_id"), ("put", "anchors"), ("put", "up"), ("put", "camera_height"), ("tensors", "color"),
    ("tensors", "scale"), ("tensors", "shift"), ("tensors", "near"), ("tensors", "far"), ("encode", "intrinsics"),
    ("encode", "image"), ("encode", "color"), ("encode", "dtype"), ("encode", "source"),
}  # fmt: skip
INTERNAL = {"from_backend"}


@pytest.mark.parametrize(
    ("kind", "method", "argument"),
    [(kind, method, name) for kind, table in TABLES.items() for method, row in table.items() for name in row],
)
def test_wrong_types(kind: type, method: str, argument: str, things: Things) -> None:
    call, right = TABLES[kind][method][argument]
    for place, value in enumerate(ODD):
        if place in right:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd numbers that are numbers
            with pytest.raises(DensegeoError) as caught:
                call(things, value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_the_tables_have_every_public_method() -> None:
    for kind, table in TABLES.items():
        for name, member in inspect.getmembers(kind, callable):
            if (name.startswith("_") and name not in ("__init__", "__call__")) or name in INTERNAL:
                continue
            if name == "__init__" and kind is not Estimator:  # made by an estimator, or of plain fields
                continue
            expected = {
                argument.name
                for argument in inspect.signature(member).parameters.values()
                if argument.name not in ("self", "cls") and not isinstance(argument.default, bool)
            }
            known = {*table.get(name, {}), *(argument for method, argument in ANYTHING if method == name)}
            assert expected <= known, f"{kind.__name__}.{name}"


@pytest.mark.parametrize(
    ("value", "words"),
    [(None, "None"), (5, "5"), (np.zeros((9, 9)), "ndarray"), ([1, 2], "[1, 2] (list)")],
)
def test_errors_show_what_came(value: object, words: str, things: Things) -> None:
    for call in (Estimator, things.geometry.save, Camera.read):
        with pytest.raises(DensegeoError) as caught:
            call(value)  # type: ignore[operator]
        assert words in str(caught.value)
        assert "pathlib.Path" in str(caught.value)


@pytest.mark.parametrize("number", [np.float32, np.float64, np.int16, np.array])
def test_numpys_numbers_are_numbers(number: Callable[[int], Any], things: Things) -> None:
    plain, given = 3, number(3)
    assert Camera.from_fov(20 * given, (64, 48)) == Camera.from_fov(20 * plain, (64, 48))
    assert Camera(given, given, given, given, (number(64), number(48))) == Camera(3, 3, 3, 3, (64, 48))  # type: ignore[arg-type]
    line = things.geometry.to_metric(near=given, far=9)
    assert line.calibration == things.geometry.to_metric(near=plain, far=9).calibration
    assert things.estimator.submit(PIXELS, deadline_ms=1e6 * given).result().source_size == (64, 48)
    if number is not np.float32 and number is not np.float64:
        with Estimator(things.bundle, "onnxruntime", threads=given, max_batch=given, max_queue=given) as opened:
            assert opened.max_queue == plain
    else:
        with pytest.raises(DensegeoError, match="whole number"):
            things.opened(threads=given)


@pytest.mark.parametrize("flag", [True, np.True_, np.array(True)])
def test_flags_are_no_numbers(flag: Any, things: Things) -> None:
    calls: list[Callable[[], object]] = [
        lambda: Camera(flag, 3, 3, 3),
        lambda: Camera.from_fov(flag, (64, 48)),
        lambda: things.camera.at((flag, flag)),
        lambda: things.geometry.to_metric(scale=flag, shift=0),
        lambda: things.geometry.to_metric(LENS, camera_height=flag),
        lambda: things.geometry.visualize(span=(0, flag)),
        lambda: things.opened(max_wait_ms=flag),
        lambda: things.opened(memory_limit=flag),
        lambda: things.estimator(PIXELS, value_range=(0, flag)),
    ]
    for call in calls:
        with pytest.raises(DensegeoError):
            call()


def test_a_calibration_belongs_to_its_kind_of_depth(things: Things) -> None:
    with pytest.raises(CalibrationError, match="disparity_affine"):
        things.geometry.calibrated(Calibration("disparity_affine", 1.0, 0.0))
    assert things.geometry.calibrated(Calibration("log_affine", 1.0, 0.0, metric=False)).depth_kind == "up_to_scale"
