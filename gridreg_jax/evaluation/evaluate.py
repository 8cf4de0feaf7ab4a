"""Evaluate a trained run, or a system that needs no training: tables, summary and pictures."""

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import numpy as np
from ml_collections import ConfigDict

from gridreg_jax.baselines import SYSTEMS
from gridreg_jax.baselines.program import Program
from gridreg_jax.cores import cores
from gridreg_jax.data import nifti
from gridreg_jax.data.pipeline import Dataset, open_dataset, open_pairs
from gridreg_jax.errors import InputError, check_known
from gridreg_jax.evaluation import plots, tables
from gridreg_jax.files import default_cache_dir, replacing
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.measure import (
    GridSize,
    check_fits,
    coarsest_sufficient,
    make_predict,
    measure,
    measure_function,
    summarise,
)
from gridreg_jax.models import has_control_grid
from gridreg_jax.training.trained import in_use, load_trained
from gridreg_jax.training.writers import read_metrics


def evaluate(
    workdir: str | Path,
    *,
    pairs: str = "",
    grid_size: tuple[int, int, int] | Literal["auto"] | None = None,
    refine: int | None = None,
    out: str | Path | None = None,
    pictures: int = 3,
    notify: Callable[[str], None] = print,
) -> dict:
    """Evaluate the best checkpoint of a run and write `cases.csv`, `summary.json` and pictures.

    With a Bayesian head, also `sigmaNN.nii.gz` for every case: the standard deviation of the displacement in mm, on the
    working lattice of the fixed image.

    Args:
      workdir: of a run of `train.py`.
      pairs: a list of pairs (CSV); empty: the run's own test pairs.
      grid_size: None: the one that validation chose, if the run's model predicts a control grid; "auto": for every case
        the coarsest of the run's sizes that is about as good as the best, judged by the run's image similarity
        (`measure.coarsest_sufficient`).
      refine: steps of instance optimisation after the network; None: as the run's config says (`refinement.steps`).
      out: folder for the results; None: `workdir/evaluation`.
      pictures: for how many cases pictures are drawn.
      notify: takes the terminal's lines.

    Returns:
      The summary.

    Raises:
      InputError: no run is there, or a list, an image or the grid size is not as it should be; a grid size or instance
        optimisation for a model that predicts no control grid.
    """
    workdir = Path(workdir)
    out = Path(out) if out else workdir / "evaluation"
    trained = load_trained(workdir, notify=notify)
    model, config = trained.model, trained.config
    if not has_control_grid(model):
        for option, value in (("grid_size", grid_size), ("refine", refine)):
            if value:
                raise InputError(f"--{option}: the run's model, {config['model']['name']}, predicts no control grid")
    dataset = _open(config, pairs, notify)
    if grid_size is None:
        grid_size = trained.grid_size
    elif grid_size != "auto":
        check_fits(grid_size, dataset.lattice.shape)
    refinement = config["refinement"] | ({} if refine is None else {"steps": refine})
    predict = make_predict(model, refinement=refinement)
    choice = grid_size
    if grid_size == "auto":
        similarity = SIMILARITIES[config["loss"]["similarity"]]
        choice = coarsest_sufficient(predict, trained.params, config["grid_sizes"], similarity)
    about = {"refinement_steps": refinement["steps"]}
    with in_use(workdir):  # while cases are written: each is measured when its turn comes
        measured = measure(predict, trained.params, dataset, dataset.pairs["test"], choice, thorough=True)
        summary = _write(out, measured, dataset, grid_size, about, pictures, notify)
    lines = read_metrics(workdir)
    if lines:
        plots.loss_curves(out / "loss.png", lines)
    return summary


def evaluate_system(
    system: str,
    config: ConfigDict,
    *,
    out: str | Path,
    pairs: str = "",
    pictures: int = 3,
    notify: Callable[[str], None] = print,
) -> dict:
    """Evaluate a system that needs no training as `evaluate` does a run, on the same lattice and the same pairs.

    Args:
      system: a name in `baselines.SYSTEMS`.
      config: of which data and seed count.
      out: folder for the results.
      pairs, pictures, notify: see `evaluate`.

    Returns:
      The summary; its `threads` are those that the system was given.

    Raises:
      InputError: there is no such system, what it needs is not installed, or the data are not as they should be.
    """
    check_known("--system", system, SYSTEMS)
    if isinstance(SYSTEMS[system], Program):
        SYSTEMS[system].version()  # is it installed?
    config = config.to_dict()
    dataset = _open(config, pairs, notify)
    # The lattice of every image has a world of its own; what is common to them is its spacing.
    affine = np.diag([*dataset.lattice.spacing, 1.0])
    cache_dir = Path(config["data"]["cache_dir"] or default_cache_dir())
    register = functools.partial(SYSTEMS[system], affine=affine, seed=config["seed"], cache_dir=cache_dir)
    measured = measure_function(register, dataset, dataset.pairs["test"])
    return _write(Path(out), measured, dataset, None, {"system": system, "threads": cores()}, pictures, notify)


def _open(config: dict, pairs: str, notify: Callable[[str], None]) -> Dataset:
    """A list of pairs, or else a config's own data."""
    data = config["data"]
    if pairs:
        settings = {name: data[name] for name in ("shape", "spacing", "center", "labels", "cache_dir")}
        return open_pairs(pairs, **settings, notify=notify)
    return open_dataset(**data, seed=config["seed"], notify=notify)


def _write(
    out: Path,
    measured: Iterable[tuple[dict, dict[str, np.ndarray]]],
    dataset: Dataset,
    grid_size: GridSize | Literal["auto"],
    about: dict,
    pictures: int,
    notify: Callable[[str], None],
) -> dict:
    """Tables and pictures of measured test pairs, and the summary with what else is to be said (`about`)."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (row, arrays) in enumerate(measured):
        rows.append(row)
        if number < pictures:
            title = f"{row['fixed']} and {row['moving']}"
            if grid_size:
                title += f", grid {row.get('grid_size') or 'x'.join(map(str, grid_size))}"
            plots.case_picture(out / f"case{number:02d}.png", arrays, dataset.lattice.spacing, title)
        if "sigma_mm" in arrays:
            fixed = dataset.pairs["test"][number][0]
            nifti.save(out / f"sigma{number:02d}.nii.gz", arrays["sigma_mm"], dataset.sources[fixed].load().affine)
    tables.write_cases(out / "cases.csv", rows)
    summary = summarise(rows, grid_size) | about
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    notify(tables.format_summary(summary))
    notify(f"written to {out}: cases.csv, summary.json, {min(pictures, len(rows))} case pictures")
    return summary
