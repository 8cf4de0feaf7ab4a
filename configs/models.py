"""The systems that GridReg is compared with, by the name that a config's argument gives them.

Of each: every field of its network (`gridreg_jax.models`), its authors' optimiser, and their weights of smoothness with
each of the similarities that configs have.
"""


def _gradient(*, mse: float, lncc: float) -> dict:
    return {"mse": {"gradient": mse}, "lncc": {"gradient": lncc}}


def _kl(*, image_sigma: float) -> dict:
    # The authors divide the mean squared difference by the variance of the images' noise; here the other term has it.
    return dict.fromkeys(("mse", "lncc"), {"similarity": "mse", "kl": image_sigma**2, "kl_precision": 10.0})


_VOXELMORPH = dict(
    name="voxelmorph",
    encoder=(16, 32, 32, 32),
    decoder=((32,), (32,), (32,), (32,), (32, 16, 16)),  # at each resolution, coarse to fine
    strided=False,
    steps=7,  # squarings that integrate a velocity; 0: the network gives the displacement
    bidirectional=False,
    probabilistic=False,
)
_VOXELMORPH_PAPER = _VOXELMORPH | dict(strided=True, steps=0)
_KEYMORPH = dict(
    name="keymorph",
    keypoints=128,
    transform="tps",  # "affine", "rigid"
    smoothing=0.1,  # lambda of the spline; the only regulariser
    draw="loguniform",  # how training draws lambda instead; "uniform", "": not at all
    kernel="r2logr",  # "r": the thin plate of three dimensions
    weighted=False,
)
_LIGHTCRCF = dict(
    name="lightcrcf",
    stages=3,  # resolutions, coarse to fine
    encoder=(8, 16, 16),
    decoder=(16, 8),
    shared=False,  # one network for all stages
    fused=False,
)
_ADAM = dict(name="adam", learning_rate=1e-4, decay=False, clip=0.0)

MODELS = {
    # 0.01 and 1, which the authors' code doubles for a velocity at half resolution.
    "voxelmorph": dict(fields=_VOXELMORPH, optimizer=_ADAM, loss=_gradient(mse=0.02, lncc=2.0)),
    "voxelmorph_1": dict(
        fields=_VOXELMORPH_PAPER | dict(decoder=((32,), (32,), (32,), (32, 8), (8,))),
        optimizer=_ADAM,
        loss=_gradient(mse=0.01, lncc=1.0),
    ),
    "voxelmorph_2": dict(
        fields=_VOXELMORPH_PAPER | dict(decoder=((32,), (32,), (32,), (32, 32), (16, 16))),
        optimizer=_ADAM,
        loss=_gradient(mse=0.01, lncc=1.0),
    ),
    "voxelmorph_probabilistic": dict(
        fields=_VOXELMORPH | dict(probabilistic=True), optimizer=_ADAM, loss=_kl(image_sigma=0.02)
    ),
    "keymorph": dict(fields=_KEYMORPH, optimizer=_ADAM, loss=_gradient(mse=0.0, lncc=0.0)),
    "lightcrcf": dict(fields=_LIGHTCRCF, optimizer=_ADAM, loss=_gradient(mse=0.01, lncc=1.0)),
}
