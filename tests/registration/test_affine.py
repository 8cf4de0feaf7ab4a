from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.data.nifti import Volume, corner_to_corner
from gridreg_jax.errors import InputError
from gridreg_jax.registration.affine import _matrix, align, check_overlap

SHAPES = (40, 44, 34), (36, 34, 40)


def distance_mm(found, true, size_mm):
    """Largest distance between where two maps take the corners of the body."""
    corners = size_mm * 0.3 * (np.indices((2, 2, 2)).reshape(3, -1).T * 2 - 1)
    difference = geometry.voxel_to_world(corners, found) - geometry.voxel_to_world(corners, true)
    return np.linalg.norm(difference, axis=1).max()


def pair(phantom, lattice, turn, true, size_mm=100.0, scale=(1.0, 1.0, 1.0)):
    """Volumes for which `true` is the answer, on lattices of their own, the moving one oblique and mirrored."""
    body, step = phantom(size_mm=size_mm), size_mm / 36
    fixed = body.volume(
        SHAPES[0], lattice(SHAPES[0], [step] * 3, np.eye(3)), lambda x: geometry.voxel_to_world(x, true)
    )
    axes = turn(10, 0) @ np.diag([-1.0, 1.0, 1.0])
    moving = body.volume(SHAPES[1], lattice(SHAPES[1], [step, 1.2 * step, step], axes))
    return fixed, moving


@pytest.mark.parametrize("size_mm", [25.0, 100.0])
def test_a_known_affine_is_found_from_far_away_at_any_size(phantom, lattice, turn, size_mm):
    linear = turn(30, 2) @ turn(8, 0) @ np.array([[1.1, 0.05, 0], [0, 0.95, 0.04], [0, 0, 1.05]])
    true = nib.affines.from_matvec(linear, np.array([0.1, -0.08, 0.05]) * size_mm)
    fixed, moving = pair(phantom, lattice, turn, true, size_mm)
    # The file of the moving image has its origin elsewhere: a shift of 40 % of the body.
    shift = nib.affines.from_matvec(np.eye(3), [0.4 * size_mm, 0, 0])
    moving = type(moving)(moving.array, shift @ moving.affine, moving.path)
    assert distance_mm(align(fixed, moving), shift @ true, size_mm) < 0.02 * size_mm


def test_headers_that_are_right_stand(phantom, lattice, turn):
    moving = pair(phantom, lattice, turn, np.eye(4))[1]
    np.testing.assert_array_equal(align(moving, moving), np.eye(4))


def test_rigid_means_rigid(phantom, lattice, turn):
    true = nib.affines.from_matvec(turn(-25, 1), [10.0, 0, 5])
    found = align(*pair(phantom, lattice, turn, true), kind="rigid")
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-5)
    assert distance_mm(found, true, 100.0) < 2.0


def test_an_inverted_contrast_does_not_matter(phantom, lattice, turn):
    true = nib.affines.from_matvec(turn(12, 2), [4.0, -3, 2])
    fixed, moving = pair(phantom, lattice, turn, true)
    # Still 0 around the body: what is bright inside it becomes dark.
    strange = type(moving)(moving.array * (4 - moving.array), moving.affine, moving.path)
    assert distance_mm(align(fixed, strange), true, 100.0) < 4.0


@pytest.mark.parametrize("seed", [0, 1])
def test_images_of_noise_are_kept_upon_each_other(lattice, seed):
    # Nothing in them is alike, and the fewer voxels count, the more alike they seem by chance.
    shape = (24, 24, 24)
    draw = np.random.default_rng(seed)
    affine = lattice(shape, (1.0, 1.0, 1.0), np.eye(3))
    fixed, moving = (
        Volume(draw.uniform(size=shape).astype(np.float32), affine, Path("noise.nii")) for _ in range(2)
    )
    points = geometry.voxel_to_world(np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1), affine)
    reached = geometry.world_to_voxel(geometry.voxel_to_world(points, align(fixed, moving)), affine)
    assert ((reached >= -0.5) & (reached <= 23.5)).all(axis=-1).mean() > 0.9


def test_images_that_do_not_overlap_are_refused(phantom, lattice, turn):
    fixed, moving = pair(phantom, lattice, turn, np.eye(4))
    check_overlap(fixed, moving, np.eye(4))
    with pytest.raises(InputError, match="do not overlap: only 0 % of the smaller"):
        check_overlap(fixed, moving, nib.affines.from_matvec(np.eye(3), [200.0, 0, 0]))


def test_a_lattice_from_corner_to_corner(phantom, lattice, turn):
    fixed, _ = pair(phantom, lattice, turn, np.eye(4))
    affine = corner_to_corner(fixed, (11, 5, 34))
    for index in [(0, 0, 0), (1, 1, 1)]:
        ours = geometry.voxel_to_world(np.array(index) * [10, 4, 33], affine)
        theirs = geometry.voxel_to_world(np.array(index) * np.subtract(fixed.array.shape, 1), fixed.affine)
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


def test_the_matrix_is_as_exact_where_products_are_rounded():
    text = jax.jit(_matrix).lower(np.ones(12, np.float32)).as_text()
    assert text.count("dot_general") == text.count("precision = [HIGHEST, HIGHEST]") == 2
