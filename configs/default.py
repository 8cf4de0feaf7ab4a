"""Every option, with the values that this library finds good on two CPU cores; the other configs say what differs."""

from ml_collections import ConfigDict

from configs.models import MODELS


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "default"
    config.seed = 0

    config.model = ConfigDict()
    config.model.name = "gridreg"
    config.model.encoder = "strided"  # "pooled", or package.module:Class for another one
    config.model.levels = 5
    config.model.width = 16
    config.model.downsampled = 4  # levels that halve the lattice
    config.model.skips = (3, 2, 1)  # encoder levels that are projected to tokens, after the last one; (): none
    config.model.projection = 32
    config.model.products = True  # tokens hold products of features; False: the paper's linear projection
    config.model.decoder = 32
    config.model.heads = 4
    config.model.window = 3  # grid cells an axis that a control point attends to; 0: global; 1: no attention
    config.model.tokens = 8  # with global attention, tokens an axis
    config.model.interpolator = "bspline"  # "trilinear", "gaussian"
    config.model.bound = 0.0  # largest displacement of a control point in half lattices; 0: free
    config.model.bayesian = False  # True: also give the uncertainty of every control point
    config.model.variance = "observed"  # where that comes from; the paper's: "predicted"
    config.model.contrast_window = 9  # voxels an axis; intensities are normalised locally before the encoder
    config.model.segmenter = 0  # features of a network that predicts the labels of each image by itself; 0: none
    config.model.precision = "float32"  # of the encoder; "bfloat16" on accelerators
    config.model.iterations = 2  # runs of the network, each on what the one before has warped; the paper's: 1

    config.data = ConfigDict()
    config.data.pairs = ""  # CSV of pairs; neither list: the embedded cohort
    config.data.subjects = ""  # CSV of subjects, from which pairs are drawn
    config.data.shape = (80, 96, 80)  # voxels of the working lattice
    config.data.spacing = (2.0, 2.0, 2.0)  # mm
    config.data.center = "mass"  # what comes to the middle of the lattice: centre of "mass" or of the "image"
    config.data.labels = ()  # label values to score; () for all that occur
    config.data.cohort_subjects = (24, 4, 6)  # training, validation, test
    config.data.evaluation_pairs = (6, 12)  # validation and test pairs drawn among subjects
    config.data.cache_dir = ""  # for prepared images; "" for $GRIDREG_CACHE or ~/.cache/gridreg_jax

    config.loss = ConfigDict()
    config.loss.similarity = "mse"  # of the images; "lncc", "ncc", "nmi", "mind", "ssim"
    config.loss.grid_similarity = "mse"  # of their values at the control points
    config.loss.image = 1.0
    config.loss.grid = 1.0
    config.loss.dice = 0.0
    config.loss.bending = 10.0  # per squared voxel; `paper` below converts the paper's
    config.loss.folding = 0.0  # of Jacobian determinants below 0.25
    config.loss.elastic = (0.0, 0.0)  # Lame constants mu and lambda of a cubic spline's elastic energy
    config.loss.gradient = 0.0  # of squared first differences of the velocity or the displacement
    config.loss.kl = 0.0  # of the divergence of a velocity's posterior from a smooth prior,
    config.loss.kl_precision = 10.0  # and that prior's precision
    config.loss.segmentation = 1.0  # of a segmenter's labels
    config.loss.uncertainty = 0.1  # uncertainty-weighted similarity of a Bayesian head
    config.loss.penalty = 1.0  # of that variance (the paper's lambda_0)
    config.loss.samples = 2  # maps drawn from a Bayesian head's posterior
    config.loss.keypoints = 0.0  # of predicted keypoints' distance from known ones: a pre-training, on one subject

    config.augmentation = ConfigDict()  # see `gridreg_jax.augment`
    config.augmentation.flip = 0.0
    config.augmentation.affine = 0.0
    config.augmentation.shift = 0.0
    config.augmentation.elastic = 0.0
    config.augmentation.contrast = 0.0
    config.augmentation.noise = 0.0
    config.augmentation.ramp = 0  # steps over which the spatial ones grow to their size

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # "adam", "adamax", "amsgrad", "sgd"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.decay = True  # along a cosine after a linear rise;
    config.optimizer.power = 0.0  # if not 0: as a power of the share of the steps that is left
    config.optimizer.clip = 1.0

    config.refinement = ConfigDict()  # instance optimisation in validation and evaluation, see `gridreg_jax.instance`
    config.refinement.steps = 0
    config.refinement.bending = 3.0  # per squared voxel, of the change
    config.refinement.overlap = 1.0  # of the labels that a segmenter predicts
    config.refinement.folding = 100.0  # of Jacobian determinants below 0.25
    config.refinement.learning_rate = 0.2  # voxels

    config.grid_sizes = (5, 8, 10, 15)  # control points an axis, drawn as often as listed; () for a model without
    config.batch_size = 1
    config.remat = False  # True: less memory, more time; of the network only its convolutions are kept for the gradient
    config.start = ""  # workdir of a run, with whose parameters this one begins
    config.steps = 360
    config.val_every = 360
    config.checkpoint_every = 100
    return config


def paper(config: ConfigDict, *, training_pairs: int) -> ConfigDict:
    """Set network, losses and optimiser of the paper (sections 3 and 4.3), for a lattice that is already set."""
    config.model.products = False
    config.model.variance = "predicted"
    config.model.interpolator = "trilinear"
    config.model.bound = 1.0
    config.model.contrast_window = 0
    config.model.iterations = 1
    # 2e5 for displacements in half volumes, where u = 2 u_voxels / X: 48.8 at 128 voxels.
    config.loss.bending = 2e5 * (2 / config.data.shape[0]) ** 2
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.decay = False
    config.optimizer.clip = 0.0
    config.batch_size = 4
    config.steps = 300 * training_pairs // config.batch_size  # 300 epochs
    config.val_every = config.steps // 30
    config.checkpoint_every = config.steps // 60
    return config


def parse(name: str, argument: str, variants: tuple[str, ...]) -> tuple[str, str]:
    """Variant and model that a config's argument names: "", "paper", "voxelmorph" or "paper,voxelmorph".

    Args:
      variants: of the config; without a name the first is meant.

    Returns:
      The variant, and a name in `MODELS` or "" for GridReg.
    """
    variant, model = variants[0], ""
    for part in filter(None, argument.split(",")):
        if part in variants:
            variant = part
        elif part in MODELS:
            model = part
        else:
            known = ", ".join([*filter(None, variants), *MODELS])
            raise ValueError(f"configs/{name}.py:{part}: there is no such variant; there are {known}")
    return variant, model


def use_model(config: ConfigDict, name: str) -> ConfigDict:
    """Let another system (a name in `MODELS`; "": none) take the place of GridReg, in a config that is otherwise set.

    With it come its authors' optimiser and weights of smoothness; data, similarity, overlap, augmentation and the
    length of the training stay, so that systems are compared on the same terms. (A pre-training has its own.)
    """
    if not name:
        return config
    model = MODELS[name]
    if config.loss.similarity not in model["loss"]:
        known = " and ".join(model["loss"])
        raise ValueError(f"{name} has weights of smoothness for {known} alone, not for {config.loss.similarity}")
    config.name = f"{config.name}_{name}"
    config.model = ConfigDict(model["fields"])
    if config.model.name == "transmorph":
        # The authors' rule: a window as large as the coarsest grid, a 32nd of the image.
        config.model.window = tuple(-(-size // 32) for size in config.data.shape)
    config.optimizer.update(model["optimizer"])
    config.loss.update(grid=0.0, bending=0.0, folding=0.0, **model["loss"][config.loss.similarity])
    config.augmentation.update(model.get("augmentation", {}))
    config.refinement.steps = 0
    config.grid_sizes = ()
    return config
