"""Several systems trained and evaluated alike, and one table of them."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gridreg_jax.evaluation import tables
from gridreg_jax.evaluation.evaluate import evaluate
from gridreg_jax.measure import make_predict
from gridreg_jax.memory import bytes_needed
from gridreg_jax.training.loop import fit
from gridreg_jax.training.trained import load_trained

COLUMNS = ("dice", "tre_mm", "centroid_mm", "folding_percent", "sd_log_jacobian")


def compare(
    stages: dict[str, list[ConfigDict]], workdir: str | Path, *, notify: Callable[[str], None] = print
) -> list[dict] | None:
    """Train and evaluate every system in a folder of its own, and write `comparison.csv`.

    What is trained already is only evaluated, so that a comparison that was stopped goes on.

    Args:
      stages: by name, the config of its training, as `fit` takes it, or those of a pre-training and of the training
        that begins with the parameters of that. The pre-training is kept in the folder `before` of the system's.

    Returns:
      A row a system: parameters, means over the test cases, memory and seconds of a prediction; None when stopped.

    Raises:
      InputError: as `fit` and `evaluate`.
    """
    rows = []
    for name, configs in stages.items():
        notify(f"--- {name}")
        folder, start = Path(workdir) / name, ""
        for config, place in zip(configs, (folder / "before", folder)[-len(configs) :], strict=True):
            config.start = start
            if not fit(config, place):
                return None
            start = str(place)
        summary = evaluate(folder, notify=notify)
        row = {"system": name} | _cost(folder, summary["grid_size"], notify)
        row |= {column: summary["metrics"][column]["after"] for column in COLUMNS if column in summary["metrics"]}
        rows.append(row | {"seconds": summary["metrics"]["seconds"]["after"]})
        tables.write_cases(Path(workdir) / "comparison.csv", rows)
    notify(tables.format_rows(rows))
    return rows


def _cost(workdir: Path, grid_size: list[int] | None, notify: Callable[[str], None]) -> dict:
    """Parameters, and memory of a prediction (MiB) as the compiled program tells it."""
    trained = load_trained(workdir, notify=notify)
    image = jax.ShapeDtypeStruct((1, *trained.config["data"]["shape"], 1), jnp.float32)
    predict = make_predict(trained.model, refinement=trained.config["refinement"])
    grid_size = grid_size and tuple(grid_size)
    compiled = predict.lower(trained.params, {"fixed": image, "moving": image}, grid_size).compile()
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "memory_mib": round(bytes_needed(compiled) / 2**20, 1),
    }
