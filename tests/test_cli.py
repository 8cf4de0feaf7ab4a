"""The program `gridreg`: its commands on small files, and every mistake is one line."""

import json
import re
import signal
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax import __version__
from gridreg_jax.cli import _course, main
from gridreg_jax.data import nifti
from gridreg_jax.export import itk, itk_files
from gridreg_jax.registration import deformable, inspection

SHAPE = (24, 26, 22)


@pytest.fixture(autouse=True)
def _format_of_warnings(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `main` sets its own


@pytest.fixture(scope="module")
def files(tmp_path_factory, write_nifti):
    """A pair of rough images, one a shifted copy, with labels; and files that are not as they should be."""
    folder = tmp_path_factory.mktemp("files")
    rough = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 2)
    window = np.prod(np.meshgrid(*[np.hanning(size) for size in SHAPE], indexing="ij"), axis=0)
    fixed = ((rough / rough.std() + 3) * window).astype(np.float32)
    far = nib.affines.from_matvec(np.eye(3), [500.0, 0, 0])
    write_nifti(folder / "fixed.nii.gz", fixed)
    write_nifti(folder / "moving.nii.gz", ndimage.shift(fixed, (1.5, -1, 0.5)))
    write_nifti(folder / "far.nii.gz", fixed, far)
    write_nifti(folder / "four.nii.gz", np.stack([fixed, fixed], axis=-1))
    write_nifti(folder / "labels.nii.gz", (fixed > 1).astype(np.uint8))
    write_nifti(folder / "other_labels.nii.gz", (fixed[:-1] > 1).astype(np.uint8))
    write_nifti(folder / "field4d.nii.gz", np.zeros((4, 4, 4, 3), np.float32))
    write_nifti(folder / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    write_nifti(folder / "slanted.nii.gz", fixed, np.eye(4) + 0.1 * np.eye(4, k=1) * [0, 1, 0, 0])
    write_nifti(folder / "slice.nii.gz", fixed[..., 10:11])
    few = np.zeros(SHAPE, np.uint8)
    few[:4, :4, :4] = 1
    write_nifti(folder / "few.nii.gz", few)
    nib.save(nib.Nifti1Image(fixed, None), folder / "nowhere.nii.gz")
    flat = nib.Nifti1Image(fixed, np.eye(4))
    flat.set_sform(np.diag([1.0, 0, 1, 1]), code=1)
    nib.save(flat, folder / "flat.nii.gz")
    (folder / "points.csv").write_text("id,x,y,z\n4,10,11,12\n")
    (folder / "other_points.csv").write_text("id,x,y,z\n5,10,11,12\n")
    (folder / "far_points.csv").write_text("id,x,y,z\n4,10,-110,12\n")
    (folder / "a_file").touch()
    (folder / "bad.tfm").write_text("nothing")
    control_grid = np.random.default_rng(1).normal(size=(5, 5, 5, 3))
    spline = itk.bspline_transform(control_grid, SHAPE, np.eye(4))
    itk_files.write_tfm(folder / "spline.tfm", [itk.affine_transform(np.eye(4)), spline])
    return folder


def command(files, text):
    """The words of a command; those with a dot or `out` name files in the folder, `a_file/out` too."""
    return [
        str(files / word) if re.search(r"\.(nii\.gz|tfm|csv|mat)$|^[^-]*out$", word) else word for word in text.split()
    ]


def test_help_comes_without_jax():
    code = "from gridreg_jax import cli\ntry: cli.main(['register', '--help'])\nexcept SystemExit: pass\n"
    check = "import sys; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'nibabel')))"
    found = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--moving-labels" in found.stdout


def test_register_then_apply_and_inspect(files, capsys):
    options = "register --fixed fixed.nii.gz --moving moving.nii.gz --out new/out --preset fast --grid 5"
    # Neither two options of one name nor images of one value are lost or refused.
    others = "--also-apply far.nii.gz --also-apply empty.nii.gz fixed.nii.gz --also-apply-labels few.nii.gz"
    main(command(files, f"{options} --moving-labels labels.nii.gz --affine rigid {others}"))
    assert "correlation" in capsys.readouterr().out
    out = files / "new" / "out"
    warped = {path.name: nib.load(path).get_data_dtype().kind for path in out.glob("warped_*")}
    kinds = {"far": "f", "empty": "f", "fixed": "f", "labels": "i", "few": "i"}
    assert warped == {f"warped_{name}.nii.gz": kind for name, kind in kinds.items()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["correlation"]["after"] > max(0.95, metrics["correlation"]["before"])
    # The transform, applied to the same files, gives the same results.
    for kind, name, result in (("--image", "moving", "warped"), ("--labels", "labels", "warped_labels")):
        for transform in ("transform.tfm", "displacement.nii.gz"):
            text = f"apply --transform new/out/{transform} {kind} {name}.nii.gz --reference fixed.nii.gz"
            main(command(files, f"{text} --out again.nii.gz"))
            ours, again = (nib.load(path).get_fdata() for path in (out / f"{result}.nii.gz", files / "again.nii.gz"))
            assert np.mean(np.abs(ours - again) > 1e-2) < 0.01
    text = "apply --transform new/out/transform.tfm --image empty.nii.gz --reference empty.nii.gz --out again.nii.gz"
    main(command(files, text))
    assert not nib.load(files / "again.nii.gz").get_fdata().any()
    main(command(files, "inspect new/out/transform.tfm --image fixed.nii.gz"))
    lines = capsys.readouterr().out.splitlines()
    assert "2 transforms" in lines[0] and any("invertible everywhere" in line for line in lines)
    assert any("0 % of the image's voxels lie outside" in line for line in lines)


def test_apply_to_points(files):
    main(command(files, "apply --transform spline.tfm --points points.csv --out mapped.csv"))
    (mapped,) = nifti.load_landmarks(files / "mapped.csv").items()
    assert mapped[0] == 4
    expected = itk.apply(itk_files.read_tfm(files / "spline.tfm"), np.array([[10.0, 11, 12]]))[0]
    np.testing.assert_allclose(mapped[1], expected, atol=1e-5)


def test_inspect_says_how_much_lies_outside_and_what_is_not_proven(files, capsys):
    main(command(files, "inspect spline.tfm --image far.nii.gz"))
    assert "100 % of the image's voxels lie outside its domain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("intent", "edge", "warning"), [(1006, 1, "intent 1006"), (1007, 0, "0 along its whole border")]
)
def test_inspect_warns_of_suspicious_fields(tmp_path, capsys, intent, edge, warning):
    array = np.pad(np.ones((4, 4, 4, 1, 3), np.float32), [(1, 1)] * 3 + [(0, 0)] * 2, constant_values=edge)
    nifti.save(tmp_path / "field.nii.gz", array, np.eye(4), intent=intent)
    main(["inspect", str(tmp_path / "field.nii.gz")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warning in line


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"gridreg {__version__}\n"


def test_an_interrupt_is_one_line_and_leaves_nothing(files, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(deformable, "last_cells", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(command(files, PAIR))
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert not (files / "out").exists()


def test_a_warning_is_one_line(files, capsys):
    main(command(files, "inspect spline.tfm"))
    assert warnings.formatwarning("text", UserWarning, "file.py", 3) == "warning: text\n"


def test_what_is_undefined_is_none():
    found = _course({"before": None, "affine": 0.0, "after": 0.5})
    assert found == "none before, 0.000 after the affine part, 0.500 after all"


PAIR = "register --fixed fixed.nii.gz --moving moving.nii.gz --out out"
CONVERT = "convert spline.tfm --out"
APPLY = "apply --transform spline.tfm --out out.nii.gz"
NO_PLACE = "nowhere.nii.gz: its header has no affine"
MISTAKES = {
    "no command": ("", "required: COMMAND"),
    "no moving image": ("register --fixed fixed.nii.gz --out out", "required: --moving; see gridreg register --help"),
    "an unknown option": (f"{PAIR} --prest fast", "unrecognized arguments: --prest"),
    "a file that is not there": (PAIR.replace("moving.", "none."), "none.nii.gz: no such file"),
    "two volumes in a file": (PAIR.replace("moving.", "four."), "four.nii.gz: one three-dimensional volume is needed"),
    "a transform for an image": (PAIR.replace("moving.nii.gz", "bad.tfm"), "bad.tfm: cannot be read as NIfTI"),
    "a folder below a file": (PAIR.replace("--out out", "--out a_file/out"), "a_file/out: cannot be written"),
    "no overlap": (PAIR.replace("moving.", "far.") + " --affine off", "do not overlap: only 0 %"),
    "labels elsewhere": (f"{PAIR} --moving-labels other_labels.nii.gz", "other_labels.nii.gz: its shape"),
    "labels of one side": (f"{PAIR} --fixed-labels labels.nii.gz", "--fixed-labels .* need --moving-labels"),
    "an unknown preset": (f"{PAIR} --preset fats", "'fats' is not known; known are fast, .*did you mean 'fast'"),
    "an unknown similarity": (f"{PAIR} --similarity mi", "similarity: 'mi' is not known"),
    "a similarity for training": (f"{PAIR} --similarity ssim", "similarity: 'ssim' is not known; .* lncc, ncc,"),
    "a grid in words": (f"{PAIR} --grid ten", "--grid=ten: give points an axis"),
    "cells of no length": (f"{PAIR} --grid nanmm", "cells of nan mm: give a length from"),
    "cells without end": (f"{PAIR} --grid infmm", "cells of inf mm: give a length from"),
    "too small a grid": (f"{PAIR} --grid 3", "a control grid has from 4 to"),
    "an affine that is not there": (f"{PAIR} --affine none.mat", "none.mat': give auto, rigid, off,"),
    "more than an affine": (f"{PAIR} --affine spline.tfm", "spline.tfm: holds more than an affine"),
    "an affine that is missing": (PAIR.replace("moving.", "nowhere."), NO_PLACE),
    "another image of no place": (f"{PAIR} --also-apply nowhere.nii.gz", NO_PLACE),
    "other labels of no place": (f"{PAIR} --also-apply-labels nowhere.nii.gz", NO_PLACE),
    "two volumes of one name": (
        f"{PAIR} --moving-labels labels.nii.gz --also-apply labels.nii.gz --preset fats",  # told before that mistake
        "labels.nii.gz would both be written as warped_labels.nii.gz",
    ),
    "axes that are slanted": (PAIR.replace("fixed.", "slanted."), "slanted.nii.gz: its axes are 5.7 degrees off right"),
    "a single slice": (PAIR.replace("moving.", "slice."), "slice.nii.gz: registration needs at least 2 voxels an axis"),
    "an affine that is singular": (PAIR.replace("moving.", "flat."), "flat.nii.gz: the affine .* cannot be inverted"),
    "an empty image": (PAIR.replace("fixed.", "empty."), "empty.nii.gz: every voxel is 0"),
    "an empty mask": (f"{PAIR} --mask empty.nii.gz", "empty.nii.gz: the mask leaves 0 voxels"),
    "a mask of next to nothing": (f"{PAIR} --mask few.nii.gz", "few.nii.gz: the mask leaves 80 voxels, and at least"),
    "a mask elsewhere": (f"{PAIR} --mask other_labels.nii.gz", "other_labels.nii.gz: its shape"),
    "points elsewhere": (f"{PAIR} --moving-points far_points.csv", "far_points.csv: none of its points lies in"),
    "points of other ids": (
        f"{PAIR} --moving-points points.csv --fixed-points other_points.csv",
        "other_points.csv and .*points.csv have no id in common",
    ),
    "no run": (f"{PAIR} --model nowhere", "nowhere: holds no run"),
    "an unknown method": (f"{PAIR} --method sift", "method: 'sift' is not known; known are grid, vel"),
    "a model and a method": (f"{PAIR} --method ncf --model run", "a model takes the place of the method"),
    "refinement of nothing": (f"{PAIR} --refine 5", "refine, 5, .* give a model or ncf"),
    "points that are not there": (f"{PAIR} --fixed-points none.csv", "none.csv: cannot be read"),
    "a damaged transform": ("inspect bad.tfm", "bad.tfm: is no text file of ITK transforms"),
    "a field of four axes": ("inspect field4d.nii.gz", "field4d.nii.gz: is a field of shape .*: 4-D"),
    "no reference": ("apply --transform spline.tfm --image moving.nii.gz --out out.nii.gz", "--reference is missing"),
    "an image of no place": (f"{APPLY} --image nowhere.nii.gz --reference fixed.nii.gz", NO_PLACE),
    "labels of no place": (f"{APPLY} --labels nowhere.nii.gz --reference fixed.nii.gz", NO_PLACE),
    "a reference of no place": (f"{APPLY} --image fixed.nii.gz --reference nowhere.nii.gz", NO_PLACE),
    "a slanted reference": (f"{APPLY} --image fixed.nii.gz --reference slanted.nii.gz", "slanted.nii.gz: its axes are"),
    "a result of no known kind": (f"{CONVERT} out.xfm", "out.xfm: a transform ends in .tfm, .txt, .*or .nii.gz"),
    "a displacement on no lattice": (f"{CONVERT} out.nii.gz", "--reference is missing: the image whose lattice"),
    "an inverse on no lattice": (f"{CONVERT} out.tfm --inverse", "--reference is missing: .* in the moving image's sp"),
    "a lattice of no place": (f"{CONVERT} out.nii.gz --reference nowhere.nii.gz", NO_PLACE),
    "a slanted lattice": (f"{CONVERT} out.tfm --inverse --reference slanted.nii.gz", "slanted.nii.gz: its axes are"),
    "more than a file can hold": (f"{CONVERT} out.mat", "out.mat: a .mat file holds one transform, and these 2"),
    "a transform below a file": (f"{CONVERT} a_file/out.tfm", "a_file/out.tfm: cannot be written"),
    "an image in its own place": (
        "apply --transform spline.tfm --image moving.nii.gz --reference fixed.nii.gz --out moving.nii.gz",
        "moving.nii.gz: a result would take its place",
    ),
    "points in their own place": (
        "apply --transform spline.tfm --points points.csv --out points.csv",
        "points.csv: a result would take its place",
    ),
    "a transform in its own place": ("convert spline.tfm --out spline.tfm", "spline.tfm: a result would take its"),
    "nothing to apply to": ("apply --transform spline.tfm --out out.nii.gz", "one of the arguments --image"),
}


def test_a_termination_ends_as_an_exit_that_cleans_up(monkeypatch):
    monkeypatch.setattr(inspection, "inspect", lambda *_: signal.raise_signal(signal.SIGTERM))
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "spline.tfm"])
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert stopped.value.code == 143


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(files, capsys, case):
    text, message = MISTAKES[case]
    with pytest.raises(SystemExit) as stopped:
        main(command(files, text))
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(f"^error: .*{message}", line)
    assert not (files / "out").exists()
