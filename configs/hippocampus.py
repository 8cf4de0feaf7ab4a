"""GridReg on cropped hippocampus MR with two labels (Medical Segmentation Decathlon, task 4).

    python train.py --config=configs/hippocampus.py --config.data.subjects=subjects.csv
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "hippocampus"
    config.seed = 0

    config.model = ConfigDict()
    config.model.name = "gridreg"
    config.model.encoder = "strided"  # "pooled", or package.module:Class for another one
    config.model.levels = 5
    config.model.width = 16
    config.model.downsampled = 3
    config.model.skips = (3, 2, 1)  # encoder levels that are projected to tokens, after the last one
    config.model.projection = 32
    config.model.decoder = 32
    config.model.heads = 4
    config.model.window = 3  # grid cells an axis that a control point attends to; None: global attention
    config.model.tokens = 8  # with global attention, tokens an axis
    config.model.interpolator = "bspline"
    config.model.contrast_window = 9  # voxels an axis; intensities are normalised locally before the encoder
    config.model.bayesian = False  # True: also predict the uncertainty of every control point
    config.model.iterations = 2  # runs of the network, each on what the one before has warped; the paper's: 1

    config.data = ConfigDict()
    config.data.pairs = ""
    config.data.subjects = ""
    config.data.shape = (48, 64, 48)
    config.data.spacing = (1.0, 1.0, 1.0)
    config.data.center = "image"  # crops around the organ: their middle says more than their intensities
    config.data.labels = ()
    config.data.cohort_subjects = (0, 0, 0)
    config.data.evaluation_pairs = (12, 24)
    config.data.cache_dir = ""

    config.loss = ConfigDict()
    config.loss.similarity = "mse"
    config.loss.grid_similarity = "mse"  # of the images' values at the control points
    config.loss.image = 1.0
    config.loss.grid = 1.0
    config.loss.dice = 1.0
    config.loss.bending = 1.0
    config.loss.entropy = 0.01  # of a Bayesian head's posterior (the paper's lambda_0)
    config.loss.samples = 2  # maps drawn from it

    config.augmentation = ConfigDict()
    config.augmentation.flip = 0.5
    config.augmentation.affine = 0.04
    config.augmentation.shift = 1.0
    config.augmentation.elastic = 1.0
    config.augmentation.contrast = 0.15
    config.augmentation.noise = 0.02

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.decay = True
    config.optimizer.clip = 1.0

    config.grid_sizes = (5, 8, 10, 15)
    config.batch_size = 2
    config.steps = 6000
    config.val_every = 1000
    config.checkpoint_every = 500
    return config
