"""Lists of what to register: CSV files of subjects or of pairs.

Paths in a list are relative to the list's own folder, so that a data set can be moved as a whole. Columns that are not
known are ignored. Rows are counted as a spreadsheet does: the header is row 1.
"""

import csv
import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from gridreg_jax.errors import InputError, check_known
from gridreg_jax.rng import generator

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One image with what is known of it."""

    image: Path
    labels: Path | None = None
    split: str | None = None
    landmarks: Path | None = None


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two images to register; labels and landmarks are there for both images or for neither."""

    fixed: Path
    moving: Path
    fixed_labels: Path | None = None
    moving_labels: Path | None = None
    fixed_landmarks: Path | None = None
    moving_landmarks: Path | None = None
    split: str | None = None


Item = TypeVar("Item", Subject, Pair)


def read_subjects(csv_path: str | Path) -> list[Subject]:
    """Subjects of a CSV file with the column `image` and, optionally, `labels`, `landmarks` and `split`.

    Raises:
      InputError: the file, a column, or an image, label or landmark file is missing; the list is empty; an image is
        listed twice (it would leak from one split into another); a split is none of `SPLITS`.
    """
    subjects, rows = _read_items(Subject, csv_path)
    first_row = {}
    for subject, row in zip(subjects, rows, strict=True):
        if subject.image in first_row:
            earlier = first_row[subject.image]
            raise InputError(f"{csv_path}: row {row}: image {subject.image} is in row {earlier} already")
        first_row[subject.image] = row
    return subjects


def read_pairs(csv_path: str | Path) -> list[Pair]:
    """Pairs of a CSV file with the columns `fixed` and `moving` and, optionally, the other fields of `Pair`.

    Raises:
      InputError: the file, a column, or an image, label or landmark file is missing; the list is empty; labels or
        landmarks are given for one image of a pair only; a split is none of `SPLITS`.
    """
    pairs, rows = _read_items(Pair, csv_path)
    for pair, row in zip(pairs, rows, strict=True):
        for kind in ("labels", "landmarks"):
            given = [side for side in ("fixed", "moving") if getattr(pair, f"{side}_{kind}")]
            if len(given) == 1:
                raise InputError(f"{csv_path}: row {row}: {kind} of the {given[0]} image only; give both or neither")
    return pairs


def assign_splits(items: Sequence[Item], *, seed: int) -> list[Item]:
    """The same items in the same order, each with a split: a pure function of the seed and the order.

    When no item has a split, a seeded shuffle gives about 10 % to "val", 20 % to "test" and the rest to "train"; of
    subjects, each split gets two at least, since pairs are drawn inside a split. Fewer than six items are all "train".
    When some items have a split, it is kept, and the others become "train".

    Pairs are shuffled as pairs: two pairs that share an image may come into different splits.
    """
    if len(items) < 6 or any(item.split for item in items):
        return [dataclasses.replace(item, split=item.split or "train") for item in items]
    least = 2 if isinstance(items[0], Subject) else 1
    val, test = (max(least, round(share * len(items))) for share in (0.1, 0.2))
    splits = ["val"] * val + ["test"] * test + ["train"] * (len(items) - val - test)
    order = generator(seed, "split").permutation(len(items))
    return [dataclasses.replace(item, split=splits[place]) for item, place in zip(items, order, strict=True)]


def read_table(
    csv_path: str | Path, *, required: Sequence[str], optional: Sequence[str] = ()
) -> list[tuple[int, dict[str, str]]]:
    """Rows of a CSV file with a header, each with its row number; cells are stripped, empty rows left out.

    Args:
      csv_path: a comma-separated file in UTF-8.
      required: columns that must be there.
      optional: columns that may be there; a column that looks like a misspelt one of them is an error.

    Raises:
      InputError: there is no such file, it is not such text, a required column is missing, a column is there twice, a
        row has more cells than the header, or no row is left.
    """
    try:
        with open(csv_path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except OSError as error:
        raise InputError(f"{csv_path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{csv_path}: is not a CSV file in UTF-8 ({error})") from error

    (_, columns), *rows = [(number, row) for number, row in rows if any(row)] or [(1, [])]
    _check_columns(csv_path, columns, required=required, optional=optional)
    table = []
    for number, row in rows:
        if len(row) > len(columns):
            raise InputError(
                f"{csv_path}: row {number}: more cells than the header's {len(columns)}; quote text that has a comma"
            )
        table.append((number, dict(itertools.zip_longest(columns, row, fillvalue=""))))
    if not table:
        raise InputError(f"{csv_path}: the list is empty: a header and at least one row are needed")
    return table


def _check_columns(csv_path, columns: list[str], *, required: Sequence[str], optional: Sequence[str]) -> None:
    found = ", ".join(columns) or "none"
    unknown = [name for name in columns if name not in required and name not in optional]
    for name in required:
        if name not in columns:
            near = difflib.get_close_matches(name, unknown, n=1)
            hint = f"; should '{near[0]}' be '{name}'?" if near else ""
            needed = ", ".join(required)
            raise InputError(f"{csv_path}: column '{name}' is missing (needed: {needed}; found: {found}){hint}")
    for name in (*required, *optional):
        if columns.count(name) > 1:
            raise InputError(f"{csv_path}: column '{name}' is there {columns.count(name)} times")
    # A misspelt optional column would be ignored in silence, and every label with it.
    for name in unknown:
        near = difflib.get_close_matches(name, [other for other in optional if other not in columns], n=1, cutoff=0.85)
        if near:
            raise InputError(f"{csv_path}: column '{name}' is not known; should it be '{near[0]}'?")


def _read_items(kind: type[Item], csv_path: str | Path) -> tuple[list[Item], list[int]]:
    """The items of a list with the row number of each: splits are valid and all files exist."""
    csv_path = Path(csv_path)
    fields = dataclasses.fields(kind)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    optional = [field.name for field in fields if field.name not in required]
    items, numbers, missing = [], [], []
    for number, row in read_table(csv_path, required=required, optional=optional):
        cells = {field.name: row.get(field.name) or None for field in fields}
        for name in required:
            if not cells[name]:
                raise InputError(f"{csv_path}: row {number}: the cell of column '{name}' is empty")
        split = cells.pop("split")
        if split:
            check_known(f"{csv_path}: row {number}: split", split, SPLITS)
        paths = {name: csv_path.parent / cell for name, cell in cells.items() if cell}
        missing += [f"row {number}: {name}: no such file: {path}" for name, path in paths.items() if not path.is_file()]
        items.append(kind(**paths, split=split))
        numbers.append(number)
    if missing:
        more = f" (and {len(missing) - 1} more missing files)" if len(missing) > 1 else ""
        raise InputError(f"{csv_path}: {missing[0]}{more}")
    return items, numbers
