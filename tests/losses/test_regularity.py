import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gridreg_jax import losses
from gridreg_jax.errors import InputError
from gridreg_jax.transforms import bspline
from gridreg_jax.transforms.interpolation import interpolate

bending_energy, diffusion_energy = jax.jit(losses.bending_energy), jax.jit(losses.diffusion_energy)
folding_penalty = jax.jit(losses.folding_penalty, static_argnums=2)

SHAPE = (7, 6, 8)
X, Y, Z = np.indices(SHAPE).astype(float)


def field(*components):
    return jnp.asarray(np.stack([np.broadcast_to(c, SHAPE) for c in components], -1)[None], jnp.float32)


def random_field(cases=1):
    return jnp.asarray(np.random.default_rng(0).normal(size=(cases, *SHAPE, 3)), jnp.float32)


def bending_oracle(u):
    """Voxel by voxel, term by term."""
    total, e = [], np.eye(3, dtype=int)
    for at in itertools.product(*(range(1, n - 1) for n in SHAPE)):

        def f(step, at=at):
            return u[tuple(step + at)]

        for a, b in itertools.product(range(3), repeat=2):
            if a == b:
                second = f(e[a]) - 2 * f(0 * e[a]) + f(-e[a])
            else:
                second = (f(e[a] + e[b]) - f(e[a] - e[b]) - f(e[b] - e[a]) + f(-e[a] - e[b])) / 4
            total.append(second**2)
    return np.sum(total) / (np.prod(np.array(SHAPE) - 2) * 3)


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        (0.01 * X**2, 0.02**2 / 3),
        (0.01 * Y**2, 0.02**2 / 3),
        (0.01 * Z**2, 0.02**2 / 3),
        (0.01 * X * Y, 2 * 0.01**2 / 3),
        (0.01 * X * Z, 2 * 0.01**2 / 3),
        (0.01 * Y * Z, 2 * 0.01**2 / 3),
        (0.1 * (-1) ** X, 0.4**2 / 3),
    ],
)
def test_bending_of_closed_forms(component, expected):
    for components in ((component, 0, 0), (0, component, 0), (0, 0, component)):
        assert float(bending_energy(field(*components))[0]) == pytest.approx(expected, rel=1e-3)


def test_bending_against_its_definition():
    u = random_field(2)
    found = bending_energy(u)
    assert found.shape == (2,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, [bending_oracle(np.asarray(one, float)) for one in u], rtol=1e-5)


def test_affine_fields_do_not_bend():
    assert float(bending_energy(field(1 + X - 2 * Y, 3 * Z, 0.5 * X + Y + Z))[0]) < 1e-9


def test_bending_needs_three_voxels_along_every_axis():
    with pytest.raises(InputError, match="3 voxels"):
        bending_energy(jnp.zeros((1, 5, 5, 2, 3)))


def test_diffusion():
    assert float(diffusion_energy(field(5, -1, 2))[0]) == 0
    assert float(diffusion_energy(field(0.3 * X, 0.2 * Y - 0.1 * Z, 0))[0]) == pytest.approx(0.14 / 3, rel=1e-5)
    u = np.asarray(random_field(), float)[0]
    expected = sum(np.mean(np.diff(u, axis=axis) ** 2) for axis in range(3))
    assert float(diffusion_energy(random_field())[0]) == pytest.approx(expected, rel=1e-5)
    assert float(diffusion_energy(jnp.ones((1, 4, 4, 1, 3)))[0]) == 0


@pytest.mark.parametrize("energy", [bending_energy, diffusion_energy])
def test_gradient(energy):
    """An energy is a quadratic form: its slope along d is the difference of its values at u + d and u - d, halved."""
    u, d = random_field(), random_field(2)[1:]
    slope = jnp.sum(jax.jit(jax.grad(lambda u: energy(u).sum()))(u) * d)
    assert float(slope) == pytest.approx(float(energy(u + d)[0] - energy(u - d)[0]) / 2, rel=1e-3)


def test_folding_of_an_affine_field():
    def penalty(*components):
        return folding_penalty(field(*components), None, "trilinear")

    np.testing.assert_allclose(penalty(-0.9 * X, 0, 0), (0.25 - 0.1) ** 2, rtol=1e-4)
    np.testing.assert_allclose(penalty(-1.5 * X, Z, 0), (0.25 + 0.5) ** 2, rtol=1e-4)
    np.testing.assert_allclose(penalty(-0.7 * X, Z, 0), 0)


def test_folding_of_a_spline_and_of_its_dense_field():
    control_grid = 2 * jax.random.normal(jax.random.key(0), (2, 5, 6, 7, 3))
    displacement = interpolate(control_grid, SHAPE, method="bspline")
    voxels = jnp.asarray(np.indices(SHAPE).reshape(3, -1).T, jnp.float32)
    jacobian = jax.jit(bspline.jacobian, static_argnums=2)
    determinants = np.linalg.det(jacobian(control_grid, voxels, SHAPE))
    assert (determinants < 0).any(axis=1).all()
    expected = np.mean(np.maximum(0.25 - determinants, 0) ** 2, axis=1)
    np.testing.assert_allclose(folding_penalty(displacement, control_grid, "bspline"), expected, rtol=1e-4)
    central = np.linalg.det(np.eye(3) + np.stack(np.gradient(np.asarray(displacement), axis=(1, 2, 3)), axis=-1))
    expected = np.mean(np.maximum(0.25 - central[:, 1:-1, 1:-1, 1:-1], 0) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(folding_penalty(displacement, control_grid, "trilinear"), expected, rtol=1e-4)


def test_divergence_from_a_smooth_prior():
    """Trace and determinant are those of Gaussians with the matrices written out; the mean counts by differences."""
    shape, precision = (3, 4, 2), 7.0
    velocity, log_variance = np.random.default_rng(0).normal(size=(2, 2, *shape, 3))
    places = np.array(list(np.ndindex(shape)))
    near = (np.abs(places[:, None] - places).sum(-1) == 1).astype(float)
    prior = precision * (np.diag(near.sum(0)) - near)
    for case in range(2):
        spreads = [np.diag(np.exp(spread)) for spread in log_variance[case].reshape(-1, 3).T]
        spread = 0.5 * sum(np.trace(prior @ spread) - np.linalg.slogdet(spread)[1] for spread in spreads) / len(places)
        mean = precision / 4 * sum(np.mean(np.diff(velocity[case], axis=axis) ** 2) for axis in range(3))
        pair = (jnp.asarray(array[case : case + 1], jnp.float32) for array in (velocity, log_variance))
        assert float(losses.kl_to_smooth(*pair, precision=precision)[0]) == pytest.approx(spread + mean, rel=1e-5)
