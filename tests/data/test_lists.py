"""Lists of subjects and pairs: every mistake in one is named with its row, and splits are reproducible."""

import os
from collections import Counter
from pathlib import Path

import pytest

from gridreg_jax.data.lists import Pair, Subject, assign_splits, read_pairs, read_subjects
from gridreg_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.nii", "b.nii", "c.nii", "a_labels.nii", "b_labels.nii", "a.csv", "b.csv"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "list.csv"
    path.write_text(text)
    return path


def test_read_subjects(folder):
    path = write(folder, "note,image,labels,split,landmarks\nx,a.nii,a_labels.nii,val,a.csv\n\n,b.nii,,,\n,,,,\n")
    assert read_subjects(path) == [
        Subject(folder / "a.nii", folder / "a_labels.nii", "val", folder / "a.csv"),
        Subject(folder / "b.nii"),
    ]


def test_read_pairs(folder):
    text = "task,fixed,moving,fixed_labels,moving_labels,fixed_landmarks,moving_landmarks,split\n"
    text += '"one, two",a.nii,b.nii,a_labels.nii,b_labels.nii,a.csv,b.csv,test\n'
    text += "three, b.nii , a.nii,,,,,\n"
    assert read_pairs(write(folder, text)) == [
        Pair(
            fixed=folder / "a.nii",
            moving=folder / "b.nii",
            fixed_labels=folder / "a_labels.nii",
            moving_labels=folder / "b_labels.nii",
            fixed_landmarks=folder / "a.csv",
            moving_landmarks=folder / "b.csv",
            split="test",
        ),
        Pair(folder / "b.nii", folder / "a.nii"),
    ]


def test_empty_rows_before_the_header_are_left_out(folder):
    text = "\n  \n,,\nimage,labels,note,note\n,,,,,\na.nii\n"
    assert read_subjects(write(folder, text)) == [Subject(folder / "a.nii")]
    with pytest.raises(InputError, match="row 6: image: no such file"):
        read_subjects(write(folder, text.replace("a.nii", "none.nii")))


def test_absolute_paths_and_a_byte_order_mark_are_fine(folder):
    other = folder / "other"
    other.mkdir()
    (other / "list.csv").write_text(f"\ufeffimage\n{folder / 'a.nii'}\n", encoding="utf-8")
    assert read_subjects(other / "list.csv") == [Subject(folder / "a.nii")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'image' is missing .*found: none"),
        ("image\n", "empty: a header and at least one row"),
        ("picture\na.nii\n", r"column 'image' is missing \(needed: image; found: picture\)$"),
        ("imgae,labels\na.nii,\n", "column 'image' is missing .*should 'imgae' be 'image'"),
        ("image,label\na.nii,a_labels.nii\n", "column 'label' is not known; should it be 'labels'"),
        ("image,split\na.nii,train\nb.nii,validation\n", "row 3: split: 'validation' is not known; known are"),
        ("image,labels\na.nii,\n,b_labels.nii\n", "row 3: the cell of column 'image' is empty"),
        ("image\na.nii\nnone.nii\n", "row 3: image: no such file: .*none.nii$"),
        ("image,labels\na.nii,x.nii\nb.nii,y.nii\nz.nii,\n", r"row 2: labels: .*x.nii \(and 2 more missing files\)"),
        ("image\na.nii\nb.nii\na.nii\n", "row 4: image .*a.nii is in row 2 already"),
        ("image,labels, image\na.nii,,b.nii\n", "column 'image' is there 2 times"),
        ("\n\n", "column 'image' is missing .*found: none"),
        ("image,note\na.nii,one, two\n", "row 2: more cells than the header's 2"),
    ],
)
def test_mistakes_in_subjects_are_named(folder, text, message):
    with pytest.raises(InputError, match=f"list.csv: .*{message}"):
        read_subjects(write(folder, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed\na.nii\n", r"column 'moving' is missing \(needed: fixed, moving; found: fixed\)"),
        ("fixed,moving,fixed_label\na.nii,b.nii,\n", "'fixed_label' is not known; should it be 'fixed_labels'"),
        ("fixed,moving,moving_labels\na.nii,b.nii,b_labels.nii\n", "row 2: labels of the moving image only"),
        ("fixed,moving,fixed_landmarks\na.nii,b.nii,a.csv\n", "row 2: landmarks of the fixed image only"),
        ("fixed,moving\na.nii,b.nii\na.nii,none.nii\n", "row 3: moving: no such file: .*none.nii"),
        ("fixed,moving\n", "empty"),
    ],
)
def test_mistakes_in_pairs_are_named(folder, text, message):
    with pytest.raises(InputError, match=f"list.csv: .*{message}"):
        read_pairs(write(folder, text))


@pytest.mark.parametrize("read", [read_subjects, read_pairs])
def test_a_list_that_cannot_be_read_is_named(folder, read):
    with pytest.raises(InputError, match="none.csv: cannot be read"):
        read(folder / "none.csv")
    (folder / "list.csv").write_bytes(b"fixed,moving\n\xff\xfe,b\n")
    with pytest.raises(InputError, match="list.csv: is not a CSV file in UTF-8"):
        read(folder / "list.csv")


def subjects(count, split=None):
    return [Subject(Path(f"{index}.nii"), split=split) for index in range(count)]


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"train": 1}),
        (5, {"train": 5}),
        (6, {"train": 2, "val": 2, "test": 2}),
        (20, {"train": 14, "val": 2, "test": 4}),
        (100, {"train": 70, "val": 10, "test": 20}),
    ],
)
def test_shares_of_the_splits_of_subjects(count, expected):
    items = assign_splits(subjects(count), seed=0)
    assert Counter(item.split for item in items) == expected
    assert [item.image for item in items] == [item.image for item in subjects(count)]


def test_shares_of_the_splits_of_pairs():
    pairs = [Pair(Path(f"{index}.nii"), Path(f"{index + 1}.nii")) for index in range(6)]
    assert Counter(pair.split for pair in assign_splits(pairs, seed=0)) == {"train": 4, "val": 1, "test": 1}


def test_splits_are_a_function_of_the_seed():
    first, again, other = (assign_splits(subjects(30), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    # Shuffled, not cut in order.
    assert [item.split for item in first] != sorted(item.split for item in first)
    assert all(item.split is None for item in subjects(30))


def test_given_splits_are_kept_and_the_rest_trains():
    items = subjects(8, split="test")[:2] + subjects(8)[2:]
    assert [item.split for item in assign_splits(items, seed=0)] == ["test"] * 2 + ["train"] * 6


def test_no_items_stay_no_items():
    assert assign_splits([], seed=0) == []


def test_real_list():
    root = os.environ.get("GRIDREG_TEST_DATA")
    if not root:
        pytest.skip("GRIDREG_TEST_DATA names no folder of images")
    pairs = read_pairs(Path(root) / "pairs.csv")
    assert len(pairs) > 80
    assert all(pair.split is None for pair in pairs)
    assert any(pair.fixed_landmarks for pair in pairs) and any(pair.fixed_labels for pair in pairs)
