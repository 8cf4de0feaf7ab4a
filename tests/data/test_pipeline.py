"""Data sets and batches: which pairs there are, in what order, and what their arrays hold."""

import csv
import itertools

import numpy as np
import pytest

from gridreg_jax import geometry
from gridreg_jax.data.nifti import load_labels, load_landmarks
from gridreg_jax.data.pipeline import batches, open_dataset, open_pairs
from gridreg_jax.errors import InputError

LATTICE = dict(shape=(16, 20, 16), spacing=(1.0, 1.0, 1.0), center="image")


@pytest.fixture
def messages():
    return []


@pytest.fixture
def open_list(tmp_path, messages, subjects_csv):
    """Open a list of the small subjects, given as text; paths in it are relative to their folder."""

    def open_it(kind: str, text: str, **options):
        path = subjects_csv.parent / f"{tmp_path.name}.csv"
        path.write_text(text)
        try:
            return open_dataset(**{kind: str(path)}, **LATTICE, cache_dir=tmp_path, notify=messages.append, **options)
        finally:
            path.unlink()

    return open_it


@pytest.fixture(scope="module")
def dataset(subjects_csv, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return open_dataset(subjects=str(subjects_csv), **LATTICE, evaluation_pairs=(8, 1), cache_dir=cache)


def take(dataset, start, stop, seed=3):
    return list(batches(dataset, batch_size=2, seed=seed, start=start, stop=stop))


def test_the_parts_of_a_batch_are_the_batch(dataset):
    (whole,) = take(dataset, 4, 5)
    options = dict(batch_size=2, seed=3, start=4, stop=5)
    parts = [next(batches(dataset, part=(index, 2), **options)) for index in (0, 1)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    from_the_start, later, other = take(dataset, 0, 6), take(dataset, 4, 6), take(dataset, 0, 6, seed=4)
    assert (len(from_the_start), len(later)) == (6, 2)
    for one, two in zip(from_the_start[4:], later, strict=True):
        assert one.keys() == two.keys() == {"fixed", "moving", "fixed_labels", "moving_labels"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert any((one["fixed"] != two["fixed"]).any() for one, two in zip(from_the_start, other, strict=True))
    assert any((one["fixed"] != from_the_start[0]["fixed"]).any() for one in from_the_start[1:])


def test_arrays_of_a_batch(dataset):
    (batch,) = take(dataset, 0, 1)
    for name in ("fixed", "moving"):
        image, labels = batch[name], batch[f"{name}_labels"]
        assert (image.shape, image.dtype) == ((2, 16, 20, 16, 1), np.float32)
        assert (labels.shape, labels.dtype) == ((2, 16, 20, 16), np.int32)
        assert (image.min(), image.max()) == (0, 1)
        # The blobs are where their labels are, whatever the axis order of the file.
        assert image[..., 0][labels > 0].min() > np.median(image)


def test_what_is_known_is_told_where_not_all_is(dataset, subjects_csv, tmp_path):
    larger = LATTICE | dict(shape=(20, 20, 16))
    partial = open_dataset(subjects=str(subjects_csv), **larger, evaluation_pairs=(1, 1), cache_dir=tmp_path)
    batch = partial.arrays([(0, 1)], known=True)
    for name in ("fixed_known", "moving_known"):
        assert (batch[name].shape, batch[name].dtype) == ((1, 20, 20, 16), np.bool_)
        assert 0 < batch[name].mean() < 1
    assert not batch["fixed"][..., 0][~batch["fixed_known"]].any()
    assert partial.arrays([(0, 1)]).keys() == dataset.arrays([(0, 1)], known=True).keys() == batch.keys() - {
        "fixed_known",
        "moving_known",
    }


def test_training_pairs_are_two_different_training_subjects_in_either_order(dataset):
    rng = np.random.default_rng(0)
    drawn = {dataset.draw(rng) for _ in range(300)}
    assert drawn == set(itertools.permutations(range(4), 2))


def test_evaluation_pairs_come_from_their_own_split(dataset):
    assert set(dataset.pairs["val"]) == {(4, 5), (5, 4)}  # as many as there are, no more
    assert len(dataset.pairs["test"]) == 1 and set(dataset.pairs["test"][0]) == {6, 7}


def test_labels_become_1_to_n(dataset, subjects_csv):
    assert dataset.label_values == (3, 7)
    found = dataset.arrays([(0, 1)])["fixed_labels"][0]
    np.testing.assert_array_equal(found, np.select([dataset.sources[0].load().labels == v for v in (3, 7)], [1, 2]))
    np.testing.assert_array_equal(
        np.unique(load_labels(subjects_csv.parent / "labels0.nii.gz").array, return_counts=True)[1],
        np.unique(found, return_counts=True)[1],
    )


def test_labels_that_are_not_scored_count_as_background(open_list):
    text = "image,labels\nimage0.nii.gz,labels0.nii.gz\nimage1.nii.gz,labels1.nii.gz\n"
    some = open_list("subjects", text, labels=(7,))
    assert some.label_values == (7,)
    compact = some.arrays([(0, 1)])["moving_labels"][0]
    np.testing.assert_array_equal(compact, some.sources[1].load().labels == 7)


def test_a_label_that_no_image_has_is_named(open_list):
    text = "image,labels\nimage0.nii.gz,labels0.nii.gz\nimage1.nii.gz,labels1.nii.gz\n"
    with pytest.raises(InputError, match=r"data.labels: no image has label 4; found are \[3, 7\]"):
        open_list("subjects", text, labels=(4, 7))


def test_landmarks_match_by_number_in_voxels_of_the_lattice(dataset, subjects_csv):
    fixed, moving = dataset.landmarks((2, 6))
    for found, index in ((fixed, 2), (moving, 6)):
        world = load_landmarks(subjects_csv.parent / f"points{index}.csv")
        affine = dataset.sources[index].load().affine
        np.testing.assert_allclose(geometry.voxel_to_world(found, affine), [world[1], world[2]], atol=1e-6)
    # The lattice is the image's own here, so that a landmark lies in its blob's label.
    labels = dataset.arrays([(2, 6)])
    assert [labels["fixed_labels"][0][tuple(p.round().astype(int))] for p in fixed] == [1, 2]
    assert [labels["moving_labels"][0][tuple(p.round().astype(int))] for p in moving] == [1, 2]


def test_landmarks_of_both_images_only(open_list, tmp_path):
    (tmp_path / "a.csv").write_text("id,x,y,z\n9,1,2,3\n4,5,6,7\n1,0,0,0\n")
    (tmp_path / "b.csv").write_text("id,x,y,z\n4,8,8,8\n5,1,1,1\n9,3,3,3\n")
    (tmp_path / "c.csv").write_text("id,x,y,z\n77,8,8,8\n")
    rows = [f"image{i}.nii.gz,{tmp_path / name}.csv" for i, name in enumerate("abc")]
    listed = open_list("subjects", "\n".join(["image,landmarks", *rows, "image3.nii.gz,"]) + "\n")
    fixed, moving = listed.landmarks((0, 1))
    np.testing.assert_allclose(fixed, [[5, 6, 7], [1, 2, 3]], atol=1e-9)
    np.testing.assert_allclose(moving, [[8, 8, 8], [3, 3, 3]], atol=1e-9)
    assert listed.landmarks((0, 3)) is None
    with pytest.raises(InputError, match="landmarks of image0 and image2: no number is in both"):
        listed.landmarks((0, 2))


def test_without_validation_or_test_data_training_pairs_stand_in_and_it_is_said(open_list, messages):
    four = open_list("subjects", "image,split\n" + "".join(f"image{i}.nii.gz,train\n" for i in range(4)))
    assert four.pairs["test"] == four.pairs["val"]
    assert len(four.pairs["val"]) == 8 and all(fixed != moving for fixed, moving in four.pairs["val"])
    assert [message.split(":")[0] for message in messages] == ["no validation data", "no test data"]


def test_missing_labels_are_told_and_none_used(open_list, messages):
    some = open_list("subjects", "image,labels\nimage0.nii.gz,labels0.nii.gz\nimage1.nii.gz,\nimage2.nii.gz,\n")
    assert not some.has_labels
    assert some.arrays([(0, 1)]).keys() == {"fixed", "moving"}
    assert "labels are not used: image1 and 1 more images have none" in messages


def test_a_list_of_pairs(open_list, messages):
    rows = [(0, 1, "train"), (2, 1, "train"), (4, 5, "val"), (6, 7, "test"), (7, 6, "test")]
    text = "fixed,moving,split\n" + "".join(f"image{f}.nii.gz,image{m}.nii.gz,{split}\n" for f, m, split in rows)
    listed = open_list("pairs", text)
    assert not messages and not listed.train_subjects
    assert len(listed.sources) == 7  # each image once
    named = {split: [tuple(listed.sources[i].name for i in p) for p in pairs] for split, pairs in listed.pairs.items()}
    expected = {split: [(f"image{f}", f"image{m}") for f, m, s in rows if s == split] for split in named}
    assert named == expected
    rng = np.random.default_rng(0)
    assert {listed.draw(rng) for _ in range(50)} == set(listed.pairs["train"])


def test_pairs_to_evaluate_are_those_of_split_test_or_all(subjects_csv, tmp_path):
    header, rows = "fixed,moving,split", ["image0.nii.gz,image1.nii.gz,train", "image6.nii.gz,image7.nii.gz,test"]
    for chosen, expected in ((rows, 1), (rows[:1], 1), ([row.rpartition(",")[0] + "," for row in rows], 2)):
        path = subjects_csv.parent / "to_evaluate.csv"
        path.write_text("\n".join([header, *chosen]) + "\n")
        opened = open_pairs(path, **LATTICE, cache_dir=tmp_path)
        assert len(opened.pairs["test"]) == expected
    opened = open_pairs(path, **LATTICE, cache_dir=tmp_path)
    assert [opened.sources[i].name for i in opened.pairs["test"][1]] == ["image6", "image7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(pairs="a.csv", subjects="b.csv"), "data.pairs and data.subjects exclude each other"),
        (dict(), r"the embedded cohort has \(80, 96, 80\) voxels of 2 mm, not data.shape \(16, 20, 16\)"),
        (dict(subjects="none.csv"), "none.csv: cannot be read"),
        (dict(pairs="none.csv"), "none.csv: cannot be read"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(InputError, match=message):
        open_dataset(**LATTICE, **options)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("subjects", "image,split\nimage0.nii.gz,train\nimage1.nii.gz,test\n", "at least 2 .* in split 'train'"),
        ("pairs", "fixed,moving,split\nimage0.nii.gz,image1.nii.gz,test\n", "no pair is in split 'train'"),
    ],
)
def test_a_list_without_training_data_is_refused(open_list, tmp_path, kind, text, message):
    with pytest.raises(InputError, match=f"{tmp_path.name}.csv: .*{message}"):
        open_list(kind, text)


def test_real_pairs_open_with_labels_and_landmarks(real_data, tmp_path):
    with open(real_data / "pairs.csv", newline="") as file:
        first = {row["dataset"]: row for row in reversed(list(csv.DictReader(file)))}
    columns = [f"{side}{kind}" for kind in ("", "_labels", "_landmarks") for side in ("fixed", "moving")]
    for name, row in first.items():
        paths = [str(real_data / row[column]) if row[column] else "" for column in columns]
        (tmp_path / "pair.csv").write_text(",".join(columns) + "\n" + ",".join(paths) + "\n")
        opened = open_pairs(tmp_path / "pair.csv", shape=(40, 40, 40), spacing=(5.0,) * 3, cache_dir=tmp_path)
        (pair,) = opened.pairs["test"]
        assert opened.has_labels == bool(row["fixed_labels"]), name
        assert (opened.landmarks(pair) is not None) == bool(row["fixed_landmarks"]), name
        arrays = opened.arrays([pair])
        for array in arrays.values():
            assert array.shape[:4] == (1, 40, 40, 40) and array.max() > 0, name
