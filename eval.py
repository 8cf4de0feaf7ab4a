"""Evaluate: `python eval.py --workdir=runs/brain [--pairs=pairs.csv] [--grid_size=10] [--refine=40] [--out=FOLDER]`.

With `--system=ants_syn --config=configs/brain.py` in place of `--workdir`: a system that needs no training.
"""

from absl import flags
from ml_collections import config_flags

from gridreg_jax.doorway import main
from gridreg_jax.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run of train.py.")
SYSTEM = flags.DEFINE_string(
    "system", None, "Instead of a run, a system that needs no training: ncf, ants_syn, ants_syncc, greedy."
)
CONFIG = config_flags.DEFINE_config_file("config", None, "With --system: the config of the data.", lock_config=True)
PAIRS = flags.DEFINE_string("pairs", "", "List of pairs (CSV); by default the test pairs of the run or the config.")
GRID_SIZE = flags.DEFINE_list(
    "grid_size", [], "Control points an axis, e.g. 10 or 8,10,8; auto; by default as validated."
)
REFINE = flags.DEFINE_integer(
    "refine", None, "Steps of instance optimisation; by default as the run's config says (refinement.steps).", 0
)
OUT = flags.DEFINE_string("out", "", "Folder for the results; by default WORKDIR/evaluation or runs/CONFIG_SYSTEM.")


def parse_grid_size(values: list[str]) -> tuple[int, int, int] | str | None:
    """`["10"]` or `["8", "10", "8"]` as a triple; "auto" for itself; None for an empty list."""
    if not values:
        return None
    if values == ["auto"]:
        return "auto"
    if len(values) not in (1, 3) or not all(value.strip().isdecimal() for value in values):
        raise InputError(f"--grid_size={','.join(values)}: give one whole number, three, or auto, e.g. 10 or 8,10,8")
    sizes = tuple(int(value) for value in values)
    return sizes * 3 if len(sizes) == 1 else sizes


def run(_) -> None:
    from gridreg_jax.evaluation.evaluate import evaluate, evaluate_system

    if (WORKDIR.value is None) == (SYSTEM.value is None):
        raise InputError("give either --workdir (of a run of train.py) or --system (one that needs no training)")
    if (SYSTEM.value is None) != (CONFIG.value is None):
        raise InputError("--system and --config go together; a run of --workdir has its own config")
    if SYSTEM.value:
        if GRID_SIZE.value or REFINE.value is not None:
            raise InputError(f"--grid_size and --refine: {SYSTEM.value} has no control grid")
        out = OUT.value or f"runs/{CONFIG.value.name}_{SYSTEM.value}"
        evaluate_system(SYSTEM.value, CONFIG.value, pairs=PAIRS.value, out=out)
        return
    evaluate(
        WORKDIR.value,
        pairs=PAIRS.value,
        grid_size=parse_grid_size(GRID_SIZE.value),
        refine=REFINE.value,
        out=OUT.value,
    )


if __name__ == "__main__":
    main(run)
