"""Every learned system on one data set, under one budget: the hippocampus's by default.

    python train.py --config=configs/compare.py --config.data.subjects=subjects.csv
    python train.py --config=configs/compare.py:cpu --config.data.subjects=subjects.csv \\
        --config.systems="('gridreg','voxelmorph')"

All take the same data, similarity, overlap, augmentation and number of steps, and no instance optimisation. Each keeps
its authors' smoothness; the optimiser is GridReg's for all, since the authors' rates are for trainings a hundred times
as long, with a rate for each that is not tuned.
"""

from ml_collections import ConfigDict

from configs import default, hippocampus
from configs.models import MODELS

LEARNING_RATES = {"gridreg": 2e-3}
OTHERS = 1e-3


def get_config(argument: str = "") -> ConfigDict:
    config = hippocampus.get_config(argument)
    config.name = "compare"
    config.refinement.steps = 0
    config.systems = ("gridreg", *(name for name in MODELS if name != "keymorph_pretrain"))
    return config


def config_of(config: ConfigDict, system: str) -> ConfigDict:
    """The config of one of the systems, once all options are set.

    Raises:
      ValueError: there is no such system.
    """
    if system not in ("gridreg", *MODELS):
        raise ValueError(f"systems: {system!r} is not known; known are gridreg, {', '.join(MODELS)}")
    one = config.copy_and_resolve_references().unlock()
    del one["systems"]
    optimizer = one.optimizer.copy_and_resolve_references()
    one = default.use_model(one, "" if system == "gridreg" else system)
    one.optimizer = optimizer
    one.optimizer.learning_rate = LEARNING_RATES.get(system, OTHERS)
    return one
