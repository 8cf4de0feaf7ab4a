"""What `gridreg register` says before and while it registers; tests/test_cli.py has the rest."""

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tqdm

from gridreg_jax.cli import main
from gridreg_jax.errors import InputError
from gridreg_jax.registration import deformable, register
from gridreg_jax.registration.deformable import StageResult

SHAPE = (6, 7, 8)
MODULE = sys.modules[register.__module__]  # which has the function's name


@pytest.fixture
def files(tmp_path, write_nifti, monkeypatch):
    """A folder to work in, with a pair, labels and points, in a folder `out` too."""
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    for folder in (tmp_path, tmp_path / "out"):
        folder.mkdir(exist_ok=True)
        for name in ("fixed", "moving", "warped", "warped_labels", "sigma", "labels"):
            write_nifti(folder / f"{name}.nii.gz", (4 * array).astype(np.int16) if "labels" in name else array)
        for name in ("points", "points_in_moving", "points_in_fixed"):
            (folder / f"{name}.csv").write_text("id,x,y,z\n1,2,3,4\n")
        (folder / "other.nii.gz").symlink_to(folder / "warped.nii.gz")
    return tmp_path


def refused(capsys, *options):
    with pytest.raises(SystemExit) as stopped:
        main(["register", *options])
    assert stopped.value.code == 2
    return capsys.readouterr().err


class Begun(InputError):
    """The long part."""


@pytest.fixture
def begun(monkeypatch):
    def register(*_, **__):
        raise Begun("begun")

    monkeypatch.setattr(MODULE, "register", register)


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ("--fixed fixed.nii.gz --moving out/warped.nii.gz", "out/warped.nii.gz"),
        ("--fixed out/other.nii.gz --moving moving.nii.gz", "out/other.nii.gz"),
        ("--fixed fixed.nii.gz --moving out/../out/sigma.nii.gz", "out/../out/sigma.nii.gz"),
        ("--moving-labels labels.nii.gz --fixed-labels out/warped_labels.nii.gz", "out/warped_labels.nii.gz"),
        ("--also-apply-labels labels.nii.gz out/warped_labels.nii.gz", "out/warped_labels.nii.gz"),
        ("--mask out/warped.nii.gz", "out/warped.nii.gz"),
        ("--fixed-points points.csv --moving-points out/points_in_moving.csv", "out/points_in_moving.csv"),
        ("--moving-points out/points_in_fixed.csv", None),
        ("--moving out/moving.nii.gz --fixed warped.nii.gz --moving-points out/points.csv", None),
    ],
)
def test_an_input_is_not_overwritten(files, capsys, begun, options, taken):
    said = refused(capsys, "--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz", "--out", "out", *options.split())
    expected = f"{taken}: a result would take its place: give another folder than out" if taken else "begun"
    assert said.count("\n") == 1 and expected in said


def test_an_empty_folder_is_refused(files, capsys, begun):
    said = refused(capsys, "--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz", "--out", "")
    assert said.count("\n") == 1 and "--out is empty: give a folder" in said


def test_the_bar_ends_where_fewer_stages_run_than_the_preset_has(files, capsys, monkeypatch):
    bars = []

    class Bar(tqdm.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": False, "file": sys.stderr})
            bars.append(self)

    def register(*_, notify, **__):
        for remaining in (1, 0):
            notify(StageResult((5, 5, 5), SHAPE, (0.5, 0.4), remaining))
            seen.append((bars[0].n, bars[0].total))
        raise Begun("begun")

    seen = []
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(MODULE, "register", register)
    refused(capsys, "--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz", "--out", "new", "--preset", "accurate")
    assert seen == [(1, 2), (2, 2)]


def test_an_error_does_not_wait_for_the_programs_of_all_stages(monkeypatch):
    loading, failing, loaded = threading.Event(), threading.Event(), []

    def load(*_, **__):
        loaded.append(True)
        loading.set()
        failing.wait(20)
        time.sleep(0.5)

    def check_overlap(*_):
        loading.wait(20)
        failing.set()
        raise InputError("far apart")

    monkeypatch.setattr(deformable, "_fit", SimpleNamespace(load=load))
    monkeypatch.setattr(MODULE.affine_start, "check_overlap", check_overlap)
    image = np.random.default_rng(0).uniform(size=(20, 20, 20)).astype(np.float32), np.eye(4)
    with pytest.raises(InputError, match="far apart"):
        register(image, image, affine="off")
    assert len(loaded) == 1
