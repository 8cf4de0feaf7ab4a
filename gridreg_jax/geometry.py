"""Affines: between voxel coordinates and world coordinates (RAS mm, as nibabel gives them)."""

import numpy as np
from jaxtyping import Float, Num


def voxel_to_world(points: Num[np.ndarray, "*P 3"], affine: Num[np.ndarray, "4 4"]) -> Float[np.ndarray, "*P 3"]:
    """World coordinates (mm, RAS) of points in voxels.

    Source: the NIfTI-1 format (its affine from voxel indices to coordinates).

    Args:
      points: voxel coordinates along the array's axes; whole numbers are voxel centres.
      affine: voxel -> RAS mm.
    """
    return points @ affine[:3, :3].T + affine[:3, 3]


def world_to_voxel(points_mm: Num[np.ndarray, "*P 3"], affine: Num[np.ndarray, "4 4"]) -> Float[np.ndarray, "*P 3"]:
    """Voxel coordinates of points in world coordinates (mm, RAS): the inverse of `voxel_to_world`.

    Source: the NIfTI-1 format.
    """
    return (points_mm - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T


def spacing(affine: Num[np.ndarray, "4 4"]) -> Float[np.ndarray, "3"]:
    """Distance (mm) between neighbouring voxel centres along each array axis.

    Source: the NIfTI-1 format; the lengths of the affine's columns.
    """
    return np.linalg.norm(affine[:3, :3], axis=0)
