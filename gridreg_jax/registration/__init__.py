"""Registration of two images, from files to files; a trained network may begin it, but none is needed."""

from gridreg_jax.registration.register import Registration, register

__all__ = ["Registration", "register"]
