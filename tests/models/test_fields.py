"""Numbers that a model's fields cannot be."""

import jax
import numpy as np
import pytest

from gridreg_jax.errors import InputError
from gridreg_jax.models import build

IMAGES = [np.zeros((1, 8, 8, 8, 1), np.float32)] * 2


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gridreg", dict(bound=np.inf), "model.bound is inf: give 0 or more"),
        ("gridreg", dict(segmenter=4, labels=-1), "model.labels is -1: give 0 or more"),
        ("keymorph", dict(smoothing=np.nan), "model.smoothing is nan: give 0 or more"),
        ("lightcrcf", dict(encoder=(8, 0, 16)), r"model.encoder is \(8, 0, 16\): give 1 or more each"),
        ("lightcrcf", dict(decoder=(16, 0)), r"model.decoder is \(16, 0\): give 1 or more each"),
        ("transmorph", dict(output="bspline", spacing=0), "model.spacing is 0: give 1 or more"),
        ("transmorph", dict(window=(0, 6, 7)), r"model.window is \(0, 6, 7\): give 1 or more each"),
        ("transmorph", dict(embed=0), "model.embed is 0: give 1 or more"),
        ("transmorph", dict(heads=(0, 4, 8, 8)), r"model.heads is \(0, 4, 8, 8\): give 1 or more each"),
        ("transmorph", dict(depths=(2, 2, -1, 2)), r"model.depths is \(2, 2, -1, 2\): give 1 or more each"),
        ("transmorph", dict(depths=(), heads=()), "model.depths is empty: give one level or more"),
        ("transmorph", dict(dropout=2.0), "model.dropout is 2.0: give 0 to 1"),
        ("transmorph", dict(drop_path=1.5), "model.drop_path is 1.5: give 0 to 1"),
        ("transmorph", dict(dropout=0.1, passes=-1), "model.passes is -1: give 0 or more"),
        ("voxelmorph", dict(encoder=(16, 32, 0, 32)), r"model.encoder is \(16, 32, 0, 32\): give 1 or more each"),
        ("voxelmorph", dict(encoder=(4,), decoder=((4,), (4, 0))), r"model.decoder is \(\(4,\), \(4, 0\)\): give 1"),
    ],
)
def test_numbers_out_of_range_are_refused(name, fields, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(build(name, **fields).init, jax.random.key(0), *IMAGES)
