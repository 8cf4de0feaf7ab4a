"""Where pairs come from: the embedded cohort, a list of subjects or a list of pairs, and batches of them by step."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from gridreg_jax import geometry
from gridreg_jax.data import cohort, lists
from gridreg_jax.data.nifti import load_landmarks
from gridreg_jax.data.preprocess import Lattice, Prepared, prepare
from gridreg_jax.errors import InputError
from gridreg_jax.files import default_cache_dir, replacing
from gridreg_jax.rng import generator

PREPARED = tuple(field.name for field in dataclasses.fields(Prepared))


@dataclasses.dataclass(frozen=True)
class Source:
    """One image: a name for tables, its lattice arrays on demand, its landmarks by number (voxels of the lattice)."""

    name: str
    load: Callable[[], Prepared]
    landmarks: Callable[[], dict[int, np.ndarray]] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Sources and how they pair up.

    Attributes:
      sources: all images.
      pairs: for each split, (fixed, moving) indices into `sources`.
      train_subjects: where training pairs are drawn from, any two different ones; empty: from `pairs["train"]`.
      lattice: the working lattice of all of them.
      label_values: the label values of all sources, increasing, without 0; compact label k is `label_values[k - 1]`.
      partial: whether the field of view of any source leaves a part of the lattice unknown.
    """

    sources: tuple[Source, ...]
    pairs: dict[str, list[tuple[int, int]]]
    train_subjects: tuple[int, ...]
    lattice: Lattice
    label_values: tuple[int, ...]
    partial: bool

    @property
    def has_labels(self) -> bool:
        return bool(self.label_values)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """A random training pair (fixed, moving)."""
        if self.train_subjects:
            fixed, moving = rng.choice(len(self.train_subjects), 2, replace=False)
            return self.train_subjects[fixed], self.train_subjects[moving]
        return self.pairs["train"][rng.integers(len(self.pairs["train"]))]

    def of_one_subject(self) -> "Dataset":
        """The same, but the only training pair is the first training image with itself."""
        first = self.train_subjects[0] if self.train_subjects else self.pairs["train"][0][0]
        return dataclasses.replace(self, train_subjects=(), pairs=self.pairs | {"train": [(first, first)]})

    def arrays(self, chosen: list[tuple[int, int]], *, known: bool = False) -> dict[str, np.ndarray]:
        """Stacked arrays of pairs: `fixed`, `moving` `[N, X, Y, Z, 1]` and, if there are any, compact
        `fixed_labels`, `moving_labels` `[N, X, Y, Z]`; with `known`, unless all is known of all sources, also
        `fixed_known`, `moving_known` `[N, X, Y, Z]`."""
        batch = {}
        for side, name in enumerate(("fixed", "moving")):
            loaded = [self.sources[pair[side]].load() for pair in chosen]
            batch[name] = np.stack([case.image for case in loaded])[..., None]
            if self.has_labels:
                batch[f"{name}_labels"] = np.stack([self._compact(case.labels) for case in loaded])
            if known and self.partial:
                batch[f"{name}_known"] = np.stack([case.known for case in loaded])
        return batch

    def landmarks(self, pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
        """Matching landmarks `[K, 3]` of a pair, (fixed, moving), in voxels of the lattice; None without."""
        fixed, moving = (self.sources[index].landmarks for index in pair)
        if fixed is None or moving is None:
            return None
        fixed, moving = fixed(), moving()
        common = sorted(fixed.keys() & moving.keys())
        if not common:
            names = " and ".join(self.sources[index].name for index in pair)
            raise InputError(f"landmarks of {names}: no number is in both")
        return np.stack([fixed[i] for i in common]), np.stack([moving[i] for i in common])

    def _compact(self, labels: np.ndarray) -> np.ndarray:
        values = np.array((0, *self.label_values))
        index = np.clip(np.searchsorted(values, labels), 0, len(values) - 1)
        # A value that is not scored counts as background.
        return np.where(values[index] == labels, index, 0).astype(np.int32)


def open_dataset(
    *,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    center: str = "mass",
    pairs: str = "",
    subjects: str = "",
    labels: tuple[int, ...] = (),
    cohort_subjects: tuple[int, int, int] = (24, 4, 6),
    evaluation_pairs: tuple[int, int] = (8, 16),
    seed: int = 0,
    cache_dir: str | Path = "",
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Open one of the three kinds of data; every image is prepared once, so that a bad one is found before training.

    Args:
      shape, spacing, center: the working lattice (see `preprocess.Lattice`); the cohort has one of its own.
      pairs: a list of pairs (CSV); subjects: a list of subjects (CSV); neither: the embedded cohort.
      labels: label values to score; empty: all that occur.
      cohort_subjects: training, validation and test subjects of the cohort.
      evaluation_pairs: how many validation and test pairs are drawn among subjects, at most.
      seed: of the cohort, of the splits and of the drawn pairs.
      cache_dir: where prepared images are kept; empty: `files.default_cache_dir()`.
      notify: told, in a line, what the user should know of a choice made here.

    Raises:
      InputError: both lists are given, or a file, a row or an image of them is not as it should be.
    """
    cache_dir = Path(cache_dir or default_cache_dir())
    lattice = Lattice(tuple(shape), tuple(spacing), center)
    if pairs and subjects:
        raise InputError("data.pairs and data.subjects exclude each other: give one of them")
    for name, given, count in (("cohort_subjects", cohort_subjects, 3), ("evaluation_pairs", evaluation_pairs, 2)):
        if len(given) != count:
            raise InputError(f"data.{name} must be {count} whole numbers, not {given}")
    if min(evaluation_pairs) < 1:
        raise InputError(f"data.evaluation_pairs is {evaluation_pairs}: give 1 or more of each")
    if pairs:
        listed = lists.assign_splits(lists.read_pairs(pairs), seed=seed)
        sources, pairs_by_split = _from_pairs(listed, lattice, cache_dir)
        train_subjects = ()
        if not pairs_by_split["train"]:
            raise InputError(f"{pairs}: no pair is in split 'train'")
    else:
        if subjects:
            listed = lists.assign_splits(lists.read_subjects(subjects), seed=seed)
            sources = [_file_source(s.image, s.labels, s.landmarks, lattice, cache_dir) for s in listed]
            splits = [s.split for s in listed]
        else:
            if (lattice.shape, lattice.spacing) != (cohort.SHAPE, (cohort.SPACING_MM,) * 3):
                raise InputError(
                    f"the embedded cohort has {cohort.SHAPE} voxels of {cohort.SPACING_MM} mm, not data.shape "
                    f"{lattice.shape} and data.spacing {lattice.spacing}; give data.pairs or data.subjects for another"
                )
            splits = [name for name, count in zip(lists.SPLITS, cohort_subjects, strict=True) for _ in range(count)]
            sources = [_cohort_source(seed, index, cache_dir) for index in range(len(splits))]
        by_split = {name: [i for i, split in enumerate(splits) if split == name] for name in lists.SPLITS}
        if len(by_split["train"]) < 2:
            where = subjects or "data.cohort_subjects"
            raise InputError(f"{where}: training draws pairs of subjects, so at least 2 are needed in split 'train'")
        train_subjects = tuple(by_split["train"])
        pairs_by_split = {
            name: _draw_pairs(by_split[name], count, generator(seed, f"{name} pairs"))
            for name, count in zip(("val", "test"), evaluation_pairs, strict=True)
        }
        pairs_by_split["train"] = []
    pairs_by_split = _complete(pairs_by_split, train_subjects, evaluation_pairs, seed, notify)
    return _dataset(sources, pairs_by_split, train_subjects, lattice, labels, notify)


def open_pairs(
    pairs_csv: str | Path,
    *,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    center: str = "mass",
    labels: tuple[int, ...] = (),
    cache_dir: str | Path = "",
    notify: Callable[[str], None] = print,
) -> Dataset:
    """A list of pairs to evaluate: its rows of split "test" if it has any, else all of them (see `open_dataset`)."""
    lattice = Lattice(tuple(shape), tuple(spacing), center)
    listed = lists.read_pairs(pairs_csv)
    listed = [pair for pair in listed if pair.split == "test"] or listed
    listed = [dataclasses.replace(pair, split="test") for pair in listed]
    sources, pairs_by_split = _from_pairs(listed, lattice, Path(cache_dir or default_cache_dir()))
    return _dataset(sources, pairs_by_split, (), lattice, labels, notify)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    part: tuple[int, int] = (0, 1),
    place: Callable[[dict[str, np.ndarray]], dict] = lambda batch: batch,
) -> Iterator[dict]:
    """Training batches of steps start to stop - 1, prepared ahead by threads; a batch is a function of (seed, step).

    Args:
      batch_size: pairs in a whole batch.
      part: (i, n): the i-th of n equal parts of every batch, in order.
      place: what the threads do with a batch at last: bring it to the devices.
    """
    import grain  # heavy, and only training needs it

    size = batch_size // part[1]
    mine = slice(part[0] * size, (part[0] + 1) * size)

    def batch(step: int) -> dict:
        rng = generator(seed, "training pairs", step)
        return place(dataset.arrays([dataset.draw(rng) for _ in range(batch_size)][mine]))

    source = grain.MapDataset.range(start, stop).map(batch)
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def _dataset(sources, pairs_by_split, train_subjects, lattice, labels, notify) -> Dataset:
    """Prepare every source once and settle which labels are scored."""
    found, unlabelled, partial = set(), [], False
    for source in sources:
        prepared = source.load()
        partial |= not prepared.known.all()
        values = prepared.labels
        if values is None:
            unlabelled.append(source.name)
        else:
            found.update(np.unique(values).tolist())
    found.discard(0)
    if unlabelled and found:
        notify(f"labels are not used: {unlabelled[0]} and {len(unlabelled) - 1} more images have none")
        found = set()
    if found and set(labels) - found:
        raise InputError(f"data.labels: no image has label {min(set(labels) - found)}; found are {sorted(found)}")
    values = tuple(sorted(found & set(labels) if labels else found))
    return Dataset(tuple(sources), pairs_by_split, train_subjects, lattice, values, partial)


def _complete(pairs_by_split, train_subjects, evaluation_pairs, seed: int, notify) -> dict[str, list[tuple[int, int]]]:
    """Fill empty validation and test splits, and say so."""
    filled = dict(pairs_by_split)
    if not filled["val"]:
        if train_subjects:
            filled["val"] = _draw_pairs(train_subjects, evaluation_pairs[0], generator(seed, "val pairs"))
        else:
            filled["val"] = filled["train"][: evaluation_pairs[0]]
        notify("no validation data: the grid size is chosen on training pairs (rows with split 'val' mend it)")
    if not filled["test"]:
        filled["test"] = filled["val"]
        notify("no test data: the evaluation at the end uses the validation pairs (rows with split 'test' mend it)")
    return filled


def _draw_pairs(subjects: Sequence[int], count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """`count` different ordered pairs of subjects (or all there are), in random order."""
    ordered = [(fixed, moving) for fixed in subjects for moving in subjects if fixed != moving]
    return [ordered[index] for index in rng.permutation(len(ordered))[:count]]


def _from_pairs(listed: list[lists.Pair], lattice: Lattice, cache_dir: Path):
    """One source for each different (image, labels, landmarks) of a list of pairs."""
    index: dict[tuple, int] = {}
    sources, by_split = [], {name: [] for name in lists.SPLITS}
    for pair in listed:
        sides = []
        for files in (
            (pair.fixed, pair.fixed_labels, pair.fixed_landmarks),
            (pair.moving, pair.moving_labels, pair.moving_landmarks),
        ):
            if files not in index:
                index[files] = len(sources)
                sources.append(_file_source(*files, lattice, cache_dir))
            sides.append(index[files])
        by_split[pair.split].append(tuple(sides))
    return sources, by_split


def _file_source(image: Path, labels: Path | None, landmarks: Path | None, lattice: Lattice, cache_dir: Path) -> Source:
    def load() -> Prepared:
        return prepare(image, lattice, labels_path=labels, cache_dir=cache_dir)

    def load_points() -> dict[int, np.ndarray]:
        affine = load().affine
        return {number: geometry.world_to_voxel(point, affine) for number, point in load_landmarks(landmarks).items()}

    return Source(image.name.removesuffix(".gz").removesuffix(".nii"), load, load_points if landmarks else None)


def _cohort_source(seed: int, index: int, cache_dir: Path) -> Source:
    text = repr((cohort.VERSION, seed, index))
    entry = cache_dir / f"cohort-{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def arrays() -> dict[str, np.ndarray]:
        try:
            with np.load(entry) as stored:
                return {name: stored[name] for name in (*PREPARED, "landmarks")}
        except Exception:  # none, or one that is damaged in one of many ways: it is made again
            prepared, landmarks = cohort.subject(index, seed=seed)
            made = dataclasses.asdict(prepared) | dict(landmarks=landmarks)
            with replacing(entry) as temporary:
                np.savez(temporary, **made)
            return made

    def load() -> Prepared:
        stored = arrays()
        return Prepared(**{name: stored[name] for name in PREPARED})

    return Source(f"subject{index:02d}", load, lambda: dict(enumerate(arrays()["landmarks"])))
