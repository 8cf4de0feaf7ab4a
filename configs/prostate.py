"""GridReg on prostate MR of one patient at two visits, with gland masks (the paper's data set 1).

    python train.py --config=configs/prostate.py --config.data.pairs=pairs.csv
    python train.py --config=configs/prostate.py:cpu --config.data.subjects=subjects.csv   # a laptop, small images
    python train.py --config=configs/prostate.py:cpu,voxelmorph --config.data.pairs=pairs.csv   # another system
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    variant, model = default.parse("prostate", argument, ("paper", "cpu"))
    config = default.get_config()
    config.name = "prostate"
    config.data.center = "image"
    config.data.cohort_subjects = (0, 0, 0)
    config.data.evaluation_pairs = (32, 38)
    config.loss.dice = 1.0
    if variant == "paper":
        config.data.shape = (128, 128, 102)
        config.data.spacing = (0.7, 0.7, 0.7)
        default.paper(config, training_pairs=156)
    else:
        config.model.downsampled = 3
        config.model.segmenter = 16
        config.data.shape = (64, 64, 64)
        config.data.spacing = (0.4, 0.4, 0.4)
        config.data.evaluation_pairs = (8, 16)
        config.loss.bending = 1.0
        config.loss.folding = 300.0
        config.augmentation.flip = 0.5
        config.augmentation.affine = 0.04
        config.augmentation.elastic = 1.0
        config.augmentation.contrast = 0.15
        config.refinement.steps = 40
        config.steps = 600
        config.val_every = 300
    return default.use_model(config, model)
