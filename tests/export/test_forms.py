"""The form of graphs: raced on this machine where it is asked for, remembered, taken by later builds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from rich.console import Console  # noqa: E402

from densegeo.backends import BACKENDS, FORMS, Form, backend_row  # noqa: E402
from densegeo.errors import BackendError, ConfigError, ExportError  # noqa: E402
from densegeo.export import forms  # noqa: E402
from densegeo.export.build_options import BuildOptions  # noqa: E402
from densegeo.export.command_line import flags  # noqa: E402
from densegeo.export.display import Display  # noqa: E402
from densegeo.export.forms import TunedForm, Work  # noqa: E402
from densegeo.export.keys import stage_keys  # noqa: E402
from densegeo.models.config import VAEConfig  # noqa: E402
from densegeo.runtime.bundle import read_manifest  # noqa: E402
from densegeo.runtime.verify import verify  # noqa: E402
from densegeo.size import Size  # noqa: E402
from tests.support.shared import Build  # noqa: E402

SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
PICTURE = Size(96, 64)
WORK = Work.of(SMALL, PICTURE)
ORT, OPENVINO = backend_row("onnxruntime"), backend_row("openvino")
TRANSPOSED = Form("transposed", "channels")


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def display() -> Display:
    return Display(Console(quiet=True))


def options_of(backend: str = "onnxruntime", **others: Any) -> BuildOptions:
    sizes = (PICTURE,)
    return BuildOptions(
        **({"model": "fe2e-tiny", "output": Path("out"), "backend": backend, "sizes": sizes} | others)
    ).validated()


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("onnxruntime", "fp32"),
        pytest.param("onnxruntime", "fp16", marks=pytest.mark.thorough),
        pytest.param("openvino", "fp32", marks=pytest.mark.thorough),
        pytest.param("openvino", "bf16", marks=pytest.mark.thorough),
    ],
)
def test_every_form_runs_in_the_backend_and_is_right(backend: str, base: str, display: Display) -> None:
    pytest.importorskip(backend)
    tuned = forms.race(backend_row(backend), base, WORK, display)
    assert set(tuned.milliseconds) == {str(form) for form in FORMS}
    assert min(tuned.milliseconds.values()) > 0
    assert tuned.form in FORMS


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What each form takes (seconds), and by how much it is off; one without a time does not run."""

    def of(seconds: dict[Form, float], off: dict[Form, float] | None = None) -> None:
        def opened(_row: object, _base: object, work: Work, form: Form, example: Any, _folder: Path) -> Any:
            if form not in seconds:
                raise BackendError("no kernel for it")
            with torch.no_grad():
                right = forms._piece(work)(example).numpy()

            def run() -> np.ndarray:
                time.sleep(seconds[form])
                return right * (1 + (off or {}).get(form, 0.0))

            return run

        monkeypatch.setattr(forms, "_opened", opened)

    return of


def test_the_fastest_form_is_taken(raced: Callable[..., None], display: Display) -> None:
    raced({form: 0.005 if form == TRANSPOSED else 0.02 for form in FORMS})
    assert forms.race(ORT, "fp32", WORK, display).form == TRANSPOSED


def test_what_is_hardly_faster_is_no_reason_to_leave_the_backends_own(
    raced: Callable[..., None], display: Display
) -> None:
    raced({form: 0.0995 if form == TRANSPOSED else 0.1 for form in FORMS})
    assert forms.race(ORT, "fp32", WORK, display).form == ORT.form


def test_what_is_wrong_or_does_not_run_is_not_taken(
    raced: Callable[..., None], display: Display, caplog: pytest.LogCaptureFixture
) -> None:
    absent = Form("phases", "channels")
    raced({form: 0.0 if form == TRANSPOSED else 0.01 for form in FORMS if form != absent}, {TRANSPOSED: 2e-5})
    tuned = forms.race(ORT, "fp32", WORK, display)
    assert tuned.form != TRANSPOSED
    assert set(tuned.milliseconds) == {str(form) for form in FORMS} - {str(TRANSPOSED), str(absent)}
    assert f"{absent}: no kernel for it" in caplog.text
    assert f"{TRANSPOSED} is off by 2.0e-05, and the bound is 1.0e-05: not taken" in caplog.text


def test_without_the_backends_own_form_nothing_is_chosen(raced: Callable[..., None], display: Display) -> None:
    raced(dict.fromkeys(FORMS, 0.0), {ORT.form: 1e-3})
    with pytest.raises(ExportError, match=r"ONNX Runtime does not run its own form.*leave --tune out"):
        forms.race(ORT, "fp32", WORK, display)


def test_later_builds_take_what_was_raced(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forms.choose(options_of(), SMALL, display) is None
    monkeypatch.setattr(forms, "race", lambda *_: TunedForm(form=TRANSPOSED, milliseconds={str(TRANSPOSED): 1.0}))
    assert forms.choose(options_of(tune=True), SMALL, display) == TRANSPOSED
    later = msgspec.structs.replace(options_of(), form=forms.choose(options_of(), SMALL, display))
    assert later.graph_form == TRANSPOSED
    assert forms.why(later) == "the fastest on this machine"
    before, after = (stage_keys(options, [], "") for options in (options_of(), later))
    assert before.weights == after.weights
    assert before.graphs != after.graphs
    for other in (options_of("openvino"), options_of(precision="fp16"), options_of("torch")):  # were not raced
        assert forms.choose(other, SMALL, display) is None
    assert forms.choose(options_of(), msgspec.structs.replace(SMALL, ch=64), display) is None
    assert forms.choose(options_of(sizes=(Size(192, 128),)), SMALL, display) is None


@pytest.mark.parametrize(
    ("picture", "inputs"),
    [(Size(64, 48), (24, 32)), (Size(512, 512), (256, 256)), (Size(1024, 768), (221, 295)), (Size(33, 35), (17, 16))],
)
def test_what_is_raced_has_half_of_the_pictures_size_or_less(picture: Size, inputs: tuple[int, int]) -> None:
    work = Work.of(VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16), picture)
    assert work.inputs == (1, 256, *inputs)
    assert work.widths == (256, 128)
    assert work.size.width * work.size.height <= forms.LARGEST


def test_another_version_of_the_library_is_another_race(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = TunedForm(form=TRANSPOSED, milliseconds={})
    forms.remember(tuned, ORT, "fp32", WORK)
    assert forms.remembered(ORT, "fp32", WORK) == tuned
    monkeypatch.setattr(forms, "_version", lambda distribution: "1.99.0")
    assert forms.remembered(ORT, "fp32", WORK) is None


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    forms.remember(TunedForm(form=TRANSPOSED, milliseconds={}), ORT, "fp32", WORK)
    (path,) = (tmp_path / "state").rglob("*.json")
    path.write_bytes(b'{"form": {"upsampling": "sideways", "norms": "rows"}, "milliseconds": {}}')
    assert forms.remembered(ORT, "fp32", WORK) is None


@pytest.mark.parametrize("backend", [row.name for row in BACKENDS if row.runs != "graphs" or "cpu" not in row.devices])
def test_what_runs_no_graphs_on_a_cpu_is_refused(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"--tune races graphs .* leave it out"):
        options_of(backend, tune=True)


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densegeo.backends.installed", lambda module: False)
    with pytest.raises(ConfigError, match="ONNX Runtime is not installed: "):
        options_of(tune=True)


def test_a_bundle_says_how_it_is_made_again() -> None:
    assert flags(options_of(tune=True))["--tune"] == []
    assert "--tune" not in flags(options_of())


@pytest.mark.usefixtures("graphs_once")
@pytest.mark.thorough
def test_a_build_in_another_form_is_verified_and_written_so(
    small_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "race", lambda *_: TunedForm(form=TRANSPOSED, milliseconds={str(TRANSPOSED): 1.0}))
    bundle = small_bundle(tune=True)
    manifest = read_manifest(bundle)
    graph = onnx.load(bundle / manifest.buckets[0].decoder.file, load_external_data=False).graph
    assert Counter(node.op_type for node in graph.node)["ConvTranspose"] > 0
    assert verify(bundle, backend="onnxruntime", device="cpu").good
