"""What a registration leaves in its folder: images, transforms, numbers, and a page to look at."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32

from gridreg_jax import __version__, geometry
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import resample
from gridreg_jax.errors import InputError, check_apart
from gridreg_jax.export import itk_files
from gridreg_jax.export.inverse import TOLERANCE_MM
from gridreg_jax.programs import stored
from gridreg_jax.registration.register import Registration, pull
from gridreg_jax.registration.report import page
from gridreg_jax.transforms.jacobian import jacobian_determinant

# What `save` may write, but for what is named after its inputs.
FILES = (
    *(f"{name}.nii.gz" for name in "warped displacement inverse_displacement learn2reg_displacement sigma".split()),
    *("transform.tfm", "spline.mat", "metrics.json", "report.html"),
)
# To which displacements are rounded in files: a third of the time to compress them, a quarter less to store.
STEPS_PER_MM = np.float32(4096)


def save(
    registration: Registration,
    out: str | Path,
    *,
    fixed_labels: Volume | None = None,
    moving_labels: Volume | None = None,
    fixed_points: str | Path | None = None,
    moving_points: str | Path | None = None,
    also_apply: Sequence[Volume] = (),
    learn2reg: bool = False,
    command: str = "",
) -> dict:
    """Writes the results into a folder: all files, or none.

    `warped.nii.gz` on the lattice of the fixed image, as its file has it; `transform.tfm` (affine and spline) and
    `spline.mat` for ITK; `displacement.nii.gz` (the whole map) and `inverse_displacement.nii.gz`; `warped_NAME` for
    other volumes; `NAME_in_moving.csv`, `NAME_in_fixed.csv` for points; after a Bayesian network `sigma.nii.gz`;
    `metrics.json` and `report.html`.

    Args:
      registration: what `register` found.
      out: the folder, made when missing.
      fixed_labels, moving_labels: on the lattices of the two images; with both, Dice is measured.
      fixed_points, moving_points: CSV files of landmarks (RAS mm); with both, their distances are measured.
      also_apply: more images, and labels (int32), in the moving image's space.
      learn2reg: also write `learn2reg_displacement.nii.gz` (see `Registration.learn2reg_displacement`).
      command: for the report.

    Returns:
      The content of `metrics.json`, with None for what is undefined.

    Raises:
      InputError: landmarks outside the image or without a common id, two volumes of one name, or a file that cannot be
        written.
    """
    fixed, moving = registration.fixed, registration.moving
    points = load_points(fixed, moving, fixed_points, moving_points)
    others = [volume for volume in (moving_labels, *also_apply) if volume is not None]
    names = warped_names(others)
    metrics = {"version": __version__, "command": command}
    with filling(Path(out)) as folder, ThreadPoolExecutor(3) as pool:
        jobs = []

        def write(name: str, array: np.ndarray) -> None:
            jobs.append(pool.submit(nifti.save, folder / name, *nifti.as_stored(array, fixed)))

        def write_displacement(name: str, like: Volume) -> None:
            rounded = np.rint(getattr(registration, f"{name}_mm") * STEPS_PER_MM) / STEPS_PER_MM
            itk_files.save_displacement(folder / f"{name}.nii.gz", *nifti.as_stored(rounded, like))

        warped = registration.on_fixed(moving)
        # What several threads read is computed before they start.
        _ = registration.working_displacement
        if learn2reg:
            field = registration.learn2reg_displacement
            jobs.append(pool.submit(nifti.save, folder / "learn2reg_displacement.nii.gz", field, np.eye(4)))
        jobs.append(pool.submit(write_displacement, "inverse_displacement", moving))
        jobs.append(pool.submit(write_displacement, "displacement", fixed))
        write("warped.nii.gz", warped)
        for name, volume in zip(names, others, strict=True):
            warped = registration.on_fixed(volume, labels=volume.array.dtype.kind == "i")
            write(name, warped)
            if volume is moving_labels and fixed_labels is not None:
                metrics["dice"] = _overlaps(registration, fixed_labels.array, moving_labels, warped)
        if registration.sigma_mm is not None:
            sigma_mm = dataclasses.replace(registration.fixed_working, array=registration.sigma_mm)
            write("sigma.nii.gz", resample(sigma_mm, fixed.affine, fixed.array.shape))
        metrics |= _map_points(registration, folder, *points, fixed_points, moving_points)
        itk_files.write_tfm(folder / "transform.tfm", registration.transforms)
        itk_files.write_mat(folder / "spline.mat", registration.transforms[1])
        volumes, numbers = _compare(registration)
        metrics |= numbers
        for job in jobs:
            job.result()
        mean, largest = registration.inverse_errors_mm
        metrics["inverse_error_mm"] = {"mean": mean, "max": largest}
        metrics = _defined(metrics)
        text = page(registration, metrics, volumes)
        # Names of files may hold bytes that are no text.
        (folder / "report.html").write_bytes(text.encode(errors="replace"))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


@contextlib.contextmanager
def filling(out: Path) -> Iterator[Path]:
    """A folder to write to, whose files go to `out` at the end, `metrics.json` last.

    On an error none of them does, and what was made on the way to `out` is removed again.

    Raises:
      InputError: it cannot be written to.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    temporary = out / f".{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        paths = sorted(temporary.iterdir(), key=lambda path: path.name == "metrics.json")
        for path in paths:
            if (out / path.name).is_dir():
                raise InputError(f"{out / path.name}: a folder is in the place of a result")
        for path in paths:
            os.replace(path, out / path.name)
    except InputError as error:  # which may name a file that is gone now
        raise InputError(str(error).replace(str(temporary), str(out))) from error
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # where it is not empty
                folder.rmdir()


def warped_names(volumes: Sequence[Volume]) -> list[str]:
    """Names of the files that volumes are written to when they are warped, `warped_NAME.nii.gz`.

    Raises:
      InputError: two of them have one name.
    """
    paths = {}
    for volume in volumes:
        name = f"warped_{_stem(volume.path)}.nii.gz"
        if name in paths:
            raise InputError(f"{paths[name]} and {volume.path} would both be written as {name}: rename one of them")
        paths[name] = volume.path
    return list(paths)


def check_inputs(
    out: str | Path,
    inputs: Sequence[str | Path],
    warped: Sequence[Volume],
    fixed_points: str | Path | None,
    moving_points: str | Path | None,
) -> None:
    """Raise `InputError` if one of the input files is one that `save` would write for these volumes and points."""
    names = [*FILES, *warped_names(warped)]
    names += [_mapped_name(path, where) for path, where in ((fixed_points, "moving"), (moving_points, "fixed")) if path]
    check_apart((Path(out) / name for name in names), inputs, f"another folder than {out}")


Points = dict[int, Float[np.ndarray, "3"]]


def load_points(fixed: Volume, moving: Volume, fixed_path, moving_path) -> tuple[Points, Points]:
    """Landmarks (RAS mm) of two images by their id; none where there is no path.

    Raises:
      InputError: as for `nifti.load_landmarks`; none of a file's points lies in its image; the files have no common id.
    """
    result = []
    for path, volume in ((fixed_path, fixed), (moving_path, moving)):
        points = nifti.load_landmarks(path) if path else {}
        voxels = geometry.world_to_voxel(np.array(list(points.values())).reshape(-1, 3), volume.affine)
        inside = ((voxels > -1) & (voxels < volume.array.shape)).all(axis=1)
        if points and not inside.any():
            raise InputError(
                f"{path}: none of its points lies in {volume.path}; x, y, z are RAS mm, neither LPS mm nor voxels"
            )
        result.append(points)
    if all(result) and not result[0].keys() & result[1].keys():
        raise InputError(f"{fixed_path} and {moving_path} have no id in common")
    return tuple(result)


def write_points(path: Path, points: Points) -> None:
    """Writes landmarks as CSV with the columns id, x, y, z (RAS mm), whole or not at all."""
    lines = [f"{number},{x:.6f},{y:.6f},{z:.6f}" for number, (x, y, z) in points.items()]
    nifti.write_whole(path, ("\n".join(["id,x,y,z", *lines]) + "\n").encode())


def _mapped_name(path: str | Path, where: str) -> str:
    return f"{_stem(Path(path))}_in_{where}.csv"


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() == ".csv" else path.name.removesuffix(".gz").removesuffix(".nii")


def _defined(value):
    """The same with None in place of numbers that are not finite: JSON has none."""
    if isinstance(value, dict):
        return {name: _defined(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_defined(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@stored
def _jacobian(displacement):
    determinant = jacobian_determinant(displacement[None])[0]
    folded = determinant <= 0
    # As `metrics.sd_log_jacobian`: what is folded has no logarithm.
    spread = jnp.std(jnp.log(jnp.where(folded, 1.0, determinant)), where=~folded)
    return determinant, jnp.min(determinant), jnp.max(determinant), 100 * jnp.mean(folded), spread


def _compare(registration: Registration) -> tuple[dict, dict]:
    """Volumes to draw, on the working lattice, and numbers about the map and the likeness of the images."""
    fixed, moving, matrix = registration.fixed_working, registration.moving_working, registration.matrix
    u = registration.working_displacement
    to_moving = np.linalg.inv(moving.affine)
    volumes = {
        name: pull(moving, displacement, to_moving @ matrix @ fixed.affine, outside=np.nan, anywhere=True)
        for name, displacement, matrix in (
            ("before", np.zeros_like(u), np.eye(4)),
            ("affine", np.zeros_like(u), matrix),
            ("after", u, matrix),
        )
    }
    correlation = {name: _correlation(fixed.array, volume) for name, volume in volumes.items()}
    volumes = {name: np.nan_to_num(volume, nan=moving.array.min()) for name, volume in volumes.items()}
    determinant, *statistics = _jacobian(registration.displacement)
    lowest, highest, folded, deviation = map(float, statistics)
    certificate = registration.certificate
    sides_mm = np.subtract(fixed.array.shape, 1) * geometry.spacing(fixed.affine)
    numbers = {
        "correlation": correlation,
        "affine": matrix.tolist(),
        "affine_determinant": float(np.linalg.det(matrix[:3, :3])),
        "stages": [
            {
                "grid_size": stage.grid_size,
                "cell_mm": (sides_mm / np.subtract(stage.grid_size, 3)).tolist(),
                "shape": stage.shape,
                "steps": len(stage.similarity),
                "similarity": stage.similarity,
            }
            for stage in registration.stages
        ],
        "folding_percent": folded,
        "jacobian_determinant": {"min": lowest, "max": highest},
        "sd_log_jacobian": deviation,
        "certificate": {
            "invertible": certificate.invertible,
            "one_to_one": certificate.one_to_one,
            "lower_bound": certificate.lower_bound,
            "text": str(certificate),
        },
        "seconds": registration.seconds,
    }
    if registration.flow_error_mm is not None:
        numbers["flow_error_mm"] = registration.flow_error_mm
    volumes |= {"fixed": fixed.array, "determinant": np.pad(np.asarray(determinant), 1, mode="edge")}
    if registration.sigma_mm is not None:
        volumes["sigma_mm"] = registration.sigma_mm
    return volumes, numbers


def _correlation(fixed: Float32[np.ndarray, "X Y Z"], warped: Float32[np.ndarray, "X Y Z"]) -> float | None:
    """Pearson's, over the voxels where the warped image is known (not NaN); None where it is undefined."""
    known = ~np.isnan(warped)
    values = fixed[known], warped[known]
    if not known.any() or min(map(np.ptp, values)) == 0:
        return None
    return float(np.corrcoef(*values)[0, 1])


def _overlaps(
    registration: Registration, fixed: Int32[np.ndarray, "X Y Z"], moving: Volume, warped: Int32[np.ndarray, "X Y Z"]
) -> dict:
    """Dice of the labels that both images hold, and the mean over them: by the headers, by the affine part and by all.

    One that the map takes out of the fixed image counts 0.
    """
    straight = (
        pull(
            moving,
            np.zeros((*fixed.shape, 3), np.float32),
            np.linalg.inv(moving.affine) @ matrix @ registration.fixed.affine,
            labels=True,
            anywhere=True,
        )
        for matrix in (np.eye(4), registration.matrix)
    )
    of_both = [np.unique(labels) for labels in (fixed, moving.array)]
    ids, shared = np.unique(np.concatenate(of_both)), np.setdiff1d(np.intersect1d(*of_both), 0)

    def count(labels):
        return np.bincount(np.searchsorted(ids, labels[labels != 0]), minlength=len(ids))

    result, size = {}, count(fixed)
    for name, labels in zip(("before", "affine", "after"), (*straight, warped), strict=True):
        counts = zip(ids, size + count(labels), count(fixed[fixed == labels]), strict=True)
        dice = {int(i): float(2 * common / both) for i, both, common in counts if i in shared}
        result[name] = {"mean": float(np.mean(list(dice.values()))) if dice else None, "labels": dice}
    return result


def _way_back(registration: Registration, path: str | Path, points_mm: Float[np.ndarray, "P 3"]):
    """`Registration.map_points_back`, and a warning where it does not lead back, as at the border of the image."""
    found = registration.map_points_back(points_mm)
    missed_mm = np.linalg.norm(registration.map_points(found) - points_mm, axis=1)
    if missed := np.count_nonzero(missed_mm > TOLERANCE_MM):
        warnings.warn(
            f"{path}: to {missed} of its {len(points_mm)} points the map takes none to within {TOLERANCE_MM} mm; what "
            f"is written for them is up to {missed_mm.max():.2g} mm off",
            stacklevel=2,
        )
    return found


def _map_points(
    registration: Registration, folder: Path, fixed: Points, moving: Points, fixed_path, moving_path
) -> dict:
    """Writes the points where the map takes them, and measures how far apart those of one id are."""
    mapped = {}
    for points, path, maps, where in (
        (fixed, fixed_path, registration.map_points, "moving"),
        (moving, moving_path, functools.partial(_way_back, registration, moving_path), "fixed"),
    ):
        if points:
            mapped[where] = dict(zip(points, maps(np.array(list(points.values()))), strict=True))
            write_points(folder / _mapped_name(path, where), mapped[where])
    if not (fixed and moving):
        return {}
    common = sorted(fixed.keys() & moving.keys())
    start, true, end = (np.array([points[i] for i in common]) for points in (fixed, moving, mapped["moving"]))
    ends = {"before": start, "affine": geometry.voxel_to_world(start, registration.matrix), "after": end}
    distances = {name: float(np.linalg.norm(found - true, axis=1).mean()) for name, found in ends.items()}
    return {"tre_mm": {"points": len(common)} | distances}
