"""A look into a transform: what it is, where it acts, how it stretches space, and what is proven about it."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from gridreg_jax import geometry
from gridreg_jax.data import nifti
from gridreg_jax.data.nifti import Volume
from gridreg_jax.errors import InputError
from gridreg_jax.export import itk, itk_files
from gridreg_jax.transforms.certificate import Certificate, certify, uniform_weights

# Points an axis at which the map is probed.
PROBES = 24


def inspect(path: str | Path, image: str | Path | None = None) -> Iterator[str]:
    """Lines that describe a transform file: of ITK's, or a displacement (NIfTI).

    Args:
      path: `.tfm`, `.txt`, `.mat`, `.h5`, `.nii` or `.nii.gz`.
      image: the fixed image (NIfTI) that the transform is for.

    Raises:
      InputError: there is no such file, it is damaged, of another format, or holds what `itk.understood` refuses.
    """
    fixed = nifti.load_lattice(image) if image else None
    if str(path).endswith((".nii", ".nii.gz")):
        shape, intent = nifti.describe(path)
        if len(shape) == 4 and shape[3] == 3:
            raise InputError(
                f"{path}: is a field of shape {shape}: 4-D, as scripts write it and neither ITK nor ANTs read it; "
                "the shape is to be (X, Y, Z, 1, 3), with intent 1007 for LPS mm"
            )
    transforms = itk_files.read(path)
    count = "1 transform" if len(transforms) == 1 else f"{len(transforms)} transforms, the last is applied first"
    yield f"{path}: {count}; LPS mm, as ITK has it"
    if str(path).endswith((".nii", ".nii.gz")):
        if intent == itk_files.DISPVECT:
            yield "warning: intent 1006 is read as RAS by ITK 5.4 and later, and as LPS by ITK before it"
        if _zero_border(transforms[0]):
            yield "warning: the field is 0 along its whole border: it may have been cut, or its border masked"
    for number, transform in enumerate(transforms, start=1):
        reached = _reached(fixed, transforms[number:])
        yield from _describe(transform, reached)
        if fixed is not None and reached is None and transform.type != itk.AFFINE:
            yield "  where the image lies in it is not told: what is applied before it is no affine map"
    if fixed is not None:
        determinant = _probe(transforms, fixed)
        yield f"Jacobian determinant of the whole map, at {determinant.size} points of the image: {_range(determinant)}"


def _reached(fixed: Volume | None, before: Sequence[itk.ItkTransform]) -> Volume | None:
    """The lattice of the image where affine transforms lead it that are applied before another one."""
    if fixed is None or any(transform.type != itk.AFFINE for transform in before):
        return None
    return dataclasses.replace(fixed, affine=itk.affine_matrix(before) @ fixed.affine)


def _describe(transform: itk.ItkTransform, fixed: Volume | None) -> Iterator[str]:
    kind = transform.stored.split("_")[0]
    if transform.type == itk.AFFINE:
        yield f"{kind}: acts everywhere"
        yield f"  determinant {np.linalg.det(transform.parameters[:9].reshape(3, 3)):.4g}"
        return
    size, origin, spacing = (transform.fixed_parameters[i : i + 3] for i in (0, 3, 6))
    points = "control points" if kind == "BSplineTransform" else "voxels"
    where = ", ".join(f"{value:.2f}" for value in origin + 0.0)
    yield f"{kind}: {_times(size.astype(int))} {points} of {_times(spacing.round(3))} mm, the first at ({where}) LPS"
    if fixed is not None:
        outside = _outside(transform, fixed, margin=1.0 if kind == "BSplineTransform" else -0.5)
        yield f"  {100 * outside:.3g} % of the image's voxels lie outside its domain, where it moves nothing"
    if kind == "BSplineTransform":
        yield from _invertible(transform, fixed)


def _invertible(transform: itk.ItkTransform, fixed: Volume | None) -> Iterator[str]:
    """What is proven of ITK's uniform cubic spline in the cells that an image touches, or in all of them."""
    size = transform.fixed_parameters[:3].astype(int)
    spacing, direction = transform.fixed_parameters[6:9], transform.fixed_parameters[9:].reshape(3, 3)
    # Displacements along the axes of the grid, in cells.
    control_grid = transform.parameters.reshape(*size, 3, order="F") @ np.linalg.inv(direction * spacing).T
    if fixed is not None:
        corners = np.array(list(itertools.product(*[(0, n - 1) for n in fixed.array.shape])))
        index = _index(transform, fixed, [corners[:, axis] for axis in range(3)])
        low = [int(np.clip(np.floor(values.min() + 1e-6), 1, n - 3)) for values, n in zip(index, size, strict=True)]
        high = [int(np.clip(np.ceil(values.max() - 1e-6), 2, n - 2)) for values, n in zip(index, size, strict=True)]
        part = control_grid[tuple(slice(a - 1, b + 2) for a, b in zip(low, high, strict=True))]
        yield f"  inside the image: {_certificate(part)}"
        return
    whole = _certificate(control_grid)
    if not _has_added_ring(control_grid):
        yield f"  in all its cells (--image: in those of the image): {whole}"
        return
    inside = _certificate(control_grid[1:-1, 1:-1, 1:-1])
    yield f"  in all its cells but the outermost (--image: in those of the image): {inside}"
    if ring := np.count_nonzero(((whole.cells == 0) | (whole.cells == np.array(whole.cell_counts) - 1)).any(axis=1)):
        found = f"{'it folds; ' if whole.folds and not inside.folds else ''}not proven in {ring} of them"
        yield f"  outside of the image it was made for, in the cells added around it: {found}"


def _has_added_ring(control_grid: Float[np.ndarray, "gx gy gz 3"]) -> bool:
    """Whether the outermost values are those that `itk.bspline_transform` adds outside of the image, where the spline
    may be as steep as it likes. Zeros tell nothing: other programs leave them at the border of the image."""
    inside = control_grid[1:-1, 1:-1, 1:-1]
    if min(inside.shape[:3]) < 4 or np.count_nonzero(inside) == np.count_nonzero(control_grid):
        return False
    return np.allclose(itk.with_ring(inside), control_grid, rtol=0, atol=1e-9 * np.abs(control_grid).max())


def _certificate(control_grid: Float[np.ndarray, "gx gy gz 3"]) -> Certificate:
    """Of a uniform cubic spline, displacements in cells."""
    cells = tuple(n - 3 for n in control_grid.shape[:3])
    for n in control_grid.shape[:3]:  # from uniform to clamped B-splines; each product moves its axis to the end
        control_grid = np.tensordot(control_grid, np.linalg.inv(uniform_weights(n)), (0, 1))
    # A lattice on which a cell is a voxel.
    return certify(np.moveaxis(control_grid, 0, -1), tuple(n + 1 for n in cells))


def _index(transform: itk.ItkTransform, fixed: Volume, voxels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Continuous index along each axis of a grid of voxels of an image, given along each axis of the image."""
    origin, spacing = transform.fixed_parameters[3:6], transform.fixed_parameters[6:9]
    to_index = np.linalg.inv(transform.fixed_parameters[9:].reshape(3, 3) * spacing)
    linear = to_index @ (itk.FLIP[:, None] * fixed.affine[:3, :3])
    shift = to_index @ (itk.FLIP * fixed.affine[:3, 3] - origin)
    return [sum(map(np.multiply, row, voxels)) + offset for row, offset in zip(linear, shift, strict=True)]


def _outside(transform: itk.ItkTransform, fixed: Volume, *, margin: float) -> float:
    """Share of the voxels of an image that lie outside the domain of a grid, which ends `margin` inside its points."""
    index = _index(transform, fixed, np.ogrid[tuple(slice(n) for n in fixed.array.shape)])
    inside = True
    for values, size in zip(index, transform.fixed_parameters[:3], strict=True):
        inside = inside & (values >= margin - 1e-6) & (values <= size - 1 - margin + 1e-6)
    return float(1 - np.mean(inside))


def _probe(transforms: list[itk.ItkTransform], fixed: Volume) -> Float[np.ndarray, " P"]:
    """Jacobian determinants of a map at points spread over an image, by central differences of a tenth of a voxel."""
    axes = [np.linspace(0, size - 1, min(size, PROBES)) for size in fixed.array.shape]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    columns = []
    for axis in range(3):
        step = 0.1 * np.eye(3)[axis]
        after, before = (
            itk.apply(transforms, geometry.voxel_to_world(points + sign * step, fixed.affine)) for sign in (1, -1)
        )
        columns.append((after - before) / 0.2)
    return np.linalg.det(np.stack(columns, axis=-1)) / np.linalg.det(fixed.affine[:3, :3])


def _zero_border(transform: itk.ItkTransform) -> bool:
    size = transform.fixed_parameters[:3].astype(int)
    values = transform.parameters.reshape(3, *size, order="F").any(axis=0)
    if min(size) < 3 or not values.any():
        return False
    values[1:-1, 1:-1, 1:-1] = False
    return not values.any()


def _range(values: Float[np.ndarray, " P"]) -> str:
    folded = int(np.count_nonzero(values <= 0))
    return f"{values.min():.4g} to {values.max():.4g}" + (f"; it folds at {folded} of them" if folded else "")


def _times(values) -> str:
    return " x ".join(f"{value:g}" for value in values)
