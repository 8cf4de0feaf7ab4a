"""What a registration leaves in its folder: images, transforms, numbers, and a page to look at."""

import base64
import html
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from gridreg_jax import __version__, geometry
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Volume
from gridreg_jax.data.preprocess import normalise, resample
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk
from gridreg_jax.files import replacing
from gridreg_jax.registration.register import Registration
from gridreg_jax.transforms.jacobian import jacobian_determinant

# To which displacements are rounded in files.
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
    command: str = "",
) -> dict:
    """Writes the results into a folder, each file whole or not at all, and `metrics.json` last.

    `warped.nii.gz` on the lattice of the fixed image, as its file has it; `transform.tfm` (affine and spline) and
    `spline.mat` for ITK; `displacement.nii.gz` (the whole map) and `inverse_displacement.nii.gz`; `warped_NAME` for
    other volumes; `NAME_in_moving.csv`, `NAME_in_fixed.csv` for points; `metrics.json` and `report.html`.

    Args:
      registration: what `register` found.
      out: the folder, made when missing.
      fixed_labels, moving_labels: on the lattices of the two images; with both, Dice is measured.
      fixed_points, moving_points: CSV files of landmarks (RAS mm); with both, their distances are measured.
      also_apply: more images in the moving image's space.
      command: for the report.

    Returns:
      The content of `metrics.json`.

    Raises:
      InputError: landmarks without a common id, or a file that cannot be written.
    """
    out, fixed = Path(out), registration.fixed
    make_folder(out)
    metrics = {"version": __version__, "command": command}
    with ThreadPoolExecutor(2) as pool:
        jobs = []

        def write_volume(name: str, array: np.ndarray, like: Volume = fixed) -> None:
            jobs.append(pool.submit(nifti.save, out / name, *nifti.as_stored(array, like)))

        def write_displacement(name: str, array: np.ndarray, like: Volume) -> None:
            # A quarter of the file less, and a third of the time to compress it.
            rounded = np.rint(array * STEPS_PER_MM) / STEPS_PER_MM
            jobs.append(pool.submit(itk.save_displacement, out / name, *nifti.as_stored(rounded, like)))

        write_displacement("displacement.nii.gz", registration.displacement_mm, fixed)
        write_displacement("inverse_displacement.nii.gz", registration.inverse_displacement_mm(), registration.moving)
        warped = registration.warp(registration.moving)
        write_volume("warped.nii.gz", warped)
        for volume in also_apply:
            write_volume(f"warped_{_stem(volume.path)}.nii.gz", registration.warp(volume))
        itk.write_tfm(out / "transform.tfm", registration.transforms)
        itk.write_mat(out / "spline.mat", registration.transforms[1])
        pictures, numbers = _pictures(registration, warped)
        metrics |= numbers
        if moving_labels is not None:
            warped_labels = registration.warp(moving_labels, labels=True)
            write_volume(f"warped_{_stem(moving_labels.path)}.nii.gz", warped_labels)
            if fixed_labels is not None:
                unmoved = resample(moving_labels, fixed.affine, fixed.array.shape, labels=True)
                metrics["dice"] = _overlap(fixed_labels.array, {"before": unmoved, "after": warped_labels})
        if fixed_points or moving_points:
            metrics |= _points(registration, out, fixed_points, moving_points)
        for job in jobs:
            job.result()
    page = _page(registration, metrics, pictures)
    for name, text in (("report.html", page), ("metrics.json", json.dumps(metrics, indent=1) + "\n")):
        with replacing(out / name) as temporary:
            temporary.write_text(text)
    return metrics


def make_folder(out: Path) -> None:
    """Makes the folder of the results; `InputError` where nothing can be written there."""
    try:
        with replacing(out / "metrics.json.test") as temporary:
            temporary.touch()
        (out / "metrics.json.test").unlink()
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")


@jax.jit
def _jacobian(displacement):
    determinant = jacobian_determinant(displacement[None])[0]
    logarithm = jnp.log(jnp.maximum(determinant, 1e-9))
    folded = 100 * jnp.mean(determinant <= 0)
    return determinant, jnp.min(determinant), jnp.max(determinant), folded, jnp.std(logarithm)


def _pictures(registration: Registration, warped: Float[np.ndarray, "X Y Z"]) -> tuple[dict, dict]:
    """Planes to draw, on the working lattice, and numbers about the map and the likeness of the images."""
    fixed, moving, matrix = registration.fixed_working, registration.moving_working, registration.matrix
    shape, affine = fixed.array.shape, fixed.affine
    volumes = {
        "before": resample(moving, affine, shape),
        "affine": resample(moving, matrix @ affine, shape),
        "after": resample(Volume(normalise(warped), registration.fixed.affine, moving.path), affine, shape),
    }
    correlation = {name: float(np.corrcoef(fixed.array.ravel(), v.ravel())[0, 1]) for name, v in volumes.items()}
    determinant, *statistics = _jacobian(registration.displacement)
    lowest, highest, folded, deviation = map(float, statistics)
    certificate, (mean, largest) = registration.certificate, registration.inverse_errors_mm
    numbers = {
        "correlation": {name: value if np.isfinite(value) else None for name, value in correlation.items()},
        "affine": matrix.tolist(),
        "affine_determinant": float(np.linalg.det(matrix[:3, :3])),
        "stages": [
            {
                "grid_size": stage.grid_size,
                "shape": stage.shape,
                "steps": len(stage.similarity),
                "first_similarity": stage.similarity[0],
                "last_similarity": stage.similarity[-1],
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
        "inverse_error_mm": {"mean": mean, "max": largest},
    }
    return volumes | {"fixed": fixed.array, "determinant": np.pad(np.asarray(determinant), 1, mode="edge")}, numbers


def _overlap(fixed_labels: Int32[np.ndarray, "X Y Z"], others: dict[str, np.ndarray]) -> dict:
    """Mean Dice over the labels of both images, and that of each label, for every map in `others`."""
    result = {}
    for name, other in others.items():
        foreground = (fixed_labels != 0) | (other != 0)
        both = np.stack([fixed_labels[foreground], other[foreground]])
        ids, index = np.unique(both, return_inverse=True)
        first, second = index.reshape(both.shape)
        sizes = [np.bincount(part, minlength=len(ids)) for part in (first, second)]
        common = np.bincount(first[first == second], minlength=len(ids))
        dice = {int(i): 2 * int(c) / int(a + b) for i, a, b, c in zip(ids, *sizes, common, strict=True) if i != 0}
        result[name] = {"mean": float(np.mean(list(dice.values()))) if dice else None, "labels": dice}
    return result


def _points(registration: Registration, out: Path, fixed_points, moving_points) -> dict:
    fixed = nifti.load_landmarks(fixed_points) if fixed_points else {}
    moving = nifti.load_landmarks(moving_points) if moving_points else {}
    mapped = {}
    for points, path, maps, where in (
        (fixed, fixed_points, registration.map_points, "moving"),
        (moving, moving_points, registration.map_points_back, "fixed"),
    ):
        if points:
            mapped[where] = dict(zip(points, maps(np.array(list(points.values()))), strict=True))
            write_points(out / f"{Path(path).stem}_in_{where}.csv", mapped[where])
    if not (fixed and moving):
        return {}
    common = sorted(fixed.keys() & moving.keys())
    if not common:
        raise InputError(f"{fixed_points} and {moving_points} have no id in common")
    before = [float(np.linalg.norm(fixed[i] - moving[i])) for i in common]
    after = [float(np.linalg.norm(mapped["moving"][i] - moving[i])) for i in common]
    return {"tre_mm": {"points": len(common), "before": float(np.mean(before)), "after": float(np.mean(after))}}


def write_points(path: Path, points: dict[int, Float[np.ndarray, "3"]]) -> None:
    """Writes landmarks as CSV with the columns id, x, y, z (RAS mm), whole or not at all."""
    lines = [f"{number},{x:.6f},{y:.6f},{z:.6f}" for number, (x, y, z) in points.items()]
    try:
        with replacing(path) as temporary:
            temporary.write_text("\n".join(["id,x,y,z", *lines]) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


# Name of a plane, the axis across it, and the axes shown to the right and upwards.
_PLANES = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))


def _page(registration: Registration, metrics: dict, pictures: dict) -> str:
    # Imported here: what does not draw need not wait for it.
    from matplotlib import colormaps

    spacing = geometry.spacing(registration.fixed_working.affine)
    fixed = pictures["fixed"]
    rows = []
    for plane, across, shown in _PLANES:
        size = [spacing[axis] * (fixed.shape[axis] - 1) for axis in shown]
        scale = 230 / max(size)

        def cut(volume, across=across):
            return np.take(volume, volume.shape[across] // 2, axis=across).T[::-1]

        cells = []
        for name in ("before", "affine", "after"):
            # Fixed in red, moving in green and blue: grey where the two agree.
            other = cut(pictures[name])
            cells.append(np.stack([cut(fixed), other, other], axis=-1))
        cells.append(colormaps["PiYG"](np.clip(cut(pictures["determinant"]) / 2, 0, 1))[..., :3])
        images = "".join(f"<td>{_image(_png(cell), *[side * scale for side in size])}</td>" for cell in cells)
        grid = _image(_grid_picture(registration, across, shown), *[side * scale for side in size])
        rows.append(f"<tr><th>{plane}</th>{images}<td>{grid}</td></tr>")
    heads = "".join(
        f"<th>{head}</th>" for head in ("", "by headers", "affine", "result", "Jacobian, 0 to 2", "deformed grid")
    )
    shown = {name: value for name, value in metrics.items() if name not in ("command", "stages", "affine", "dice")}
    shown |= {f"dice {name}": part["mean"] for name, part in metrics.get("dice", {}).items()}
    numbers = "".join(f"<tr><th>{name}</th><td>{html.escape(_text(value))}</td></tr>" for name, value in shown.items())
    title = html.escape(f"{registration.moving.path.name} to {registration.fixed.path.name}")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 2em }} th {{ text-align: left; font-weight: normal; padding-right: 1em }}
pre {{ background: #eee; padding: 0.5em; white-space: pre-wrap }} img {{ image-rendering: auto }}
</style></head><body><h1>{title}</h1>
<pre>{html.escape(metrics["command"])}</pre>
<p>Fixed image in red, moving image in cyan: grey where they agree.</p>
<table><tr>{heads}</tr>{"".join(rows)}</table>
<h2>Similarity by step (lower is more alike)</h2>{_image(_curve_picture(registration), 600.0, 240.0)}
<h2>Numbers</h2><table>{numbers}</table></body></html>
"""


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _image(png: bytes, width: float, height: float) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" width="{width:.0f}" height="{height:.0f}" alt="">'


def _png(rgb: Float[np.ndarray, "h w 3"]) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, np.clip(rgb, 0, 1), format="png")
    return buffer.getvalue()


def _grid_picture(registration: Registration, across: int, shown: tuple[int, int]) -> bytes:
    """Every few rows and columns of the middle plane of the fixed lattice, where u takes them."""
    from matplotlib.figure import Figure

    displacement = registration.displacement
    plane = np.take(displacement, displacement.shape[across] // 2, axis=across)[..., list(shown)]
    spacing = geometry.spacing(registration.fixed.affine)[list(shown)]
    points = (np.stack(np.indices(plane.shape[:2]), axis=-1) + plane) * spacing
    sides = np.subtract(plane.shape[:2], 1) * spacing
    figure = Figure(figsize=sides / max(sides) * 4)
    axis = figure.add_axes((0, 0, 1, 1))
    for lines in (points, points.swapaxes(0, 1)):
        for line in lines[:: max(1, len(lines) // 30)]:
            axis.plot(*line.T, color="tab:blue", linewidth=0.6)
    axis.set(xlim=(0, sides[0]), ylim=(0, sides[1]))
    axis.axis("off")
    return _figure(figure)


def _curve_picture(registration: Registration) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3), layout="tight")
    axis, start = figure.subplots(), 0
    for stage in registration.stages:
        steps = np.arange(start, start + len(stage.similarity))
        axis.plot(steps, stage.similarity, label="x".join(map(str, stage.grid_size)))
        start = len(steps) + start
    axis.set(xlabel="step", ylabel="1 - similarity")
    axis.legend(title="control grid", fontsize=8)
    return _figure(figure)


def _figure(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
