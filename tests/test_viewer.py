"""The page of `mask2ct view`: what it holds, and what a browser shows of it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
import SimpleITK as sitk
from browser import Browser
from samples import blobs, write_mask

from runtime.__main__ import main
from runtime.core.console import run
from runtime.core.volume import Geometry
from runtime.viewer.page import Viewer, page

READY = "document.getElementById('viewer')?.dataset.state === 'ready'"
DRAWN = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
SLICE = "document.querySelector('.slice span').textContent"
NO_BROWSER = browsers.PROGRAM is None and "MASK2CT_REQUIRE_TOOLS" not in os.environ
in_browser = pytest.mark.skipif(NO_BROWSER, reason="chromium is not installed")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsers.browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with two images of a case, on one mask; each slice has a grey value of its own."""
    viewer = Viewer({205: "myocardium", 500: "left ventricle"})
    mask = np.zeros((8, 24, 24), np.int16)
    mask[2:6, 6:12, 6:12], mask[2:6, 12:18, 12:18] = 205, 500
    ramp = np.broadcast_to(np.arange(-400, 400, 100, np.int16)[:, None, None], mask.shape)
    geometry = Geometry.from_spacing((2, 2, 4))
    for title, image in (("synthetic", ramp), ("real", ramp[::-1])):
        assert viewer.add("patient", title, image, geometry, mask)
    path = tmp_path_factory.mktemp("page") / "view.html"
    page(path, "A page", "Synthetic images.", [("Results", viewer.html())])
    return path


def shown_pixels(chromium: Browser) -> bytes:
    chromium.value(DRAWN)
    return chromium.picture()


@in_browser
def test_volumes_scroll_together_in_browser(chromium: Browser, shown: Path) -> None:
    """The wheel over one image moves both; nothing is asked of the network."""
    chromium.errors.clear(), chromium.requests.clear()
    chromium.open(shown, 800, 700)
    chromium.wait(READY)
    before, place = shown_pixels(chromium), chromium.value(SLICE)
    values = "[...document.querySelectorAll('.value')].map((v) => v.textContent)"
    assert place == "slice 5 of 8" and chromium.value(values)[0].startswith("0 HU")
    centre = json.loads(
        chromium.value(
            "(() => { const b = document.querySelector('canvas').getBoundingClientRect();"
            " return JSON.stringify([b.x + b.width / 2, b.y + b.height / 2]) })()"
        )
    )
    chromium.wheel(*centre, 1)
    chromium.wait(f"{SLICE} !== {place!r}")
    assert shown_pixels(chromium) != before
    first, second = (int(text.split()[0]) for text in chromium.value(values))
    assert first == -second - 100 and first in (-100, 100)
    assert not chromium.errors
    assert all(url.startswith(("file:", "data:", "blob:")) for url in chromium.requests)


@in_browser
def test_window_and_mask_change_pixels(chromium: Browser, shown: Path) -> None:
    chromium.errors.clear()
    chromium.open(shown, 800, 700)
    chromium.wait(READY)
    pictures = {shown_pixels(chromium)}
    for button in ("planes button:nth-child(2)", "windows button:nth-child(2)"):
        chromium.click(f".{button}")
        pictures.add(shown_pixels(chromium))
    chromium.value(
        "(() => { const i = document.querySelector('.opacity input'); i.value = 1;"
        " i.dispatchEvent(new Event('input')) })()"
    )
    pictures.add(shown_pixels(chromium))
    assert len(pictures) == 4
    assert "window -160 to 240 HU" in chromium.value("document.querySelector('.place').textContent")
    legend = "document.querySelector('.legend').textContent"
    assert chromium.value(legend) == "myocardiumleft ventricle"
    assert not chromium.errors


@in_browser
def test_page_fits_a_phone(chromium: Browser, shown: Path) -> None:
    chromium.errors.clear()
    chromium.open(shown, 390, 844)
    chromium.wait(READY)
    assert chromium.value("document.documentElement.scrollWidth") <= 390
    sizes = "[...document.querySelectorAll('.screen')].map((s) => s.clientWidth)"
    assert all(width > 300 for width in chromium.value(sizes))
    assert not chromium.errors


@pytest.fixture
def masks(tmp_path: Path) -> Path:
    (tmp_path / "masks").mkdir()
    write_mask(tmp_path / "masks" / "heart.nii.gz", blobs((6, 40, 40)))
    return tmp_path / "masks"


def synthesize(masks: Path, model: Path, *words: object) -> Path:
    out = masks.parent / "out"
    line = ["synth", masks, "--model", model, "--backend", "fake", "--output", out, "--quiet"]
    assert run(main, [str(word) for word in (*line, *words)]) == 0
    return out


def images(path: Path) -> list[dict[str, object]]:
    """The images that a page holds, from its own data."""
    text = path.read_text()
    data = re.search(r'id="viewer-data">(.*?)</script>', text)
    assert data is not None and not re.search(r'(src|href)=["\']?https?:', text)
    return [
        {"case": case["name"], "title": image["title"], "labels": len(image["labels"])}
        for case in json.loads(data[1])["cases"]
        for image in case["images"]
    ]


@pytest.mark.parametrize("form", ["nifti", "mha", "nnunet", "msd", "dicom"])
def test_view_reads_every_format(
    form: str, masks: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = synthesize(masks, fake_model, "--format", form, "--variants", 2)
    assert run(main, ["view", str(out), "--model", str(fake_model), "--no-open"]) == 0
    assert f"2 images → {out / 'view.html'}" in capsys.readouterr().out
    shown = images(out / "view.html")
    assert [image["title"] for image in shown] == ["variant 0", "variant 1"]
    assert {image["case"] for image in shown} == {"heart"}
    assert all(image["labels"] for image in shown)
    assert "left ventricle" in (out / "view.html").read_text()


def test_view_pairs_masks_and_real_cts(masks: Path, fake_model: Path) -> None:
    out = synthesize(masks, fake_model)
    mask = sitk.ReadImage(str(masks / "heart.nii.gz"))
    real = sitk.Cast(mask, sitk.sitkInt16) * 2 - 1000
    real.CopyInformation(mask)
    (masks.parent / "real").mkdir()
    sitk.WriteImage(real, str(masks.parent / "real" / "heart_0000.nii.gz"))
    words = ["--masks", masks, "--beside", masks.parent / "real", "--output", masks / "x.html"]
    assert run(main, ["view", str(out), "--no-open", *map(str, words)]) == 0
    assert [image["title"] for image in images(masks / "x.html")] == ["synthetic", "real"]
    assert all(image["labels"] for image in images(masks / "x.html"))
    assert (masks / "x.html").stat().st_mode & 0o077 == 0


def test_view_says_what_it_leaves_out(
    masks: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = synthesize(masks, fake_model, "--variants", 3)
    size = 4 * (out / "heart_v0_ct.nii.gz").stat().st_size
    assert run(main, ["view", str(out), "--no-open", "--max-size", str(size)]) == 0
    captured = capsys.readouterr()
    left_out = re.search(r"warning: (\d) images are left out", captured.err)
    assert left_out is not None and len(images(out / "view.html")) == 3 - int(left_out[1])


@pytest.mark.parametrize("content", ["nothing", "a real CT", "no folder"])
def test_view_refuses_what_holds_no_result(
    content: str, masks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = masks if content == "a real CT" else masks.parent / "empty"
    if content == "nothing":
        folder.mkdir()
    assert run(main, ["view", str(folder), "--no-open"]) == 2
    error = capsys.readouterr().err
    assert "expected" in error and "Traceback" not in error
    assert not (folder / "view.html").exists()


def test_view_names_damaged_results(
    masks: Path, fake_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mask(masks / "other.nii.gz", blobs((6, 40, 40), seed=2))
    out = synthesize(masks, fake_model)
    damaged = out / "heart_ct.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    assert run(main, ["view", str(out), "--no-open"]) == 1
    assert "heart_ct.nii.gz" in capsys.readouterr().err
    assert [image["case"] for image in images(out / "view.html")] == ["other"]


def test_page_data_cannot_end_its_script(tmp_path: Path) -> None:
    viewer = Viewer({1: "</script><b>"})
    image = np.zeros((2, 4, 4), np.int16)
    viewer.add("</script>", "x", image, Geometry.from_spacing((1, 1, 1)), image + 1)
    assert "</script><b>" not in viewer.html()


def test_vendored_niivue_is_the_stated_one(command) -> None:
    done = command("tools/vendor_niivue.py", "--check")
    assert done.returncode == 0, done.stderr
