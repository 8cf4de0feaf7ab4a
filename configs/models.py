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
_TRANSMORPH = dict(
    name="transmorph",
    embed=96,
    depths=(2, 2, 4, 2),
    heads=(4, 4, 8, 8),
    window=(5, 6, 7),  # for 160 x 192 x 224 voxels; `default.use_model` sets that of other images
    transformer_skips=True,
    convolution_skips=True,
    output="displacement",  # "bspline", "diffeomorphic"
    spacing=3,  # voxels between the control points of "bspline"
    scaled=True,  # False: "diffeomorphic" as in the authors' code
    drop_path=0.3,
    dropout=0.0,
    passes=0,  # predictions with dropout that are averaged
)
_ADAM = dict(name="adam", learning_rate=1e-4, decay=False, clip=0.0)
_AMSGRAD = dict(name="amsgrad", learning_rate=1e-4, decay=True, power=0.9, clip=0.0)


def _transmorph(**changes) -> dict:
    return dict(fields=_TRANSMORPH | changes, optimizer=_AMSGRAD, loss=_gradient(mse=0.02, lncc=1.0))


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
    "transmorph": _transmorph(),
    "transmorph_tiny": _transmorph(embed=6, heads=(2, 2, 4, 4)),
    "transmorph_small": _transmorph(embed=48, heads=(4, 4, 4, 4)),
    "transmorph_large": _transmorph(embed=128, depths=(2, 2, 12, 2), heads=(4, 4, 8, 16)),
    "transmorph_noskip": _transmorph(transformer_skips=False, convolution_skips=False),
    "transmorph_bayes": _transmorph(dropout=0.15, passes=10),
    "transmorph_bspline": _transmorph(output="bspline"),
    "transmorph_diff": _transmorph(output="diffeomorphic")
    | dict(optimizer=_ADAM | dict(name="adamax"), loss=_kl(image_sigma=0.01)),
    "keymorph": dict(fields=_KEYMORPH, optimizer=_ADAM, loss=_gradient(mse=0.0, lncc=0.0)),
    # Its pre-training, on one subject: the next run begins with --config.start=<workdir of this one>.
    "keymorph_pretrain": dict(
        fields=_KEYMORPH,
        optimizer=_ADAM,
        loss=dict.fromkeys(("mse", "lncc"), dict(image=0.0, dice=0.0, keypoints=1.0)),
        augmentation=dict(flip=0.0, affine=0.15, shift=6.0, elastic=0.0, ramp=1000),
    ),
    "lightcrcf": dict(fields=_LIGHTCRCF, optimizer=_ADAM, loss=_gradient(mse=0.01, lncc=1.0)),
}
