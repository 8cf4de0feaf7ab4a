"""GridReg on pelvic MR of different patients, with organ masks (the paper's data set 2).

    python train.py --config=configs/pelvis.py --config.data.pairs=pairs.csv
    python train.py --config=configs/pelvis.py:cpu --config.data.pairs=pairs.csv   # half the resolution
    python train.py --config=configs/pelvis.py:cpu,voxelmorph --config.data.pairs=pairs.csv   # another system
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    variant, model = default.parse("pelvis", argument, ("paper", "cpu"))
    config = default.get_config()
    config.name = "pelvis"
    config.data.center = "image"
    config.data.cohort_subjects = (0, 0, 0)
    config.data.evaluation_pairs = (58, 59)
    config.loss.dice = 1.0
    if variant == "paper":
        # 1 mm (section 4.1); the paper states no input size, this one takes in the prostate and what is around it.
        config.data.shape = (128, 128, 96)
        config.data.spacing = (1.0, 1.0, 1.0)
        default.paper(config, training_pairs=313)
    else:
        config.data.shape = (64, 64, 48)
        config.data.spacing = (2.0, 2.0, 2.0)
        config.model.downsampled = 3
        config.loss.bending = 1.0
        config.steps = 1000
        config.val_every = 500
    return default.use_model(config, model)
