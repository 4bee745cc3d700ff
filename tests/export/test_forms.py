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
from safetensors import SafetensorError  # noqa: E402

from densegeo.backends import BACKENDS, FORMS, BackendRow, Form, backend_row  # noqa: E402
from densegeo.errors import BackendError, ConfigError, ExportError, ResourceError  # noqa: E402
from densegeo.export import form_race, forms  # noqa: E402
from densegeo.export.build_options import BuildOptions  # noqa: E402
from densegeo.export.command_line import flags  # noqa: E402
from densegeo.export.display import Display  # noqa: E402
from densegeo.export.form_race import LARGEST, Work  # noqa: E402
from densegeo.export.forms import TunedForm  # noqa: E402
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


def graph_of(form: Form, folder: Path, base: str = "fp32") -> onnx.GraphProto:
    folder.mkdir()
    path = form_race._piece(WORK).write(form, torch.zeros(WORK.inputs), folder, base)
    return onnx.load(path, load_external_data=False).graph


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_each_form_is_another_graph(tmp_path: Path, base: str) -> None:
    expanded = dict[Form, int]()
    for index, form in enumerate(FORMS):
        operators = Counter(node.op_type for node in graph_of(form, tmp_path / str(index), base).node)
        assert operators["ConvTranspose"] == (form.upsampling == "transposed")
        expanded[form] = operators["Expand"]
    for upsampling in ("phases", "transposed"):  # by channels, what a group has goes to each of its channels
        rows, channels = (expanded[Form(upsampling, norms)] for norms in ("rows", "channels"))
        assert rows < channels


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("onnxruntime", "fp32"),
        pytest.param("onnxruntime", "fp16", marks=pytest.mark.thorough),
        pytest.param("openvino", "fp32", marks=pytest.mark.thorough),
        pytest.param("openvino", "bf16", marks=pytest.mark.thorough),
    ],
)
def test_every_form_runs_in_the_backend_and_is_right(
    backend: str, base: str, display: Display, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(backend)
    monkeypatch.setattr(form_race, "SECONDS", 0.0)
    _, milliseconds = form_race.race(backend_row(backend), base, WORK, display)
    assert set(milliseconds) == {str(form) for form in FORMS}  # what is wrong or does not run has no time


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What each form takes (seconds), and by how much it is off; one without a time does not run."""

    def of(seconds: dict[Form, float], off: dict[Form, float] | None = None) -> None:
        def opened(_row: object, _base: object, work: Work, form: Form, example: Any, _folder: Path) -> Any:
            if form not in seconds:
                raise BackendError("no kernel for it")
            with torch.no_grad():
                right = form_race._piece(work)(example).numpy()

            def run() -> np.ndarray:
                time.sleep(seconds[form])
                return right * (1 + (off or {}).get(form, 0.0))

            return run

        monkeypatch.setattr(form_race, "_opened", opened)
        monkeypatch.setattr(form_race, "SECONDS", 0.0)

    return of


def test_the_fastest_form_is_taken(raced: Callable[..., None], display: Display) -> None:
    raced({form: 0.005 if form == TRANSPOSED else 0.02 for form in FORMS})
    assert form_race.race(ORT, "fp32", WORK, display)[0] == TRANSPOSED


@pytest.mark.parametrize(
    ("times", "own", "worth"),
    [
        ([9, 9, 9, 9, 9], [10, 10, 10, 10, 10], True),
        ([9.8, 9.8, 9.8, 9.8, 9.8], [10, 10, 10, 10, 10], False),  # hardly faster
        ([9, 9, 9, 12, 12], [10, 10, 10, 10, 10], False),  # by its median, and not in most rounds
        ([9, 9, 9, 9, 40], [10, 10, 10, 10, 10], True),  # one outlier is none
        ([9, 9, 9, 9, 9], [8, 8, 30, 30, 30], False),  # the backend's own was disturbed
    ],
)
def test_what_takes_the_place_of_the_backends_own(times: list[float], own: list[float], worth: bool) -> None:
    assert form_race._worth(times, own) is worth


def test_short_runs_are_raced_for_some_seconds(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form_race, "SECONDS", 0.5)
    with display.bar("tuning", 1) as progress:
        rounds = form_race._by_turns({ORT.form: lambda: time.sleep(0.01)}, progress)  # type: ignore[arg-type,return-value]
    assert 20 < len(rounds[ORT.form]) <= 51


def test_what_is_wrong_or_does_not_run_is_not_taken(
    raced: Callable[..., None], display: Display, caplog: pytest.LogCaptureFixture
) -> None:
    absent = Form("phases", "channels")
    raced({form: 0.0 if form == TRANSPOSED else 0.01 for form in FORMS if form != absent}, {TRANSPOSED: 2e-5})
    chosen, milliseconds = form_race.race(ORT, "fp32", WORK, display)
    assert chosen != TRANSPOSED
    assert set(milliseconds) == {str(form) for form in FORMS} - {str(TRANSPOSED), str(absent)}
    assert f"{absent}: no kernel for it" in caplog.text
    assert f"{TRANSPOSED} is off by 2.0e-05, and the bound is 1.0e-05: not taken" in caplog.text


def test_without_the_backends_own_form_nothing_is_chosen(raced: Callable[..., None], display: Display) -> None:
    raced(dict.fromkeys(FORMS, 0.0), {ORT.form: 1e-3})
    with pytest.raises(ExportError, match=r"ONNX Runtime does not run its own form.*leave --tune out"):
        form_race.race(ORT, "fp32", WORK, display)


def test_a_full_folder_for_temporary_files_is_named(display: Display, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(form_race, "write_weights", full)
    with pytest.raises(ResourceError, match=r"--tune cannot write into .*No space left.*TMPDIR"):
        form_race.race(ORT, "fp32", WORK, display)


@pytest.fixture
def transposed_wins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The races that were run, by backend; none of them really is."""
    races: list[str] = []

    def race(row: BackendRow, *_: object) -> tuple[Form, dict[str, float]]:
        races.append(row.name)
        return TRANSPOSED, {str(TRANSPOSED): 1.0}

    monkeypatch.setattr(forms, "race", race)
    return races


def test_later_builds_take_what_was_raced(display: Display, transposed_wins: list[str]) -> None:
    assert forms.choose(options_of(), SMALL, display) is None
    for _ in range(2):  # an interrupted build goes on in the form that it began with
        assert forms.choose(options_of(tune=True), SMALL, display) == TRANSPOSED
    assert transposed_wins == ["onnxruntime"]
    later = msgspec.structs.replace(options_of(), form=forms.choose(options_of(), SMALL, display))
    assert later.graph_form == TRANSPOSED
    assert forms.in_words(later).startswith(f"{TRANSPOSED}: the fastest on this CPU")
    before, after = (stage_keys(options, [], "") for options in (options_of(), later))
    assert before.weights == after.weights
    assert before.graphs != after.graphs
    for other in (options_of("openvino"), options_of(precision="fp16"), options_of("torch"), options_of(tune=False)):
        assert forms.choose(other, SMALL, display) is None
    assert forms.choose(options_of(), msgspec.structs.replace(SMALL, ch=64), display) is None
    assert forms.choose(options_of(sizes=(Size(192, 128),)), SMALL, display) is None


def test_what_has_no_forms_takes_none(
    display: Display, transposed_wins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forms.choose(options_of(tune=True), SMALL, display)
    one_level = msgspec.structs.replace(SMALL, ch_mult=(1,))
    assert forms.choose(options_of(tune=True), one_level, display) is None
    assert forms.choose(options_of(without=("upsample",)), SMALL, display) is None
    monkeypatch.setattr("densegeo.export.quantizer.plans_convolutions", lambda calibration: True)
    assert forms.choose(options_of(), SMALL, display) is None
    with pytest.raises(ConfigError, match="this plan has 8-bit ones: leave it out"):
        options_of(tune=True)


def test_nothing_is_advised_that_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--tune measures on this one" in forms.in_words(options_of("openvino"))
    without = forms.in_words(options_of("openvino", without=("upsample",)))
    assert without.startswith("norms by channels: ")
    assert "--tune" not in without
    assert forms.in_words(options_of()) == ""
    with pytest.raises(ConfigError, match="these need the rewrite upsample: leave it out"):
        options_of("openvino", without=("upsample",), tune=True)
    monkeypatch.setattr("densegeo.export.build_options.has_cuda_driver", lambda: True)
    with pytest.raises(ConfigError, match="a GPU would run these: leave it out"):
        options_of(tune=True)
    options_of("openvino", tune=True)  # which runs on CPUs alone


@pytest.mark.parametrize(
    ("picture", "inputs"),
    [(Size(64, 48), (24, 32)), (Size(512, 512), (256, 256)), (Size(1024, 768), (221, 295)), (Size(33, 35), (17, 16))],
)
def test_what_is_raced_has_half_of_the_pictures_size_or_less(picture: Size, inputs: tuple[int, int]) -> None:
    work = Work.of(VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16), picture)
    assert work.inputs == (1, 256, *inputs)
    assert work.widths == (256, 128)
    assert work.size.width * work.size.height <= LARGEST


def tuned(form: str = str(TRANSPOSED)) -> TunedForm:
    return TunedForm(form=form, milliseconds={form: 1.0}, backend="onnxruntime", base="fp32", work=WORK)


@pytest.mark.parametrize(
    ("target", "value"),
    [
        ("installed_version", lambda distribution: "1.99.0"),
        ("whole_cpu", lambda: "Another"),
        ("state.machine", lambda: "other"),
    ],
)
def test_another_library_or_machine_is_another_race(
    monkeypatch: pytest.MonkeyPatch, target: str, value: Callable[..., object]
) -> None:
    forms.remember(tuned())
    assert forms.remembered(ORT, "fp32", WORK) == tuned()
    monkeypatch.setattr(f"densegeo.export.forms.{target}", value)
    assert forms.remembered(ORT, "fp32", WORK) is None


WHOLE = msgspec.json.encode(tuned())


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        WHOLE[:-9],
        WHOLE.replace(b"transposed", b"\xff"),
        WHOLE.replace(b"transposed", b"sideways"),
        b'{"form": {}, "milliseconds": {}}',
    ],
)
def test_a_damaged_record_is_none(tmp_path: Path, damaged: bytes) -> None:
    forms.remember(tuned())
    (path,) = (tmp_path / "state").rglob("*.json")
    assert path.read_bytes() == WHOLE
    path.write_bytes(damaged)
    assert forms.remembered(ORT, "fp32", WORK) is None


def test_a_state_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    forms.remember(tuned())
    assert "later builds will not know which form was the fastest" in caplog.text


@pytest.mark.parametrize("backend", [row.name for row in BACKENDS if row.runs != "graphs" or "cpu" not in row.devices])
def test_what_runs_no_graphs_on_a_cpu_is_refused(backend: str) -> None:
    with pytest.raises(ConfigError, match=r"--tune races graphs .* leave it out"):
        options_of(backend, tune=True)


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("densegeo.backends.installed", lambda module: False)
    with pytest.raises(ConfigError, match="ONNX Runtime is not installed: "):
        options_of(tune=True)


def test_a_bundle_says_how_it_is_made_again() -> None:
    tuned_options = msgspec.structs.replace(options_of(), form=TRANSPOSED)
    assert flags(tuned_options)["--tune"] == []
    assert flags(options_of(tune=False))["--no-tune"] == []
    assert {"--tune", "--no-tune"}.isdisjoint(flags(options_of()))


@pytest.mark.usefixtures("graphs_once")
@pytest.mark.thorough
def test_a_build_in_another_form_is_verified_and_written_so(small_bundle: Build, transposed_wins: list[str]) -> None:
    bundle = small_bundle(tune=True)
    manifest = read_manifest(bundle)
    graph = onnx.load(bundle / manifest.buckets[0].decoder.file, load_external_data=False).graph
    assert Counter(node.op_type for node in graph.node)["ConvTranspose"] > 0
    assert verify(bundle, backend="onnxruntime", device="cpu").good
