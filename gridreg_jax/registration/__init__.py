"""Registration of two images, from files to files; no training is needed."""

from gridreg_jax.registration.register import Registration, register

__all__ = ["Registration", "register"]
