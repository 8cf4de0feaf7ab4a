"""GridReg on brain images, by default on the embedded cohort; `:paper` for the paper's data set 3 (LUMIR).

    python train.py --config=configs/brain.py
    python train.py --config=configs/brain.py --config.data.pairs=pairs.csv --workdir=runs/mine
    python train.py --config=configs/brain.py:paper --config.data.subjects=subjects.csv
    python train.py --config=configs/brain.py:voxelmorph   # another system (see `configs/models.py`)
    python train.py --config=configs/brain.py:paper,voxelmorph --config.data.subjects=subjects.csv
"""

from ml_collections import ConfigDict

from configs import default


def get_config(argument: str = "") -> ConfigDict:
    variant, model = default.parse("brain", argument, ("cpu", "paper"))
    config = default.get_config()
    config.name = "brain"
    # The paper's is mse; this one is blind to local gain and offset. No labels in training, as in the paper.
    config.loss.similarity = "lncc"
    if variant == "paper":
        # 1 mm (section 4.1); the lattice is LUMIR's, which the paper does not state. 3000 images: as many random pairs.
        config.data.shape = (160, 224, 192)
        config.data.spacing = (1.0, 1.0, 1.0)
        config.loss.similarity = "mse"
        default.paper(config, training_pairs=3000)
    return default.use_model(config, model)
