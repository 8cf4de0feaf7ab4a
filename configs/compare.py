"""Every learned system on one data set, under one budget: the hippocampus's by default.

    python train.py --config=configs/compare.py --config.data.subjects=subjects.csv
    python train.py --config=configs/compare.py:cpu --config.data.subjects=subjects.csv    # five, 1000 steps each, 2 mm
    python train.py --config=configs/compare.py --config.data.subjects=subjects.csv \\
        --config.systems="('gridreg','voxelmorph')"

All take the same data, similarity, overlap, augmentation and number of steps; none has a segmenter, a penalty on
folding or instance optimisation. Each keeps its authors' smoothness; the optimiser is Adam along a cosine for all,
since the authors' rates are for trainings a hundred times as long, with a rate for each; only GridReg's is tuned.
KeyMorph spends half of its steps on its authors' pre-training.
"""

from ml_collections import ConfigDict

from configs import default, hippocampus
from configs.models import MODELS

LEARNING_RATES = {"gridreg": 2e-3}
OTHERS = 1e-3
# One of each kind.
FAMILIES = ("gridreg", "lightcrcf", "voxelmorph", "transmorph", "keymorph")
PRETRAINING = {"keymorph": "keymorph_pretrain"}


def get_config(argument: str = "") -> ConfigDict:
    variant, model = default.parse("compare", argument, ("", "cpu"))
    if model:
        raise ValueError(f"configs/compare.py:{argument}: --config.systems says which systems are compared")
    config = hippocampus.get_config()
    config.name = "compare"
    config.model.segmenter = 0
    config.loss.folding = 0.0
    if variant == "cpu":
        config.data.shape = (24, 32, 24)
        config.data.spacing = (2.0, 2.0, 2.0)
        config.steps = 1000
        config.val_every = 500
    config.refinement.steps = 0
    config.optimizer.name = "adam"
    every = ("gridreg", *(name for name in MODELS if name not in PRETRAINING.values()))
    config.systems = FAMILIES if variant == "cpu" else every
    return config


def stages_of(config: ConfigDict, system: str) -> list[ConfigDict]:
    """The configs of a system's trainings, once all options are set: each begins where the one before it ended.

    Raises:
      ValueError: there is no such system, or it has more trainings than steps.
    """
    if system not in ("gridreg", *MODELS):
        raise ValueError(f"systems: {system!r} is not known; known are gridreg, {', '.join(MODELS)}")
    names = [PRETRAINING[system], system] if system in PRETRAINING else [system]
    if config.steps < len(names):
        raise ValueError(f"steps is {config.steps}: {system} needs {len(names)} or more, also for its pre-training")
    stages = [_config_of(config, name) for name in names]
    for stage in stages:
        stage.steps = config.steps // len(stages)
    return stages


def _config_of(config: ConfigDict, system: str) -> ConfigDict:
    one = config.copy_and_resolve_references().unlock()
    del one["systems"]
    optimizer = one.optimizer.copy_and_resolve_references()
    one = default.use_model(one, "" if system == "gridreg" else system)
    one.optimizer = optimizer
    one.optimizer.learning_rate = LEARNING_RATES.get(system, OTHERS)
    return one
