import itertools

import numpy as np
import pytest
from scipy import ndimage

from gridreg_jax import metrics

SPACING = (0.7, 1.5, 2.5)


def label_maps(seed=0, shape=(20, 18, 16), num_labels=3):
    """Two similar maps of blobs."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(num_labels + 1, *shape)), (0, 2, 2, 2))
    noise = ndimage.gaussian_filter(rng.normal(size=fields.shape), (0, 1.5, 1.5, 1.5))
    return fields.argmax(0), (fields + 0.5 * noise).argmax(0)


def smooth_field(seed=0, shape=(12, 11, 10), size=1.5):
    noise = np.random.default_rng(seed).normal(size=(*shape, 3))
    field = ndimage.gaussian_filter(noise, (1.2, 1.2, 1.2, 0))
    return (size * field / np.abs(field).max()).astype(np.float32)


def determinants(displacement):
    """Central differences by numpy, whole volume."""
    jacobian = np.stack([np.stack(np.gradient(displacement[..., c].astype(float)), -1) for c in range(3)], -2)
    return np.linalg.det(jacobian + np.eye(3))


def test_dice_against_simpleitk():
    sitk = pytest.importorskip("SimpleITK")
    fixed, warped = label_maps()
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(v.astype(np.uint8)) for v in (fixed, warped)))
    found = metrics.dice(fixed, warped, [1, 3])
    assert found == {label: pytest.approx(overlap.GetDiceCoefficient(label)) for label in (1, 3)}
    assert 0.1 < found[1] < 0.95


def test_dice_of_absent_labels():
    fixed, warped = label_maps()
    found = metrics.dice(fixed, np.where(warped == 1, 0, warped), [1, 9])
    assert found[1] == 0 and np.isnan(found[9])


def test_hd95_of_shifted_boxes():
    fixed, warped = np.zeros((2, 20, 18, 16), int)
    fixed[3:10, 4:9, 5:12] = 2
    warped[7:14, 4:9, 5:12] = 2
    # Four slices of 0.7 mm apart: both end faces are that far from the other box, and more than 5 % of the surface.
    assert metrics.hd95_mm(fixed, warped, [2], SPACING) == {2: pytest.approx(4 * 0.7)}
    assert metrics.hd95_mm(fixed, fixed, [2], SPACING) == {2: 0}


def test_hd95_is_at_most_the_hausdorff_distance():
    sitk = pytest.importorskip("SimpleITK")
    fixed, warped = label_maps()
    found = metrics.hd95_mm(fixed, warped, [1, 2, 3], SPACING)
    for label in (1, 2, 3):
        images = [sitk.GetImageFromArray((v == label).astype(np.uint8).T) for v in (fixed, warped)]
        for image in images:
            image.SetSpacing(SPACING)
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(*images)
        # The filter takes the voxels of the object, this the surface between voxels: half a cell apart at most.
        assert 0 < found[label] < hausdorff.GetHausdorffDistance() + np.linalg.norm(SPACING) / 2


# What compute_robust_hausdorff of surface-distance 0.1 gives, for labels 1, 2, 3 of label_maps(seed).
RECORDED = {
    (0, (1, 1, 1)): [2.0, 3.605551275, 2.0],
    (1, SPACING): [3.176476035, 2.8, 2.915475947],
    (2, (1.0, 1.0, 3.0)): [3.0, 3.0, 4.0],
}


@pytest.mark.parametrize(("seed", "spacing"), RECORDED)
def test_hd95_equals_recorded_values(seed, spacing):
    found = metrics.hd95_mm(*label_maps(seed), [1, 2, 3], spacing)
    np.testing.assert_allclose(list(found.values()), RECORDED[seed, spacing], atol=1e-6)


def test_surface_inside_a_cell():
    areas = np.linalg.norm(metrics._surfels() * (1.5 * 2.5, 0.7 * 2.5, 0.7 * 1.5), axis=-1).sum(-1)
    assert areas[0] == areas[255] == 0
    # One voxel of eight cuts off a corner, the plane x = 1/2 is a whole face.
    assert areas[1] == pytest.approx(np.linalg.norm([1.5 * 2.5, 0.7 * 2.5, 0.7 * 1.5]) / 8)
    assert areas[0b00001111] == pytest.approx(1.5 * 2.5)
    # Over all cells, from the table of surface-distance 0.1.
    assert [areas.sum(), areas @ (1 + np.arange(256)) ** 2 / 256] == pytest.approx(
        [576.14443003, 48692.36211], rel=1e-9
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("spacing", [(1, 1, 1), SPACING])
def test_hd95_equals_surface_distance(spacing):
    surface_distance = pytest.importorskip("surface_distance")
    for seed in range(5):
        fixed, warped = label_maps(seed)
        found = metrics.hd95_mm(fixed, warped, [1, 2, 3], spacing)
        for label in found:
            surfaces = surface_distance.compute_surface_distances(fixed == label, warped == label, spacing)
            assert found[label] == pytest.approx(surface_distance.compute_robust_hausdorff(surfaces, 95), abs=1e-6)


def test_hd95_of_absent_labels():
    fixed, warped = label_maps()
    found = metrics.hd95_mm(fixed, np.where(warped == 1, 0, warped), [1, 9], SPACING)
    assert np.isinf(found[1]) and np.isnan(found[9])
    assert np.isinf(metrics.hd95_mm(np.where(fixed == 1, 0, fixed), warped, [1], SPACING)[1])


def test_centroid_distance():
    fixed, warped = label_maps()
    found = metrics.centroid_distance_mm(fixed, warped, [1, 2], SPACING)
    for label in (1, 2):
        centres = [np.array(ndimage.center_of_mass(v == label)) for v in (fixed, warped)]
        assert found[label] == pytest.approx(np.linalg.norm((centres[0] - centres[1]) * SPACING))
    absent = metrics.centroid_distance_mm(fixed, np.where(warped == 1, 0, warped), [1, 9], SPACING)
    assert np.isnan(absent[1]) and np.isnan(absent[9])


def test_tre():
    # A displacement that is affine in position is sampled exactly between voxels.
    matrix, shift = np.array([[0.1, 0, 0], [0, -0.05, 0.1], [0, 0, 0.02]]), np.array([1.0, -2.0, 0.5])
    displacement = (np.indices((12, 11, 10)).transpose(1, 2, 3, 0) @ matrix.T + shift).astype(np.float32)
    rng = np.random.default_rng(0)
    fixed, moving = rng.uniform(0, 9, (5, 3)), rng.uniform(0, 9, (5, 3))
    expected = np.linalg.norm((fixed + fixed @ matrix.T + shift - moving) * SPACING, axis=1)
    np.testing.assert_allclose(metrics.tre_mm(fixed, moving, displacement, SPACING), expected, rtol=1e-5)
    np.testing.assert_allclose(
        metrics.tre_mm(fixed, moving, None, SPACING), np.linalg.norm((fixed - moving) * SPACING, axis=1)
    )
    true = fixed + fixed @ matrix.T + shift
    np.testing.assert_allclose(metrics.tre_mm(fixed, true, displacement, SPACING), 0, atol=1e-5)


def test_tre_outside_the_lattice_takes_the_border():
    displacement = np.zeros((5, 5, 5, 3), np.float32)
    displacement[-1, ..., 0] = 2
    assert metrics.tre_mm(np.array([[6.0, 2, 2]]), np.array([[6, 2, 2]]), displacement, (3, 1, 1)) == pytest.approx(6)


def test_folding():
    displacement = np.zeros((12, 11, 10, 3), np.float32)
    assert metrics.folding_percent(displacement) == 0
    x = np.arange(12)
    displacement[..., 0] = np.where(x < 6, 0, -2.0 * (x - 6))[:, None, None]  # determinants 1 up to x = 5, then 0, -1
    assert metrics.folding_percent(displacement) == pytest.approx(50)
    mask = np.zeros((12, 11, 10), bool)
    mask[4:7] = True
    assert metrics.folding_percent(displacement, mask) == pytest.approx(100 / 3)
    field = smooth_field(size=6)
    expected = 100 * np.mean(determinants(field)[1:-1, 1:-1, 1:-1] <= 0)
    assert 1 < expected < 80 and metrics.folding_percent(field) == pytest.approx(expected)


def test_sd_log_jacobian():
    field = smooth_field()
    inner = determinants(field)[1:-1, 1:-1, 1:-1]
    assert inner.min() > 0
    assert metrics.sd_log_jacobian(field) == pytest.approx(np.log(inner).std(), rel=1e-6)
    mask = np.random.default_rng(0).random(field.shape[:3]) < 0.5
    expected = np.log(inner[mask[1:-1, 1:-1, 1:-1]]).std()
    assert metrics.sd_log_jacobian(field, mask) == pytest.approx(expected, rel=1e-6)
    # A uniform scaling has a constant determinant; a map turned inside out has no logarithm anywhere.
    grid = np.indices((6, 6, 6)).transpose(1, 2, 3, 0)
    assert metrics.sd_log_jacobian(0.3 * grid) == pytest.approx(0, abs=1e-12)
    assert np.isnan(metrics.sd_log_jacobian(-2.0 * grid))


def test_sd_log_jacobian_leaves_out_folded_voxels():
    field = smooth_field(size=6)
    inner = determinants(field)[1:-1, 1:-1, 1:-1]
    assert metrics.sd_log_jacobian(field) == pytest.approx(np.log(inner[inner > 0]).std(), rel=1e-6)


def test_ndv_of_closed_forms():
    grid = np.indices((7, 6, 8)).transpose(1, 2, 3, 0).astype(float)
    assert metrics.ndv_percent(0.5 * grid) == 0
    # Mirrored, then mirrored and stretched: every tetrahedron is inside out, at its own and at twice its volume.
    assert metrics.ndv_percent(grid * (-2, 0, 0)) == pytest.approx(100)
    assert metrics.ndv_percent(grid * (-2, 1, 0)) == pytest.approx(200)


def test_ndv_sees_what_central_differences_miss():
    displacement = np.zeros((8, 8, 8, 3))
    displacement[..., 0] = (0.6 * (-1.0) ** np.arange(8))[:, None, None]
    assert metrics.folding_percent(displacement) == 0
    assert metrics.ndv_percent(displacement) > 5


def test_ndv_against_tetrahedra_one_by_one():
    field = smooth_field(shape=(6, 7, 6), size=4)
    mask = np.random.default_rng(0).random(field.shape[:3]) < 0.6
    volumes = np.zeros(field.shape[:3])

    def vertex(at):
        return np.array(at) + field[tuple(at)].astype(float)

    for at in itertools.product(*(range(1, n - 1) for n in field.shape[:3])):
        at = np.array(at)
        for signs in itertools.product((-1, 1), repeat=3):
            # One-sided difference quotients, whichever side: the sign of a step divides out.
            rows = [(vertex(at + s * e) - vertex(at)) / s for s, e in zip(signs, np.eye(3, dtype=int), strict=True)]
            volumes[tuple(at)] += max(0, -np.linalg.det(rows)) / 6 / 2
        for side in (-1, 1):
            # The tetrahedron between this voxel and three at distance sqrt(2) in the cube on one side of it.
            steps = [(1, 1, 0), (0, 1, 1), (1, 0, 1)]
            rows = [vertex(at + side * np.array(step)) - vertex(at) for step in steps]
            volumes[tuple(at)] += max(0, -side * np.linalg.det(rows)) / 6 / 2
    inner = (slice(1, -1),) * 3
    assert metrics.ndv_percent(field) == pytest.approx(100 * volumes[inner].mean()) and volumes.any()
    assert metrics.ndv_percent(field, mask) == pytest.approx(100 * volumes[inner][mask[inner]].mean())


def nearest(moving, displacement):
    """Nearest neighbour; 0 beyond the outermost voxel centres."""
    at = np.indices(moving.shape) + np.moveaxis(displacement, -1, 0)
    last = np.array(moving.shape)[:, None, None, None] - 1
    inside = ((at >= 0) & (at <= last)).all(axis=0)
    return np.where(inside, moving[tuple(np.clip(np.rint(at), 0, last).astype(int))], 0)


def test_learn2reg_overlap_and_distance():
    fixed, moving = label_maps()
    displacement = smooth_field(shape=fixed.shape, size=3)
    fixed, moving = np.where(fixed == 1, 0, fixed), np.where(moving == 2, 0, moving)
    warped = nearest(moving, displacement)
    overlaps = metrics.learn2reg_dice(fixed, moving, displacement, [1, 2, 3])
    distances = metrics.learn2reg_hd95_voxels(fixed, moving, displacement, [1, 2, 3])
    assert overlaps[3] == metrics.dice(fixed, warped, [3])[3] != metrics.dice(fixed, moving, [3])[3]
    assert distances[3] == metrics.hd95_mm(fixed, warped, [3], (1, 1, 1))[3]
    assert all(np.isnan(found[label]) for found in (overlaps, distances) for label in (1, 2))


def test_learn2reg_tre_samples_cubically():
    x = np.arange(30.0)
    displacement = np.zeros((30, 9, 9, 3))
    displacement[..., 0] = (0.01 * (x - 15) ** 2)[:, None, None]
    landmark = np.array([[15.5, 4, 4]])
    # A quadratic is reproduced between voxels far from the border; the trilinear value lies above it.
    assert metrics.learn2reg_tre_mm(landmark, landmark, displacement, (2, 1, 1)) == pytest.approx(2 * 0.0025, rel=1e-3)
    assert metrics.tre_mm(landmark, landmark, displacement, (2, 1, 1)) == pytest.approx(2 * 0.005)
    outside = np.array([[31.0, 4, 4]])
    assert metrics.learn2reg_tre_mm(outside, outside, displacement, (2, 1, 1)) == 0
    corner = np.array([[29.0, 0, 8]])
    expected = metrics.learn2reg_tre_mm(corner, corner, displacement, (2, 1, 1))
    assert expected == pytest.approx(2 * displacement[29, 0, 8, 0])
    rounded = corner + [[1e-6, -1e-6, 1e-6]]
    assert metrics.learn2reg_tre_mm(rounded, corner, displacement, (2, 1, 1)) == pytest.approx(expected, abs=1e-4)


def test_learn2reg_sd_log_jacobian():
    field = smooth_field(size=6)
    inner = determinants(field)[2:-2, 2:-2, 2:-2]
    expected = np.log(np.clip(inner + 3, 1e-9, 1e9))
    assert metrics.learn2reg_sd_log_jacobian(field) == pytest.approx(expected.std(), rel=1e-6)
    mask = np.random.default_rng(0).random(field.shape[:3]) < 0.5
    masked = np.ma.MaskedArray(expected, 1 - mask[2:-2, 2:-2, 2:-2]).std()
    assert metrics.learn2reg_sd_log_jacobian(field, mask) == pytest.approx(masked, rel=1e-6)


def test_lumir_landmarks_are_blobs_whose_centroids_are_compared():
    fixed, moving = (np.zeros((20, 18, 16), int) for _ in range(2))
    fixed[5:8, 6:9, 4:7], moving[8:11, 6:9, 4:7] = 1, 1  # 3 voxels apart along x
    fixed[15, 3, 12] = moving[15, 3, 12] = 2
    displacement = np.zeros((*fixed.shape, 3))
    assert metrics.lumir_tre_voxels(fixed, moving, displacement, [1, 2]) == {1: 3, 2: 0}
    displacement[..., 0] = 2.6  # to the nearest voxel: 3; what lay at 15 is fetched by none
    displacement[12:] = 9
    found = metrics.lumir_tre_voxels(fixed, moving, displacement, [1, 2])
    assert found[1] == 0 and np.isnan(found[2])


@pytest.mark.filterwarnings("error")
def test_nothing_to_count_is_nan():
    displacement = np.zeros((6, 6, 6, 3))
    regularity = ("folding_percent", "sd_log_jacobian", "ndv_percent", "learn2reg_sd_log_jacobian")
    for metric in (getattr(metrics, name) for name in regularity):
        assert metric(displacement) == 0
        assert np.isnan(metric(displacement, np.zeros((6, 6, 6))))
        assert np.isnan(metric(displacement[:, :, :2]))
        assert np.isnan(metric(displacement[:2], np.ones((2, 6, 6))))
