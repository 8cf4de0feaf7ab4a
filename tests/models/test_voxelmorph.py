"""VoxelMorph: sizes, the identity it starts from, its velocities, and agreement with the same network in PyTorch."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.models import MODELS
from gridreg_jax.errors import InputError
from gridreg_jax.models import build

ODD = (33, 29, 41)
TINY = dict(encoder=(4, 4), decoder=((4,), (4,), (4, 4)))
VARIANTS = {
    "displacement": dict(steps=0),
    "of the papers": dict(steps=0, strided=True),
    "velocity": dict(),
    "both directions": dict(bidirectional=True),
    "posterior": dict(probabilistic=True),
}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def images(shape, cases=1):
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, cases, *shape, 1)), jnp.float32)


def init(model, shape=ODD):
    image = jax.ShapeDtypeStruct((1, *shape, 1), jnp.float32)
    return model.lazy_init(jax.random.key(0), image, image)


def random_params(model, seed=0):
    """Parameters away from those at the start, head included."""
    rng, shapes = np.random.default_rng(seed), jax.eval_shape(lambda: init(model))
    return jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voxelmorph", 327_331),
        ("voxelmorph_1", 259_675),
        ("voxelmorph_2", 300_547),
        ("voxelmorph_probabilistic", 328_630),
    ],
)
def test_the_parameters_are_as_many_as_the_authors(name, expected):
    params = jax.eval_shape(lambda: init(build(**MODELS[name]["fields"])))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@each_variant
def test_starts_next_to_the_identity_for_images_of_any_size(fields):
    model = build("voxelmorph", **TINY, **fields)
    predict = jax.jit(lambda *pair: model.init_with_output(jax.random.key(0), *pair)[0])
    prediction = predict(*images(ODD))
    maps = [prediction.displacement]
    if fields.get("bidirectional"):
        maps.append(prediction.inverse_displacement)
    for displacement in maps:
        assert displacement.shape == (1, *ODD, 3)
        assert 0 < np.abs(displacement).max() < 1e-2


@each_variant
def test_every_parameter_has_a_gradient(fields):
    model, shape = build("voxelmorph", encoder=(4,), decoder=((4,), (4, 4)), **fields), (13, 12, 9)
    params, streams = random_params(model), {"velocity": jax.random.key(1)}

    @jax.jit
    @jax.grad
    def gradient(params):
        prediction = model.apply(params, *images(shape), train=True, rngs=streams)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(prediction))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def with_constant_velocity(model, velocity, log_variance=None):
    params = random_params(model)["params"]
    params["flow"] = {"kernel": jnp.zeros_like(params["flow"]["kernel"]), "bias": jnp.asarray(velocity)}
    if log_variance is not None:
        kernel = jnp.zeros_like(params["log_variance"]["kernel"])
        params["log_variance"] = {"kernel": kernel, "bias": jnp.full(3, log_variance)}
    return {"params": params}


def test_a_constant_velocity_moves_everything_by_itself_and_back():
    model = build("voxelmorph", **TINY, bidirectional=True)
    velocity = np.array([1.5, -0.5, 3.0], np.float32)
    prediction = jax.jit(model.apply)(with_constant_velocity(model, velocity), *images(ODD))
    np.testing.assert_allclose(prediction.displacement, np.broadcast_to(velocity, (1, *ODD, 3)), rtol=1e-5)
    np.testing.assert_allclose(prediction.inverse_displacement, -prediction.displacement, rtol=1e-5)
    # In voxels of its own lattice, which are two of the image's.
    np.testing.assert_allclose(prediction.velocity, np.broadcast_to(velocity / 2, (1, 17, 15, 21, 3)), rtol=1e-5)


def test_training_draws_the_velocity_and_prediction_takes_the_mean():
    model = build("voxelmorph", **TINY, probabilistic=True)
    params = with_constant_velocity(model, np.array([1.0, 0.0, -1.0], np.float32), log_variance=np.log(0.25))
    pair = images((16, 16, 16))

    @jax.jit
    def displacement(key):
        return model.apply(params, *pair, train=True, rngs={"velocity": jax.random.key(key)}).displacement

    mean = jax.jit(model.apply)(params, *pair)
    np.testing.assert_allclose(mean.displacement[0, 0, 0, 0], [1, 0, -1], rtol=1e-5)
    np.testing.assert_allclose(mean.velocity_log_variance, np.full((1, 16, 16, 16, 3), np.log(0.25)), rtol=1e-5)
    draws = np.stack([displacement(key) for key in range(2)]) - mean.displacement
    assert np.abs(draws[0] - draws[1]).mean() > 0.1
    # Half a voxel of noise, somewhat smoothed on its way to half the resolution and back.
    assert 0.1 < draws.std() < 0.5
    assert np.abs(draws.mean((0, 1, 2, 3, 4))).max() < 0.05


def test_cases_of_a_batch_do_not_influence_each_other():
    model = build("voxelmorph", **TINY)
    params, (fixed, moving) = random_params(model), images((16, 12, 8), cases=2)
    predict = jax.jit(lambda fixed, moving: model.apply(params, fixed, moving).displacement)
    both, other = predict(fixed, moving), predict(fixed, moving.at[1].set(fixed[1]))
    assert np.abs(both[1] - other[1]).max() > 1e-2
    np.testing.assert_allclose(both[0], other[0], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(encoder=(4,)), "model.decoder must have a resolution more than the 1 of model.encoder"),
        (dict(steps=-1), "model.steps is -1: give 0 or more"),
        (dict(steps=0, bidirectional=True), "model.bidirectional needs a velocity, which model.steps=0 does without"),
        (dict(steps=0, probabilistic=True), "model.probabilistic needs a velocity"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        init(build("voxelmorph", **TINY | fields))


class TestAgainstPyTorch:
    """The authors' packages on PyPI hold another network, so the one of their repository is written out here."""

    SHAPE = (32, 16, 48)

    @pytest.fixture(autouse=True)
    def torch(self):
        self.torch = pytest.importorskip("torch")

    def network(self, params, fixed, moving, fields):
        """Displacement at full resolution, or velocity: the U-Net and its head, `[1, 3, X, Y, Z]`."""
        functional = self.torch.nn.functional

        def convolve(x, name, stride=1):
            kernel = self.torch.tensor(np.array(params[name]["kernel"])).permute(4, 3, 0, 1, 2)
            return functional.conv3d(x, kernel, self.torch.tensor(np.array(params[name]["bias"])), stride, padding=1)

        def activate(x, *options):
            return functional.leaky_relu(convolve(x, *options), 0.2)

        x, skips = self.torch.cat([moving, fixed], 1), []
        for level in range(4):
            if fields["strided"]:
                skips.append(x)
                x = activate(x, f"encoder{level}", 2)
            else:
                skips.append(activate(x, f"encoder{level}"))
                x = functional.max_pool3d(skips[-1], 2)
        for level, widths in enumerate(fields["decoder"]):
            if level:
                x = self.torch.cat([functional.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], 1)
            for number in range(len(widths)):
                x = activate(x, f"decoder{level}_{number}")
        return convolve(x, "flow")

    def integrate(self, velocity, steps):
        """As the authors do, half the size and half the length, squared, and back; but continued outside, not 0."""
        functional = self.torch.nn.functional

        def resize(field, factor):
            return factor * functional.interpolate(field, scale_factor=factor, mode="trilinear", align_corners=True)

        field = resize(velocity, 0.5) / 2**steps
        grid = self.torch.stack(self.torch.meshgrid(*map(self.torch.arange, field.shape[2:]), indexing="ij"))
        for _ in range(steps):
            points = grid + field
            unit = [2 * points[:, axis] / (field.shape[2 + axis] - 1) - 1 for axis in (2, 1, 0)]
            at = self.torch.stack(unit, -1)
            field = field + functional.grid_sample(field, at, padding_mode="border", align_corners=True)
        return resize(field, 2)

    @pytest.mark.parametrize("name", ["voxelmorph", "voxelmorph_1", "voxelmorph_2"])
    def test_the_same_weights_give_the_same_displacement(self, name):
        fields = MODELS[name]["fields"]
        model = build(**fields)
        pair = images(self.SHAPE)
        params = init(model, self.SHAPE)
        head = params["params"]["flow"]["kernel"]
        params["params"]["flow"]["kernel"] = 5e3 * head  # displacements of voxels
        found = jax.jit(model.apply)(params, *pair).displacement
        with self.torch.no_grad():
            fixed, moving = (self.torch.tensor(np.moveaxis(np.array(image), -1, 1)) for image in pair)
            expected = self.network(params["params"], fixed, moving, fields)
            if fields["steps"]:
                expected = self.integrate(expected, fields["steps"])
        expected = np.moveaxis(expected.numpy(), 1, -1)
        assert 0.3 < np.abs(expected).max() < 4
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_authors_package_finds_the_same_displacement(monkeypatch):
    """voxelmorph 0.2 with PyTorch, the last version that has this network."""
    torch = pytest.importorskip("torch")
    for name in ("VXM_BACKEND", "NEURITE_BACKEND"):
        monkeypatch.setenv(name, "pytorch")
    # Which it still calls, though Python 3.11 has it no more.
    monkeypatch.setattr(
        inspect, "getargspec", lambda function: tuple(inspect.getfullargspec(function)[:4]), raising=False
    )
    authors = pytest.importorskip("voxelmorph")
    if not hasattr(authors, "networks"):
        pytest.skip("this version of voxelmorph has another network")
    shape = (32, 48, 32)
    model, (fixed, moving) = build(**MODELS["voxelmorph"]["fields"]), images(shape)
    params = init(model, shape)
    params["params"]["flow"]["kernel"] = 2e3 * params["params"]["flow"]["kernel"]
    network = authors.networks.VxmDense(inshape=shape).eval()
    unet = network.unet_model
    layers = {f"encoder{i}": block[0].main for i, block in enumerate(unet.encoder)}
    layers |= {f"decoder{i}_0": block[0].main for i, block in enumerate(unet.decoder)}
    layers |= {f"decoder4_{i}": block.main for i, block in enumerate(unet.remaining)} | {"flow": network.flow}
    assert layers.keys() == params["params"].keys()
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight[:] = torch.tensor(np.array(params["params"][name]["kernel"])).permute(4, 3, 0, 1, 2)
            layer.bias[:] = torch.tensor(np.array(params["params"][name]["bias"]))
        pair = (torch.tensor(np.moveaxis(np.array(image), -1, 1)) for image in (moving, fixed))
        _, expected = network(*pair, registration=True)
    found = jax.jit(model.apply)(params, fixed, moving).displacement
    expected = np.moveaxis(expected.numpy(), 1, -1)
    assert 0.2 < np.abs(expected).max() < 2
    # Outside, theirs is 0 where ours continues.
    inside = (slice(None), *(slice(8, -8),) * 3)
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-4)
