"""GridReg in JAX: medical image registration by sparse control grids."""

__version__ = "0.1.0"
