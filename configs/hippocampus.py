"""GridReg on cropped hippocampus MR with two labels (Medical Segmentation Decathlon, task 4); not in the paper.

    python train.py --config=configs/hippocampus.py --config.data.subjects=subjects.csv
    python train.py --config=configs/hippocampus.py:cpu --config.data.subjects=subjects.csv   # about ten minutes
    python train.py --config=configs/hippocampus.py:voxelmorph --config.data.subjects=subjects.csv   # another system
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    variant, model = default.parse("hippocampus", argument, ("", "cpu"))
    config = default.get_config()
    config.name = "hippocampus"
    config.model.downsampled = 3
    config.model.segmenter = 16
    config.data.shape = (48, 64, 48)
    config.data.spacing = (1.0, 1.0, 1.0)
    config.data.center = "image"  # crops around the organ: their middle says more than their intensities
    config.data.cohort_subjects = (0, 0, 0)
    config.data.evaluation_pairs = (12, 24)
    config.loss.dice = 1.0
    config.loss.bending = 5.0
    config.loss.folding = 300.0
    config.augmentation.flip = 0.5
    config.augmentation.affine = 0.04
    config.augmentation.shift = 1.0
    config.augmentation.elastic = 1.0
    config.augmentation.contrast = 0.15
    config.augmentation.noise = 0.02
    config.refinement.steps = 40
    config.batch_size = 2
    config.steps = 3000
    config.val_every = 3000  # once: twelve pairs tell grid sizes apart, but hardly one step from another
    config.checkpoint_every = 500
    if variant == "cpu":
        config.steps = 1000
        config.val_every = 1000
    return default.use_model(config, model)
