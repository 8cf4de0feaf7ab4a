"""GridReg in plain PyTorch, on the CPU: the network, the losses, and parameters taken over from JAX.

It is what `versus_torch.py` compares gridreg_jax with, so it follows `gridreg_jax.models.gridreg.GridReg` to the number
for the strided encoder, products in the tokens, windowed attention and one iteration, and is otherwise written as
PyTorch is fast. Images and labels are `[N, C, X, Y, Z]` here; control grids, displacements and tokens keep the channels
last. It needs no JAX.
"""

import functools
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

FREQUENCIES = (0.5, 1.0, 2.0, 3.0)  # times pi, per unit of position
WIDTHS = (1, 2, 2, 4, 4, 8, 8, 16, 16)  # of the encoder's levels, in multiples of `width`
BENDING = {(2, 0, 0): 1, (0, 2, 0): 1, (0, 0, 2): 1, (1, 1, 0): 2, (1, 0, 1): 2, (0, 1, 1): 2}


class GridReg(nn.Module):
    """Strided encoder, projections with products, decoder by local cross-attention, and control-grid head.

    Fields are those of the JAX module. Every layer starts as PyTorch starts it, the head at zero; `load_flax_params`
    sets all of them.
    """

    def __init__(
        self,
        levels: int = 5,
        width: int = 16,
        downsampled: int = 4,
        skips: tuple[int, ...] = (3, 2, 1),
        projection: int = 32,
        decoder: int = 32,
        heads: int = 4,
        window: int = 3,
        interpolator: str = "bspline",
        contrast_window: int = 0,
    ):
        super().__init__()
        self.interpolator, self.contrast_window = interpolator, contrast_window
        self.encoder = Encoder(levels, width, downsampled)
        self.decoded = (levels - 1, *(level for level in skips if level < levels - 1))
        self.projections = nn.ModuleList(nn.Linear(width * WIDTHS[level], 3 * projection) for level in self.decoded)
        encoding = 3 * (1 + 2 * len(FREQUENCIES))
        self.start = nn.Linear(encoding, decoder)
        self.decoder = nn.ModuleList(DecoderLevel(projection, decoder, encoding, heads, window) for _ in self.decoded)
        self.head_norm = nn.LayerNorm(decoder, eps=1e-6)
        self.head = nn.Linear(decoder, 3)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, fixed: torch.Tensor, moving: torch.Tensor, grid_size: tuple[int, int, int] = (10, 10, 10)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement `[N, X, Y, Z, 3]` and control grid `[N, gx, gy, gz, 3]`, both in voxels."""
        shape = tuple(fixed.shape[2:])
        images = torch.cat([fixed, moving], dim=1)
        if self.contrast_window:
            images = local_norm(images, self.contrast_window)
        pyramid = self.encoder(images)

        encoding = position_encoding(self.interpolator, grid_size).expand(len(fixed), -1, -1, -1, -1)
        state = self.start(encoding)
        for index, projection, level in zip(self.decoded, self.projections, self.decoder, strict=True):
            linear, left, right = projection(pyramid[index].movedim(1, -1)).chunk(3, dim=-1)
            hats = [
                hat_weights(self.interpolator, g, size, self.encoder.strides[index])
                for g, size in zip(grid_size, shape, strict=True)
            ]
            state = level(state, contract(linear + left * right, hats, axes=(1, 2, 3)), encoding)
        half = state.new_tensor([(size - 1) / 2 for size in shape])
        control_grid = self.head(self.head_norm(state)) * half
        return interpolate(control_grid, shape, self.interpolator), control_grid


class Encoder(nn.Module):
    """Each level: 3x3x3 convolution, of stride 2 in the first `downsampled` ones, instance norm, leaky ReLU."""

    def __init__(self, levels: int, width: int, downsampled: int):
        super().__init__()
        steps = [2 if level < downsampled else 1 for level in range(levels)]
        widths = [2, *(width * times for times in WIDTHS[:levels])]
        self.strides = np.cumprod(steps).tolist()
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(before, after, 3, stride=step, padding=1),
                # An instance norm: with a group a channel. On the CPU it is faster than `InstanceNorm3d`.
                nn.GroupNorm(after, after, affine=False),
                nn.LeakyReLU(0.1, inplace=True),
            )
            for before, after, step in zip(widths, widths[1:], steps, strict=False)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features, fine to coarse."""
        pyramid = []
        for level in self.levels:
            x = level(x)
            pyramid.append(x)
        return pyramid


class DecoderLevel(nn.Module):
    """The state at the control points attends to the tokens there: pre-norm transformer block."""

    def __init__(self, projection: int, features: int, encoding: int, heads: int, window: int):
        super().__init__()
        self.state_norm = nn.LayerNorm(features, eps=1e-6)
        self.token_norm = nn.LayerNorm(projection, eps=1e-6)
        self.attention = WindowAttention(features + encoding, projection + features + encoding, features, heads, window)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(features, eps=1e-6),
            nn.Linear(features, 2 * features),
            nn.GELU(approximate="tanh"),
            nn.Linear(2 * features, features),
        )

    def forward(self, state: torch.Tensor, projected: torch.Tensor, encoding: torch.Tensor) -> torch.Tensor:
        normed = self.state_norm(state)
        tokens = torch.cat([self.token_norm(projected), normed, encoding], dim=-1)
        state = state + self.attention(torch.cat([normed, encoding], dim=-1), tokens)
        return state + self.perceptron(state)


class WindowAttention(nn.Module):
    """Multi-head attention of every cell to the `window`^3 cells around it, with a learned bias a place and head."""

    def __init__(self, queries: int, tokens: int, features: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.query = nn.Linear(queries, features, bias=False)
        self.key = nn.Linear(tokens, features, bias=False)
        self.value = nn.Linear(tokens, features, bias=False)
        self.bias = nn.Parameter(torch.zeros(window**3, heads))
        self.out = nn.Linear(features, features)

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        query = self.query(queries)
        query = query * (self.heads / query.shape[-1]) ** 0.5
        keys, values = self._around(self.key(tokens)), self._around(self.value(tokens))
        # One place of the window after the other: on the CPU twice as fast, with its gradient, as batched products of
        # gathered windows.
        logits = torch.stack([self._split(query * key).sum(-1) for key in keys], dim=-1)
        logits = logits + self.bias.T + outside(tuple(queries.shape[1:4]), self.window)
        weights = logits.softmax(dim=-1).unsqueeze(-2)
        merged = sum(weight * self._split(value) for weight, value in zip(weights.unbind(-1), values, strict=True))
        return self.out(merged.flatten(-2))

    def _around(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What lies at every place of the window, as seen from each cell; zeros outside the grid."""
        reach, (gx, gy, gz) = self.window // 2, x.shape[1:4]
        padded = F.pad(x, (0, 0) + (reach,) * 6)
        places = range(self.window)
        return [padded[:, i : i + gx, j : j + gy, k : k + gz] for i in places for j in places for k in places]

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))


def local_norm(images: torch.Tensor, window: int, *, epsilon: float = 0.05) -> torch.Tensor:
    """Zero mean and about unit deviation in a box of `window`^3 voxels (odd), cut at the borders."""

    def box_mean(x):
        for axis in range(3):
            size = [window if other == axis else 1 for other in range(3)]
            padding = [n // 2 for n in size]
            x = F.avg_pool3d(x, size, stride=1, padding=padding, count_include_pad=False)
        return x

    mean = box_mean(images)
    variance = (box_mean(images.square()) - mean.square()).clamp_min(0)
    return (images - mean) * torch.rsqrt(variance + epsilon**2)


def constant(function):
    """What depends on shapes alone is computed once, in float64, and kept in float32."""
    # Made within `torch.inference_mode`, it could not be used in a gradient later.
    return functools.lru_cache(torch.inference_mode(False)(function))


@constant
def outside(grid_size: tuple[int, int, int], window: int) -> torch.Tensor:
    """Added to the logits `[N, gx, gy, gz, H, W]`: minus infinity where a neighbour is outside the grid, else 0."""
    inside = F.pad(torch.ones(grid_size), (window // 2,) * 6)
    for axis in range(3):
        inside = inside.unfold(axis, window, 1)
    return torch.where(inside.flatten(3) > 0, 0.0, -torch.inf).unsqueeze(-2)


@constant
def position_encoding(interpolator: str, grid_size: tuple[int, int, int]) -> torch.Tensor:
    """Coordinates of the control points and their sines and cosines, `[gx, gy, gz, 27]`."""
    parts = []
    for axis, g in enumerate(grid_size):
        position = control_positions(interpolator, g).unsqueeze(-1)
        phase = math.pi * position * position.new_tensor(FREQUENCIES)
        part = torch.cat([2 * position - 1, phase.sin(), phase.cos()], dim=-1)
        parts.append(part.reshape(*(g if other == axis else 1 for other in range(3)), -1).expand(*grid_size, -1))
    return torch.cat(parts, dim=-1).float()


@constant
def hat_weights(interpolator: str, grid_size: int, size: int, stride: int) -> torch.Tensor:
    """Weights, `[g, n]`, of the n features of a level (every `stride` voxels of `size`) at the control points."""
    features = -(-size // stride)
    points = (control_positions(interpolator, grid_size) * (size - 1) / stride).clamp(0, features - 1)
    width = max(1.0, float(points[-1] - points[0]) / (grid_size - 1))
    weights = (1 - (points[:, None] - torch.arange(features)).abs() / width).clamp_min(0)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


@constant
def axis_weights(interpolator: str, grid_size: int, size: int) -> torch.Tensor:
    """Weights of the control points at the voxels of an axis, `[size, g]`."""
    positions = torch.linspace(0, 1, size, dtype=torch.float64)
    if interpolator == "bspline":
        return bspline(bspline_knots(grid_size), 3, positions).float()
    distance = (positions[:, None] * (grid_size - 1) - torch.arange(grid_size)).abs()
    return (1 - distance).clamp_min(0).float()


def control_positions(interpolator: str, grid_size: int) -> torch.Tensor:
    """Where the control points of an axis sit, in [0, 1]; for the cubic spline its Greville abscissae."""
    if interpolator == "bspline":
        return bspline_knots(grid_size)[1:-1].unfold(0, 3, 1).mean(-1)
    return torch.linspace(0, 1, grid_size, dtype=torch.float64)


def bspline_knots(grid_size: int) -> torch.Tensor:
    """Clamped knots of a cubic spline with `grid_size` coefficients over [0, 1]."""
    inner = torch.linspace(0, 1, grid_size - 2, dtype=torch.float64)
    return torch.cat([inner.new_zeros(3), inner, inner.new_ones(3)])


def bspline(knots: torch.Tensor, degree: int, x: torch.Tensor) -> torch.Tensor:
    """B-splines of a degree at positions: `[P, len(knots) - degree - 1]` (Cox-de Boor)."""
    if degree == 0:
        # The last cell is closed on both sides.
        last = int((knots < knots[-1]).sum()) - 1
        cell = (torch.searchsorted(knots, x, right=True) - 1).clamp_max(last)
        return F.one_hot(cell, len(knots) - 1).to(x)
    lower, width = bspline(knots, degree - 1, x), knots[degree:] - knots[:-degree]
    rising = (x[:, None] - knots[:-degree]) / torch.where(width > 0, width, 1)
    return rising[:, :-1] * lower[:, :-1] + (1 - rising[:, 1:]) * lower[:, 1:]


@constant
def bspline_gram(grid_size: int, derivative: int) -> torch.Tensor:
    """Integrals over [0, 1] of products of derivatives of the cubic B-splines, `[g, g]`."""
    # Four Gauss points a cell integrate products of cubics exactly.
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(4))
    cells = grid_size - 3
    x = ((torch.arange(cells)[:, None] + (nodes + 1) / 2) / cells).flatten()
    # The derivative of a spline: one of a lower degree whose coefficients are scaled differences.
    knots, differences = bspline_knots(grid_size), torch.eye(grid_size, dtype=torch.float64)
    for degree in range(3, 3 - derivative, -1):
        span = knots[degree + 1 : -1] - knots[1 : -degree - 1]
        differences, knots = degree * differences.diff(dim=0) / span[:, None], knots[1:-1]
    values = bspline(knots, 3 - derivative, x) @ differences
    return (values.T @ (weights.repeat(cells)[:, None] / (2 * cells) * values)).float()


@constant
def identity_grid(shape: tuple[int, int, int]) -> torch.Tensor:
    """Coordinates of every voxel as `F.grid_sample` counts them, -1 to 1, `[X, Y, Z, 3]`."""
    axes = [torch.linspace(-1, 1, size) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def contract(values: torch.Tensor, matrices: list[torch.Tensor], axes: tuple[int, int, int]) -> torch.Tensor:
    """Apply a matrix an axis to `[N, x, y, z, C]`, in the given order: a growing field grows along x last."""
    for axis in axes:
        rest = values.shape[axis + 1 :]
        values = (matrices[axis - 1] @ values.flatten(axis + 1)).unflatten(-1, rest)
    return values


def interpolate(control_grid: torch.Tensor, shape: tuple[int, int, int], interpolator: str) -> torch.Tensor:
    """Dense field of a control grid, `[N, X, Y, Z, 3]`."""
    matrices = [axis_weights(interpolator, g, size) for g, size in zip(control_grid.shape[1:4], shape, strict=True)]
    return contract(control_grid, matrices, axes=(3, 2, 1))


def warp(volume: torch.Tensor, displacement: torch.Tensor) -> torch.Tensor:
    """Pull-back of `[N, C, X, Y, Z]`, trilinear, border padding."""
    shape = tuple(displacement.shape[1:4])
    scale = displacement.new_tensor([2 / (size - 1) for size in shape])
    points = torch.addcmul(identity_grid(shape), displacement, scale)
    # `grid_sample` wants the coordinates from the last axis to the first: turning the volume's axes costs no copy.
    return F.grid_sample(volume.transpose(2, 4), points, mode="bilinear", padding_mode="border", align_corners=True)


def one_hot(labels: torch.Tensor, num_labels: int) -> torch.Tensor:
    """`[N, X, Y, Z]` ids, 0 for background, as `[N, num_labels, X, Y, Z]` float."""
    ids = torch.arange(1, num_labels + 1).view(-1, 1, 1, 1)
    return (labels.unsqueeze(1) == ids).float()


def soft_dice(fixed: torch.Tensor, warped: torch.Tensor) -> torch.Tensor:
    """One minus the mean Dice overlap of one-hot maps over the labels that occur, `[N]`."""
    total = fixed.sum((2, 3, 4)) + warped.sum((2, 3, 4))
    overlap = 2 * (fixed * warped).sum((2, 3, 4)) / torch.where(total > 0, total, 1)
    present = total > 0
    return (present * (1 - overlap)).sum(1) / present.sum(1).clamp_min(1)


def spline_bending_energy(control_grid: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """Bending energy of the cubic spline, mean over domain and components, in closed form, `[N]`."""
    total = 0
    for orders, count in BENDING.items():
        matrices = [bspline_gram(g, order) for g, order in zip(control_grid.shape[1:4], orders, strict=True)]
        scale = math.prod((size - 1) ** order for size, order in zip(shape, orders, strict=True)) ** 2
        product = contract(control_grid, matrices, axes=(3, 2, 1))
        total = total + count / scale * (control_grid * product).sum((1, 2, 3, 4))
    return total / 3


def bending_energy(displacement: torch.Tensor) -> torch.Tensor:
    """Bending energy by finite differences, mean over interior voxels and components, `[N]`."""

    def at(x=0, y=0, z=0):
        size = displacement.shape
        return displacement[:, 1 + x : size[1] - 1 + x, 1 + y : size[2] - 1 + y, 1 + z : size[3] - 1 + z]

    middle, energy = 2 * at(), 0
    for axis in "xyz":
        energy = energy + (at(**{axis: 1}) - middle + at(**{axis: -1})).square()
    for a, b in ("xy", "xz", "yz"):
        mixed = (at(**{a: 1, b: 1}) - at(**{a: 1, b: -1}) - at(**{a: -1, b: 1}) + at(**{a: -1, b: -1})) / 4
        energy = energy + 2 * mixed.square()
    return energy.mean((1, 2, 3, 4))


def objective(
    displacement: torch.Tensor,
    control_grid: torch.Tensor,
    batch: dict[str, torch.Tensor],
    *,
    interpolator: str,
    num_labels: int,
    dice: float,
    bending: float,
) -> torch.Tensor:
    """Mean squared difference of the images, soft Dice and bending energy, weighted, `[N]`.

    Args:
      batch: `fixed`, `moving` `[N, 1, X, Y, Z]`, `fixed_labels`, `moving_labels` `[N, X, Y, Z]`.
    """
    # Image and labels in one call: they share the corners and weights of the points.
    moving = torch.cat([batch["moving"], one_hot(batch["moving_labels"], num_labels)], dim=1)
    warped = warp(moving, displacement)
    image = (batch["fixed"] - warped[:, :1]).square().mean((1, 2, 3, 4))
    overlap = soft_dice(one_hot(batch["fixed_labels"], num_labels), warped[:, 1:])
    if interpolator == "bspline":
        energy = spline_bending_energy(control_grid, tuple(displacement.shape[1:4]))
    else:
        energy = bending_energy(displacement)
    return image + dice * overlap + bending * energy


@torch.no_grad()
def load_flax_params(module: GridReg, params: dict) -> GridReg:
    """Copy parameters of the JAX module, nested dicts of arrays with or without "params" on top; returns the module."""
    params = params.get("params", params)
    for index, level in enumerate(module.encoder.levels):
        _assign(level[0], params["encoder"][f"level{index}"])
    for index, layer in zip(module.decoded, module.projections, strict=True):
        _assign(layer, params[f"projection{index}"])
    for name in ("start", "head_norm", "head"):
        _assign(getattr(module, name), params[name])
    for index, level in enumerate(module.decoder):
        attention = params["decoder"]["CrossAttention_0"]
        norm, dense, _, last = level.perceptron
        layers = {"LayerNorm_0": level.state_norm, "LayerNorm_1": level.token_norm, "LayerNorm_2": norm}
        layers |= {"Dense_0": dense, "Dense_1": last}
        for name, layer in layers.items():
            _assign(layer, params["decoder"][name], index)
        for name in ("query", "key", "value", "out"):
            _assign(getattr(level.attention, name), attention[name], index)
        level.attention.bias.copy_(torch.tensor(np.asarray(attention["bias"])[index]))
    return module


def _assign(layer: nn.Module, arrays: dict, index: int | tuple = ()) -> None:
    """Set weight and bias of a layer; `index` picks the level where the levels' arrays are stacked."""
    for name, array in arrays.items():
        value = torch.tensor(np.asarray(array)[index])
        if name == "kernel":
            value = value.T if value.ndim == 2 else value.permute(4, 3, 0, 1, 2)
        getattr(layer, "bias" if name == "bias" else "weight").copy_(value)
