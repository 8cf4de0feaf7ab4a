"""What a registration achieved, case by case: overlap, distances in mm, regularity. NumPy, one volume at a time.

Label maps are `[X, Y, Z]`, displacements `[X, Y, Z, 3]` in voxels, landmarks `[K, 3]` in voxels. A metric per label
returns a dict `{label: value}`; a value that does not exist is NaN. The functions named `learn2reg_` repeat the
evaluation code of the Learn2Reg challenge (Hering et al., IEEE TMI 2023) quirk by quirk, so that numbers can be held
against its leaderboards.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex

import numpy as np
from jaxtyping import Float, Num, Shaped
from scipy import ndimage

Labels = Num[np.ndarray, "X Y Z"]
Mask = Shaped[np.ndarray, "X Y Z"]
Displacement = Float[np.ndarray, "X Y Z 3"]
Landmarks = Num[np.ndarray, "K 3"]
Ids = Iterable[SupportsIndex]
Spacing = Iterable[SupportsFloat]


def dice(fixed_labels: Labels, warped_labels: Labels, labels: Ids) -> dict[int, float]:
    """Dice overlap `2 |A and B| / (|A| + |B|)` of each label, without unit; NaN for one absent from both maps.

    Source: Dice, Ecology 1945.
    """

    def one(label):
        fixed, warped = fixed_labels == label, warped_labels == label
        total = np.count_nonzero(fixed) + np.count_nonzero(warped)
        return 2 * np.count_nonzero(fixed & warped) / total if total else np.nan

    return {int(label): one(label) for label in labels}


def hd95_mm(fixed_labels: Labels, warped_labels: Labels, labels: Ids, spacing: Spacing) -> dict[int, float]:
    """Robust Hausdorff distance of each label: the larger of the two directed 95th percentiles, in mm.

    A percentile over the surface, not over voxels: every surface element counts with its area. NaN for a label absent
    from both maps, infinite for one absent from one of them.

    Args:
      fixed_labels, warped_labels: on one lattice.
      labels: the ids to score.
      spacing: mm along each axis.

    Source: Nikolov et al., Journal of Medical Internet Research 2021, whose open implementation it equals.
    """
    spacing = np.asarray(spacing, dtype=float)
    return {int(label): _hd95(fixed_labels == label, warped_labels == label, spacing) for label in labels}


def centroid_distance_mm(
    fixed_labels: Labels, warped_labels: Labels, labels: Ids, spacing: Spacing
) -> dict[int, float]:
    """Distance between the centroids of each label, in mm; NaN for one absent from either map.

    Args:
      fixed_labels, warped_labels: on one lattice.
      labels: the ids to score.
      spacing: mm along each axis.

    Source: Yan et al., Medical Physics 2026, §4.4 (CD).
    """

    def one(label):
        fixed, warped = np.argwhere(fixed_labels == label), np.argwhere(warped_labels == label)
        if not len(fixed) or not len(warped):
            return np.nan
        return float(np.linalg.norm((fixed.mean(axis=0) - warped.mean(axis=0)) * spacing))

    spacing = np.asarray(spacing, dtype=float)
    return {int(label): one(label) for label in labels}


def tre_mm(
    fixed_landmarks: Landmarks,
    moving_landmarks: Landmarks,
    displacement: Displacement | None,
    spacing: Spacing,
) -> Float[np.ndarray, " K"]:
    """Target registration error of each landmark: how far the map takes it from its partner, in mm.

    Args:
      fixed_landmarks: voxels of the fixed lattice, where the displacement is sampled (trilinear, border padding).
      moving_landmarks: voxels of the moving lattice, in the same order.
      displacement: on the fixed lattice; None for the error before registration.
      spacing: mm along each axis of the moving lattice, on which the error is measured.

    Source: Fitzpatrick & West, IEEE TMI 2001.
    """
    return _landmark_errors(fixed_landmarks, moving_landmarks, displacement, spacing, order=1, mode="nearest")


def folding_percent(displacement: Displacement, mask: Mask | None = None) -> float:
    """Percent of interior voxels where the Jacobian determinant of the map is not positive (central differences).

    NaN if no voxel is counted.

    Args:
      displacement: voxels.
      mask: count inside it only (non-zero is inside).

    Source: Yan et al., Medical Physics 2026, §4.4 (which asks for below 0).
    """
    return _percent(_inside(_jacobian_determinant(displacement), mask) <= 0)


def sd_log_jacobian(displacement: Displacement, mask: Mask | None = None) -> float:
    """Standard deviation of the logarithm of the Jacobian determinant over interior voxels (central differences).

    Folded voxels have no logarithm and are left out (`folding_percent` counts them); NaN if nothing else is left.

    Args:
      displacement: voxels.
      mask: evaluate inside it only (non-zero is inside).

    Source: Leow et al., IEEE TMI 2007.
    """
    determinant = _inside(_jacobian_determinant(displacement), mask)
    determinant = determinant[determinant > 0]
    return float(np.log(determinant).std()) if determinant.size else np.nan


def ndv_percent(displacement: Displacement, mask: Mask | None = None) -> float:
    """Non-diffeomorphic volume: what the map, made piecewise linear on tetrahedra, turns inside out, in percent.

    The cubes between voxel centres can be cut into five tetrahedra in two ways. The volume of all those with a negative
    image, half of it for each way, is divided by the number of voxels counted: the interior ones (one voxel off every
    face) inside the mask; NaN if there are none. Central differences can miss a fold that this sees. They see none that
    this misses, but count what is made flat (u = -x), which this does not: nothing of it is inside out.

    Args:
      displacement: voxels.
      mask: count inside it only (non-zero is inside).

    Source: Liu et al., On finite difference Jacobian computation in deformable image registration, IJCV 2024.
    """
    position = _positions(displacement)

    def at(offset):
        window = [slice(1 + o, size - 1 + o) for o, size in zip(offset, position.shape[1:], strict=True)]
        return position[(slice(None), *window)]

    # Each tetrahedron by the offsets of three vertices from the fourth, in the order of a positive volume. At a corner
    # of a cube they are its three edges; the one in the middle of a cube is spanned by three face diagonals.
    tetrahedra = [np.diag(signs)[:: np.prod(signs)] for signs in itertools.product((-1, 1), repeat=3)]
    tetrahedra += [np.array([[-1, -1, 0], [-1, 0, -1], [0, -1, -1]]), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])]
    turned = 0.0
    for vertices in tetrahedra:
        a, b, c = (at(vertex) - at((0, 0, 0)) for vertex in vertices)
        turned = turned - np.minimum(_determinant(a, b, c), 0) / 6 / 2
    return _percent(_inside(turned, mask))


def learn2reg_dice(
    fixed_labels: Labels, moving_labels: Labels, displacement: Displacement, labels: Ids
) -> dict[int, float]:
    """`dice` as Learn2Reg scores it: nearest-neighbour warp with 0 outside; NaN if absent from fixed or *moving*.

    Args:
      fixed_labels, moving_labels: on one lattice; the latter as it was, not warped.
      displacement: voxels.
      labels: the ids to score.
    """
    warped = _learn2reg_warp(moving_labels, displacement)
    found = dice(fixed_labels, warped, labels)
    return {label: found[label] if _in_both(fixed_labels, moving_labels, label) else np.nan for label in found}


def learn2reg_hd95_voxels(
    fixed_labels: Labels, moving_labels: Labels, displacement: Displacement, labels: Ids
) -> dict[int, float]:
    """`hd95_mm` as Learn2Reg scores it: in voxels whatever the spacing; all else as in `learn2reg_dice`."""
    warped = _learn2reg_warp(moving_labels, displacement)
    found = hd95_mm(fixed_labels, warped, labels, (1, 1, 1))
    return {label: found[label] if _in_both(fixed_labels, moving_labels, label) else np.nan for label in found}


def learn2reg_tre_mm(
    fixed_landmarks: Landmarks, moving_landmarks: Landmarks, displacement: Displacement, spacing: Spacing
) -> Float[np.ndarray, " K"]:
    """`tre_mm` as Learn2Reg scores it: the displacement is sampled by cubic B-splines, and is 0 outside the lattice.

    In mm; arguments as there. A landmark that is outside by 1e-4 voxels at most, as after a conversion from mm, is
    taken to the border.
    """
    on_border = np.clip(fixed_landmarks, 0, np.subtract(np.shape(displacement)[:3], 1))
    fixed_landmarks = np.where(np.abs(fixed_landmarks - on_border) <= 1e-4, on_border, fixed_landmarks)
    return _landmark_errors(fixed_landmarks, moving_landmarks, displacement, spacing, order=3, mode="constant")


def learn2reg_sd_log_jacobian(displacement: Displacement, mask: Mask | None = None) -> float:
    """SDlogJ as Learn2Reg scores it: 3 is added to the determinant before the logarithm, two voxels off every face.

    Much smaller than `sd_log_jacobian`, and blind to most folding: determinants above -3 have a logarithm. Arguments as
    there; NaN if no voxel is counted.
    """
    determinant = _inside(_jacobian_determinant(displacement, rim=2), mask, rim=2)
    return float(np.log(np.clip(determinant + 3, 1e-9, 1e9)).std()) if determinant.size else np.nan


def lumir_tre_voxels(
    fixed_landmarks: Labels, moving_landmarks: Labels, displacement: Displacement, labels: Ids
) -> dict[int, float]:
    """Target registration error as Learn2Reg's LUMIR task scores it: between the centroids of landmarks drawn as blobs.

    They are warped like labels (see `learn2reg_dice`). NaN for one that is absent or has vanished.

    Args:
      fixed_landmarks, moving_landmarks: a small blob an id, on one lattice.
      displacement: voxels.
      labels: the ids to score.
    """
    return centroid_distance_mm(fixed_landmarks, _learn2reg_warp(moving_landmarks, displacement), labels, (1, 1, 1))


def _in_both(fixed_labels, moving_labels, label) -> bool:
    return bool(np.any(fixed_labels == label) and np.any(moving_labels == label))


def _learn2reg_warp(moving_labels: Labels, displacement: Displacement) -> Labels:
    return ndimage.map_coordinates(moving_labels, _positions(displacement), order=0)


def _landmark_errors(fixed_landmarks, moving_landmarks, displacement, spacing, **sampling) -> Float[np.ndarray, " K"]:
    reached = np.asarray(fixed_landmarks, dtype=float)
    if displacement is not None:
        components = np.moveaxis(np.asarray(displacement, dtype=float), -1, 0)
        sampled = [ndimage.map_coordinates(component, reached.T, **sampling) for component in components]
        reached = reached + np.stack(sampled, axis=-1)
    return np.linalg.norm((reached - moving_landmarks) * np.asarray(spacing, dtype=float), axis=-1)


def _positions(displacement: Displacement) -> Float[np.ndarray, "3 X Y Z"]:
    """Where the map takes each voxel: coordinate first, double precision."""
    return np.indices(displacement.shape[:3]) + np.moveaxis(np.asarray(displacement, dtype=float), -1, 0)


def _determinant(a, b, c) -> Float[np.ndarray, "X Y Z"]:
    """Determinant of the 3x3 matrix with rows a, b, c, at every voxel."""
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


def _jacobian_determinant(displacement: Displacement, rim: int = 1) -> Float[np.ndarray, "x y z"]:
    """Of the map, by central differences, `rim` voxels off every face."""
    position = _positions(displacement)

    def derivative(axis):
        after, before = ([slice(rim, -rim)] * 3 for _ in range(2))
        size = position.shape[axis + 1]
        after[axis], before[axis] = slice(rim + 1, size - rim + 1), slice(rim - 1, size - rim - 1)
        return (position[(slice(None), *after)] - position[(slice(None), *before)]) / 2

    return _determinant(*(derivative(axis) for axis in range(3)))


def _percent(counted: np.ndarray) -> float:
    return 100 * float(np.mean(counted)) if counted.size else np.nan


def _inside(values: Float[np.ndarray, "x y z"], mask: Mask | None, rim: int = 1) -> Float[np.ndarray, " V"]:
    """The values, given `rim` voxels off every face of the lattice, at the voxels of the mask."""
    if mask is None or not values.size:
        return values.ravel()
    return values[mask[rim:-rim, rim:-rim, rim:-rim] != 0]


def _hd95(fixed: np.ndarray, warped: np.ndarray, spacing: np.ndarray) -> float:
    """Of two masks: the larger of the two directed, area-weighted 95th percentiles of the surface distance."""
    if not fixed.any() or not warped.any():
        return np.inf if fixed.any() or warped.any() else np.nan
    from scipy import spatial  # heavy, and few need it

    box = ndimage.find_objects((fixed | warped).astype(np.uint8))[0]
    area_of = np.linalg.norm(_surfels() * (np.prod(spacing) / spacing), axis=-1).sum(axis=-1)
    codes = [_cell_codes(mask[box]) for mask in (fixed, warped)]
    cells = [np.nonzero((code > 0) & (code < 255)) for code in codes]
    points = [np.stack(indices, axis=-1) * spacing for indices in cells]

    def directed(source, target):
        distances, _ = spatial.cKDTree(points[target]).query(points[source])
        areas = area_of[codes[source][cells[source]]]
        order = np.lexsort((areas, distances))
        covered = np.cumsum(areas[order]) / areas.sum()
        return float(distances[order][min(np.searchsorted(covered, 0.95), order.size - 1)])

    return max(directed(0, 1), directed(1, 0))


def _cell_codes(mask: np.ndarray) -> np.ndarray:
    """For every cell of 2x2x2 voxels that touches the volume, which of the eight are in the mask, as bits of a number.

    Bit `4 i + 2 j + k` stands for the voxel at offset (i, j, k) of the cell.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    code = np.zeros([size - 1 for size in padded.shape], dtype=np.uint8)
    for bit, offset in enumerate(itertools.product((0, 1), repeat=3)):
        code |= padded[tuple(slice(o, o + size) for o, size in zip(offset, code.shape, strict=True))] << bit
    return code


# The surface inside a cell by marching cubes, between the midpoints of its edges: up to four triangles, each by its
# area vector, without signs, in eighths of a face. One case of each kind; the others follow by symmetry.
_SURFEL_CASES = {
    1: [(1, 1, 1)],
    3: [(2, 2, 0), (2, 2, 0)],
    6: [(1, 1, 1), (1, 1, 1)],
    7: [(1, 1, 1), (2, 2, 2), (4, 0, 0)],
    15: [(4, 0, 0), (4, 0, 0)],
    22: [(1, 1, 1), (1, 1, 1), (1, 1, 1)],
    23: [(1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)],
    24: [(1, 1, 1), (1, 1, 1)],
    25: [(0, 2, 2), (0, 2, 2), (1, 1, 1)],
    27: [(0, 2, 2), (1, 1, 1), (2, 0, 2), (3, 3, 3)],
    30: [(1, 1, 1), (1, 1, 1), (2, 2, 2), (4, 0, 0)],
    60: [(2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)],
    105: [(1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)],
}


@functools.cache
def _surfels() -> Float[np.ndarray, "256 4 3"]:
    """Area vectors of the triangles in a cell of unit spacing, for each of its codes (see `_cell_codes`)."""
    vectors = np.zeros((256, 4, 3))
    for case, triangles in _SURFEL_CASES.items():
        cell = np.array([case >> bit & 1 for bit in range(8)]).reshape(2, 2, 2)
        for axes in itertools.permutations(range(3)):
            for steps in itertools.product((1, -1), repeat=3):
                turned = cell.transpose(axes)[:: steps[0], :: steps[1], :: steps[2]].ravel()
                code = int(turned @ (1 << np.arange(8)))
                for same_surface in (code, 255 - code):
                    vectors[same_surface, : len(triangles)] = np.array(triangles)[:, axes] / 8
    return vectors
