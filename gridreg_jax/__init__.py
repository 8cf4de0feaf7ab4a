"""GridReg in JAX: medical image registration by sparse control grids."""

__version__ = "0.1.0"


def __dir__() -> list[str]:
    return [*globals(), "register"]


def __getattr__(name: str):
    # Found when it is used, so that importing the package stays light.
    if name == "register":
        from gridreg_jax.registration import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
