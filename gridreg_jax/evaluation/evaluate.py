"""Evaluate a trained run: tables, summary and pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gridreg_jax.data import nifti
from gridreg_jax.data.pipeline import open_dataset, open_pairs
from gridreg_jax.errors import InputError
from gridreg_jax.evaluation import plots, tables
from gridreg_jax.files import replacing
from gridreg_jax.losses import SIMILARITIES
from gridreg_jax.measure import coarsest_sufficient, make_predict, measure, summarise
from gridreg_jax.models import has_control_grid
from gridreg_jax.training.trained import load_trained
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

    With a Bayesian head, also `sigmaNN.nii.gz` for every case that has a picture: the standard deviation of the
    displacement in mm, on the working lattice of the fixed image.

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
    data = config["data"]
    if pairs:
        settings = {name: data[name] for name in ("shape", "spacing", "center", "labels", "cache_dir")}
        dataset = open_pairs(pairs, **settings, notify=notify)
    else:
        dataset = open_dataset(**data, seed=config["seed"], notify=notify)
    if grid_size is None:
        grid_size = trained.grid_size
    out.mkdir(parents=True, exist_ok=True)

    rows = []
    refinement = config["refinement"] | ({} if refine is None else {"steps": refine})
    predict = make_predict(model, refinement=refinement if refinement["steps"] else None)
    choice = grid_size
    if grid_size == "auto":
        similarity = SIMILARITIES[config["loss"]["similarity"]]
        choice = coarsest_sufficient(predict, trained.params, config["grid_sizes"], similarity)
    measured = measure(predict, trained.params, dataset, dataset.pairs["test"], choice, thorough=True)
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
    summary = summarise(rows, grid_size) | {"refinement_steps": refinement["steps"]}
    with replacing(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1) + "\n")
    lines = read_metrics(workdir)
    if lines:
        plots.loss_curves(out / "loss.png", lines)
    notify(tables.format_summary(summary))
    notify(f"written to {out}: cases.csv, summary.json, {min(pictures, len(rows))} case pictures, loss.png")
    return summary
