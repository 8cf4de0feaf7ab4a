"""The embedded cohort: one anatomy, many subjects, and a correspondence that is known."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from gridreg_jax.data import cohort
from gridreg_jax.data.pipeline import open_dataset

pytest.importorskip("nilearn")

SEED, FIXED, MOVING = 0, 0, 1


@pytest.fixture(scope="module")
def subjects():
    return {index: cohort.subject(index, seed=SEED) for index in (FIXED, MOVING)}


@pytest.fixture(scope="module")
def truth():
    return cohort.true_displacement(FIXED, MOVING, seed=SEED)


def dice(first, second, label):
    first, second = first == label, second == label
    return 2 * (first & second).sum() / (first.sum() + second.sum())


def test_the_anatomy_is_a_brain_in_mm():
    anatomy = cohort.anatomy()
    assert anatomy.image.shape == anatomy.labels.shape == cohort.SHAPE
    assert set(np.unique(anatomy.labels)) == {0, *cohort.LABELS}
    np.testing.assert_allclose(anatomy.affine[:3, :3], cohort.SPACING_MM * np.eye(3))
    # White matter is bright, grey matter darker; the world's origin (the anterior commissure) lies inside.
    assert anatomy.image[anatomy.labels == 2].mean() > anatomy.image[anatomy.labels == 1].mean() > 0.3
    origin = np.linalg.solve(anatomy.affine, [0, 0, 0, 1])[:3].round().astype(int)
    assert anatomy.image[tuple(origin)] > 0
    # No brain is lost by the cropping.
    border = np.ones(cohort.SHAPE, bool)
    border[1:-1, 1:-1, 1:-1] = False
    assert not anatomy.labels[border].any()


def test_a_subject_is_a_function_of_seed_and_index(subjects):
    cohort.displacement.cache_clear()
    prepared, landmarks = cohort.subject(FIXED, seed=SEED)
    expected, expected_landmarks = subjects[FIXED]
    np.testing.assert_array_equal(prepared.image, expected.image)
    np.testing.assert_array_equal(prepared.labels, expected.labels)
    np.testing.assert_array_equal(landmarks, expected_landmarks)
    for other, other_landmarks in (subjects[MOVING], cohort.subject(FIXED, seed=SEED + 1)):
        assert np.abs(other.image - expected.image).mean() > 0.01
        assert np.linalg.norm(other_landmarks - expected_landmarks, axis=1).max() > 1


def test_a_subject_is_ready_for_a_network(subjects):
    for prepared, landmarks in subjects.values():
        assert (prepared.image.dtype, prepared.labels.dtype) == (np.float32, np.int32)
        assert (prepared.image.min(), prepared.image.max()) == (0, 1)
        assert set(np.unique(prepared.labels)) == {0, *cohort.LABELS}
        assert landmarks.shape == (cohort.LANDMARKS, 3)
        assert (landmarks > 0).all() and (landmarks < np.array(cohort.SHAPE) - 1).all()


@pytest.mark.parametrize("index", range(3))
def test_landmarks_of_a_subject_are_those_of_the_anatomy(index):
    points = cohort.anatomy().landmarks
    found = cohort.unmap_points(points, SEED, index)
    np.testing.assert_allclose(cohort.map_points(found, SEED, index), points, atol=1e-3)
    assert np.linalg.norm(found - points, axis=1).max() > 1


@pytest.mark.parametrize("index", range(6))
def test_maps_move_up_to_a_centimetre_and_do_not_fold(index):
    displacement = cohort.displacement(SEED, index)
    length_mm = np.linalg.norm(displacement, axis=0).max() * cohort.SPACING_MM
    assert 5.5 < length_mm < 10.5
    # Of the piecewise trilinear map, at the corners of its cells: one-sided differences in all combinations.
    step = [np.diff(displacement, axis=axis) / cohort._COARSE for axis in (1, 2, 3)]
    inner = displacement.shape[1:]
    for corner in np.ndindex(2, 2, 2):
        pairs, columns = list(zip(corner, inner, strict=True)), []
        for axis, part in enumerate(step):
            window = [slice(1, -1) if a != axis else slice(c, n - 2 + c) for a, (c, n) in enumerate(pairs)]
            columns.append(part[(slice(None), *window)])
        jacobian = np.moveaxis(np.stack(columns, axis=1), (0, 1), (-2, -1)) + np.eye(3)
        assert np.linalg.det(jacobian).min() > 0


def test_the_true_displacement_takes_landmarks_to_their_partners(subjects, truth):
    fixed, moving = subjects[FIXED][1], subjects[MOVING][1]
    at_landmarks = [map_coordinates(truth[..., axis], fixed.T, order=1) for axis in range(3)]
    errors = np.linalg.norm(fixed + np.stack(at_landmarks, -1) - moving, axis=1)
    assert errors.max() < 0.1
    assert np.linalg.norm(fixed - moving, axis=1).mean() > 1


def test_the_true_displacement_aligns_labels_and_images(subjects, truth):
    (fixed, _), (moving, _) = subjects[FIXED], subjects[MOVING]
    points = np.moveaxis(np.indices(cohort.SHAPE), 0, -1) + truth
    where = np.moveaxis(points, -1, 0)
    votes = [map_coordinates(np.float32(moving.labels == i), where, order=1, mode="nearest") for i in range(3)]
    before, after = (
        [dice(fixed.labels, one, label) for label in cohort.LABELS] for one in (moving.labels, np.argmax(votes, axis=0))
    )
    # Not 1: the cortex is about a voxel thick, and the labels of both subjects were sampled at the nearest voxel.
    assert max(before) < 0.75 and min(after) > 0.9, (before, after)
    image = map_coordinates(moving.image, where, order=1, mode="nearest")
    assert np.mean((fixed.image - image) ** 2) < 0.5 * np.mean((fixed.image - moving.image) ** 2)


def test_splits_of_the_cohort_share_no_subject(tmp_path):
    settings = dict(shape=cohort.SHAPE, spacing=(2.0, 2.0, 2.0), cohort_subjects=(3, 2, 2), cache_dir=tmp_path)
    dataset = open_dataset(**settings)
    subjects = {name: {index for pair in dataset.pairs[name] for index in pair} for name in ("val", "test")}
    assert (set(dataset.train_subjects), subjects) == ({0, 1, 2}, {"val": {3, 4}, "test": {5, 6}})
    assert dataset.label_values == tuple(cohort.LABELS)
    # What the cache gives back is what was made.
    prepared, landmarks = cohort.subject(3, seed=0)
    np.testing.assert_array_equal(dataset.sources[3].load().image, prepared.image)
    np.testing.assert_array_equal(dataset.landmarks((3, 4))[0], landmarks)
