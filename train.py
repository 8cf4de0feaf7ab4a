"""Train and evaluate: `python train.py --config=configs/brain.py [--workdir=runs/brain]`."""

from absl import flags
from ml_collections import config_flags

from gridreg_jax.doorway import main

CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; by default runs/<name of the config>.")
flags.mark_flag_as_required("config")


def run(_) -> None:
    from gridreg_jax.evaluation.evaluate import evaluate
    from gridreg_jax.training.loop import fit

    workdir = WORKDIR.value or f"runs/{CONFIG.value.name}"
    if fit(CONFIG.value, workdir):
        evaluate(workdir)


if __name__ == "__main__":
    main(run)
