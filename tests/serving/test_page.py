"""The page in a real browser: a picture in, views, two models, distances, files, errors; by mouse, keys and on a phone.

Fails where there is no Chromium, so that it cannot be left out unnoticed.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from densegeo.runtime import Estimator
from densegeo.runtime.images import load_image
from tests.support.browser import Tab, browser
from tests.support.project import ROOT
from tests.support.serving import Served, served

pytestmark = pytest.mark.integration

PHOTO = ROOT / "densegeo" / "photographs" / "hall.jpg"  # 512x384
TOKEN = b"0123456789abcdef-a-token"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def two(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The toy bundle under two names."""
    second = tmp_path_factory.mktemp("second") / "second"
    second.symlink_to(toy_bundle)
    with served([toy_bundle, second]) as running:
        yield running


@pytest.fixture
def page(tab: Tab, two: Served) -> Iterator[Tab]:
    """The page with nothing in it; nothing that it does may be an error in the console."""
    tab.size(1200, 800)
    tab.requests.clear()
    tab.problems.clear()
    tab.open(two.url)
    yield tab
    assert tab.problems == []


def done(page: Tab) -> None:
    page.until("document.querySelector('#busy').hidden && !document.querySelector('#download').disabled")


def upload(page: Tab, path: Path = PHOTO) -> None:
    page.choose_file("#file", path)
    done(page)


def set_value(page: Tab, selector: str, value: str, event: str = "change") -> None:
    page.run(
        f"(() => {{ const one = document.querySelector('{selector}'); one.value = '{value}';"
        f" one.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"
    )


def view(page: Tab, name: str) -> None:
    page.run(f"document.querySelector('input[value={name}]').click()")


def pixels(page: Tab, selector: str) -> np.ndarray:
    """What a canvas shows, RGBA."""
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    text = str(page.run(f"document.querySelector('{selector}').toDataURL()"))
    import base64

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("RGBA"))


def text(page: Tab, selector: str) -> str:
    return str(page.run(f"document.querySelector('{selector}').textContent"))


def test_it_loads_from_the_server_alone(page: Tab, two: Served) -> None:
    upload(page)
    assert "bundle" in text(page, "#model")
    assert "toy" in text(page, "#facts")
    assert len(page.requests) > 6
    assert {address.split("/")[2] for address in page.requests if not address.startswith(("blob:", "data:"))} == {
        two.url.removeprefix("http://")
    }
    policy = httpx.get(two.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    for path in (ROOT / "serving" / "page").iterdir():
        assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "").replace("https, or", ""), path


def test_depth_and_normals_are_the_estimators(page: Tab, toy_bundle: Path) -> None:
    upload(page)
    depth = pixels(page, "#left")
    view(page, "normals")
    normals = pixels(page, "#left")
    with Estimator(toy_bundle, device="cpu") as estimator:
        geometry = estimator(PHOTO)
    tiles = np.asarray(geometry.visualize())
    for seen, tile in ((depth, tiles[:, :512]), (normals, tiles[:, 512:])):
        assert seen.shape == (384, 512, 4)
        # the browser's JPEG decoder is another, and percentiles are taken of other samples
        assert np.abs(seen[..., :3].astype(int) - tile).mean() < 3
    view(page, "picture")
    assert np.abs(pixels(page, "#left")[..., :3].astype(int) - load_image(PHOTO).pixels).mean() < 3


def test_points_turn(page: Tab) -> None:
    upload(page)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
    page.open(page.run("location.href"))
    upload(page)
    view(page, "points")
    still = pixels(page, "#cloud")
    assert (still[..., 3] > 0).mean() > 0.05
    assert np.array_equal(still, pixels(page, "#cloud"))
    page.run("document.querySelector('#cloud').focus()")
    page.press("ArrowLeft", "ArrowUp", "+")
    turned = pixels(page, "#cloud")
    assert (turned != still).any(axis=-1).mean() > 0.02
    page.press("Home")
    assert np.array_equal(pixels(page, "#cloud"), still)
    page.drag(400, 400, 80, 30)
    assert not np.array_equal(pixels(page, "#cloud"), still)
    page.call("Emulation.setEmulatedMedia", features=[])


def test_without_asking_for_rest_points_swing(page: Tab, tmp_path: Path) -> None:
    page.size(400, 500)
    with Image.open(PHOTO) as photo:
        photo.resize((128, 96)).save(tmp_path / "small.png")
    upload(page, tmp_path / "small.png")
    view(page, "points")
    first = pixels(page, "#cloud")
    page.run("new Promise((done) => setTimeout(done, 400))")
    assert not np.array_equal(pixels(page, "#cloud"), first)


def test_two_models_at_a_slider(page: Tab) -> None:
    upload(page)
    assert page.run("document.querySelector('#compare').hidden")
    set_value(page, "#other", "second")
    done(page)
    page.until("!document.querySelector('#compare').hidden && !document.querySelector('#right').hidden")
    assert (text(page, "#name-left"), text(page, "#name-right")) == ("bundle", "second")
    clip = "parseFloat(document.querySelector('#right').style.clipPath.match(/([0-9.]+)px\\)/)[1])"
    half = page.run(clip)
    page.run("document.querySelector('#slider').focus()")
    page.press("ArrowRight", "ArrowRight", "ArrowRight")
    assert page.run(clip) > half
    set_value(page, "#slider", "100", "input")
    assert page.run(clip) > half * 1.5
    view(page, "points")
    page.until("!document.querySelector('#cloud').hidden")
    set_value(page, "#other", "")
    page.until("document.querySelector('#compare').hidden")


def test_two_pixels_give_a_distance(page: Tab, toy_bundle: Path) -> None:
    upload(page)
    box = page.run(
        "(() => { const { x, y, width, height } = document.querySelector('#left').getBoundingClientRect();"
        " return [x, y, width, height]; })()"
    )
    scale = min(box[2] / 512, box[3] / 384)
    left, top = box[0] + (box[2] - 512 * scale) / 2, box[1] + (box[3] - 384 * scale) / 2
    places = ((100, 80), (400, 300))
    for column, row in places:
        page.click(left + (column + 0.5) * scale, top + (row + 0.5) * scale)
    assert "needs nearest and farthest" in text(page, "#distance")
    set_value(page, "#near", "1.5")
    set_value(page, "#far", "6")
    page.until("document.querySelector('#distance').textContent.includes('apart')")
    with Estimator(toy_bundle, device="cpu") as estimator:
        metric = estimator(PHOTO).to_metric(near=1.5, far=6.0)
    focal = 256 / np.tan(np.radians(30))
    points = metric.points((focal, focal, 255.5, 191.5))
    (a, b) = (points[row, column] for column, row in places)
    said = [float(part) for part in text(page, "#distance").replace(" m", "").split() if part[0].isdigit()]
    assert said == pytest.approx([np.linalg.norm(a - b), a[2], b[2]], rel=0.02, abs=0.02)
    assert page.run("document.querySelectorAll('#marks circle').length") == 2


def test_by_keyboard_alone(page: Tab) -> None:
    """Every control is reached with Tab; a distance is taken with arrows and Enter."""
    upload(page)
    reached = set()
    page.run("document.body.focus()")
    for _ in range(24):
        page.press("Tab")
        reached.add(
            page.run("document.activeElement.id || document.activeElement.value || document.activeElement.tagName")
        )
    assert {"file", "camera", "model", "other", "near", "far", "fov", "format", "download", "left", "depth"} <= reached
    page.run("document.querySelector('#near').focus()")
    page.press("2", "Enter")
    page.run("document.querySelector('#far').focus()")
    page.press("8", "Tab")
    done(page)
    page.run("document.querySelector('#left').focus()")
    page.press("Enter", "ArrowLeft", "ArrowLeft", "ArrowUp", "Enter")
    page.until("document.querySelector('#distance').textContent.includes('apart')")
    page.press("Escape")
    assert text(page, "#distance") == ""


def test_files(page: Tab, tmp_path: Path) -> None:
    upload(page)
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for kind, name in (
        ("view.png", "bundle.png"),
        ("application/x-npz", "bundle.npz"),
        ("application/json", "bundle.json"),
    ):
        set_value(page, "#format", kind)
        page.run("document.querySelector('#download').click()")
        end = time.monotonic() + 30
        while not (tmp_path / name).exists():
            assert time.monotonic() < end, text(page, "#status")
            time.sleep(0.05)
    with np.load(tmp_path / "bundle.npz") as arrays:
        assert arrays["prediction"].shape == (384, 512)
    set_value(page, "#format", "model/ply")
    page.run("document.querySelector('#download').click()")
    page.until("document.querySelector('#status').className === 'bad'")
    page.problems.clear()  # the console notes the 400
    assert text(page, "#status").startswith("CalibrationError: Normals do not tell the scale")


def test_the_camera(page: Tab) -> None:
    page.run("document.querySelector('#camera').click()")
    page.until("document.querySelector('#camera-dialog').open && document.querySelector('#video').videoWidth > 0")
    page.run("document.querySelector('#shoot').click()")
    done(page)
    assert not page.run("document.querySelector('#camera-dialog').open")
    assert page.run("document.querySelector('#video').srcObject") is None
    assert not page.run("document.querySelector('#left').hidden")


def test_errors_are_said(page: Tab, two: Served, tmp_path: Path) -> None:
    page.choose_file("#file", Path(__file__))
    page.until("document.querySelector('#status').className === 'bad'")
    assert "not a picture" in text(page, "#status")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    page.choose_file("#file", tmp_path / "small.png")
    page.until("document.querySelector('#status').textContent.includes('too small')")
    assert httpx.post(f"{two.url}/v2/repository/models/bundle/unload").status_code == 200
    page.choose_file("#file", PHOTO)
    page.until("document.querySelector('#status').textContent.includes('NotReadyError')")
    assert page.run("document.querySelector('#busy').hidden")
    assert httpx.post(f"{two.url}/v2/repository/models/bundle/load").status_code == 200
    page.problems.clear()
    page.choose_file("#file", PHOTO)
    done(page)
    assert page.run("document.querySelector('#status').className") == ""
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.choose_file("#file", PHOTO)
    page.until("document.querySelector('#status').textContent.includes('cannot be reached')")
    page.call("Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.problems.clear()


def test_a_token_is_asked_for(tab: Tab, toy_bundle: Path) -> None:
    with served(toy_bundle, token=TOKEN) as running:
        tab.call("Page.navigate", url=running.url)
        tab.until("document.querySelector('#token-dialog')?.open")
        set_value(tab, "#token", TOKEN.decode())
        tab.run("document.querySelector('#token-dialog button').click()")
        tab.until("document.body.dataset.ready === 'yes'")
        upload(tab)


def test_on_a_phone(page: Tab, two: Served) -> None:
    page.size(390, 844, phone=True)
    page.open(two.url)
    upload(page)
    assert page.run("document.documentElement.scrollWidth") == 390
    small = page.run(
        "[...document.querySelectorAll('button, select, .button, #views span, input:not([type=radio]):not(.unseen)')]"
        ".filter((one) => one.offsetParent && one.getBoundingClientRect().height < 40).map((one) => one.outerHTML)"
    )
    assert small == []  # a finger's size
    top = page.run("document.querySelector('#frame').getBoundingClientRect().bottom")
    assert top < 844  # the result is seen without scrolling
    view(page, "points")
    assert (pixels(page, "#cloud")[..., 3] > 0).mean() > 0.05
