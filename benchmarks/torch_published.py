"""The network that GridReg's authors published, in PyTorch, for what it costs: written from its layers' description.

Differs from theirs in what costs nothing: heads are merged in order, the warp leaves the image where it is if nothing
moves, and what they build but never run is left out. With five levels of width 16, 304 407 parameters are left.
"""

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.torch_gridreg import WIDTHS, constant

POOLED, SKIPS = 3, (3, 2, 1)  # levels that end in max pooling; levels that are projected after the bottom one
HEADS, CHANNELS, ENCODING = 2, 128, 32  # of the projections' attention, and of its queries' position encoding


class PublishedGridReg(nn.Module):
    """Convolutions of stride 1 and max pooling, global attention from every control point, three decoder channels."""

    def __init__(self, levels: int = 5, width: int = 16):
        super().__init__()
        widths = [2, *(width * times for times in WIDTHS[:levels])]
        self.levels = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(before, after, 3, padding=1),
                nn.InstanceNorm3d(after),
                nn.ReLU(inplace=True),
                nn.MaxPool3d(2) if level < POOLED else nn.Identity(),
            )
            for level, (before, after) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.bottom = nn.Linear(widths[-1], 3)
        self.projections = nn.ModuleList(Projection(widths[level + 1]) for level in SKIPS)
        self.decoder = nn.ModuleList(nn.Linear(3 + CHANNELS, 3) for _ in SKIPS)

    def forward(
        self, fixed: torch.Tensor, moving: torch.Tensor, grid_size: tuple[int, int, int] = (10, 10, 10)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Displacement `[N, X, Y, Z, 3]` and control grid `[N, gx, gy, gz, 3]`, both in voxels."""
        shape, pyramid = fixed.shape[2:], [torch.cat([fixed, moving], dim=1)]
        for level in self.levels:
            pyramid.append(level(pyramid[-1]))
        encoding = position_encoding(grid_size)
        state = self.bottom(F.adaptive_avg_pool3d(pyramid[-1], grid_size).flatten(2).transpose(1, 2))
        for level, projection, layer in zip(SKIPS, self.projections, self.decoder, strict=True):
            projected = projection(encoding, pyramid[level + 1].flatten(2).transpose(1, 2))
            state = layer(torch.cat([F.leaky_relu(state, 0.1), projected], dim=-1))
        half = state.new_tensor([(size - 1) / 2 for size in shape])
        control_grid = (state.tanh() * half).unflatten(1, grid_size)
        dense = F.interpolate(control_grid.movedim(-1, 1), shape, mode="trilinear", align_corners=True)
        return dense.movedim(1, -1), control_grid


class Projection(nn.Module):
    """Attention from every control point to every voxel of a level."""

    def __init__(self, features: int):
        super().__init__()
        self.query = nn.Linear(ENCODING, CHANNELS, bias=False)
        self.key, self.value = (nn.Linear(features, CHANNELS, bias=False) for _ in range(2))
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.dropout = nn.Dropout(0.1)

    def forward(self, encoding: torch.Tensor, voxels: torch.Tensor) -> torch.Tensor:
        """`[G, 32]` and `[N, V, C]` to `[N, G, 128]`."""
        query, key, value = (
            x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)
            for x in (self.query(encoding), self.key(voxels), self.value(voxels))
        )
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
        return self.out((self.dropout(weights) @ value).transpose(1, 2).flatten(2))


@constant
def position_encoding(grid_size: tuple[int, int, int]) -> torch.Tensor:
    """Sines and cosines of the control points' coordinates in [-1, 1], `[G, 32]`; the last two are 0."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, g) for g in grid_size), indexing="ij")
    phase = torch.stack(axes, dim=-1).reshape(-1, 3, 1) * torch.logspace(0, 3, 5)
    return F.pad(torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(1), (0, 2))
