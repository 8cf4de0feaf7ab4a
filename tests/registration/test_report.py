"""The page: its pictures read by another library, and what a browser shows of it."""

import dataclasses
import io
import re
import shutil
import subprocess
from base64 import b64decode
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from gridreg_jax.data.nifti import Volume
from gridreg_jax.registration.deformable import StageResult
from gridreg_jax.registration.register import Registration
from gridreg_jax.registration.report import _png, page
from gridreg_jax.transforms.certificate import certify

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHAPE, SHIFT = (20, 30, 25), (1.5, -2.0, 3.0)


@pytest.fixture(scope="module")
def text():
    volume = Volume(np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32), np.eye(4), Path("scan<1>.nii"))
    control_grid = np.zeros((4, 4, 4, 3)) + SHIFT
    stages = (StageResult((4, 4, 4), SHAPE, (0.9, 0.7, 0.6)), StageResult((5, 5, 5), SHAPE, (0.5, 0.4)))
    certificate = certify(control_grid, SHAPE)
    registration = Registration(
        volume, volume, np.eye(4), control_grid, certificate, stages, volume, volume, None, None, {}
    )
    planes = {"fixed": 1.0, "before": 0.1, "affine": 0.3, "after": 0.6, "determinant": 1.0, "sigma_mm": 2.0}
    certificate = dataclasses.replace(certificate, lower_bound=0.57799)
    proven = {"lower_bound": certificate.lower_bound, "text": str(certificate)}
    metrics = {"command": "gridreg register --out 'a & b'", "certificate": proven, "version": "1"}
    metrics["correlation"] = {"before": None, "after": 0.5}
    return page(registration, metrics, {name: np.full(SHAPE, value) for name, value in planes.items()})


def test_a_picture_is_read_back():
    rgb = np.random.default_rng(1).integers(0, 256, (7, 5, 3)) / 255
    np.testing.assert_allclose(matplotlib.image.imread(io.BytesIO(_png(rgb))), rgb, atol=1e-6)


def test_the_page_is_whole(text):
    assert "scan&lt;1&gt;.nii" in text and "scan<1>" not in text and "&#x27;a &amp; b&#x27;" in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 3 * (4 + 6)
    for picture in pictures:
        assert matplotlib.image.imread(io.BytesIO(b64decode(picture))).shape[2] == 3
    assert not re.search(r'(src|href)="(?!data:)', text), "the page needs another file"
    assert "invertible everywhere: Jacobian determinant at least 0.577<" in text and "0.578" not in text
    assert "4x4x4 on 20x30x25 voxels" in text
    assert "before none, after 0.5" in text
    assert text.count("<polyline") == 2 and text.count("uncertainty") == 1


def test_the_grid_is_drawn_where_the_displacement_takes_it(text):
    first_lines = re.findall(r'<path d="M([^M"]+)', text)
    assert len(first_lines) == 3
    for line, (right, upwards) in zip(first_lines, [(0, 1), (0, 2), (1, 2)], strict=True):
        pixels = 190 / max(SHAPE[right] - 1, SHAPE[upwards] - 1)
        x, y = np.array([point.split(",") for point in line.split()], float).T
        np.testing.assert_allclose(x, np.full(SHAPE[upwards], pixels * SHIFT[right]), atol=0.051)
        # Rows of pixels count downwards.
        voxels = np.arange(SHAPE[upwards]) + SHIFT[upwards]
        np.testing.assert_allclose(y, pixels * (SHAPE[upwards] - 1 - voxels), atol=0.051)


@pytest.mark.skipif(BROWSER is None, reason="no browser")
def test_the_slider_parts_fixed_and_warped_in_a_browser(text, tmp_path):
    def shown(text):
        (tmp_path / "report.html").write_text(text)
        options = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,1200".split()
        picture = tmp_path / "report.png"
        command = [BROWSER, *options, f"--user-data-dir={tmp_path}", f"--screenshot={picture}"]
        subprocess.run([*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
        return np.rint(matplotlib.image.imread(picture)[..., :3] * 255)

    def widest(pixels, value):
        """Pixels of this grey in the row that has most of them: one across the comparison of the three planes."""
        return (pixels == round(255 * value)).all(axis=-1).sum(axis=1).max()

    half = widest(shown(text), 0.6)
    assert half > 400
    moved = shown(text.replace('max="100" value="50"', 'max="100" value="20"'))
    assert widest(moved, 0.6) > 1.5 * half
    other = shown(text.replace('<option value="affine">', '<option value="affine" selected>'))
    assert widest(other, 0.6) < 0.5 * half and widest(other, 0.3) > 400
