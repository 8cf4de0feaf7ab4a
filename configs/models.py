"""The systems that GridReg is compared with, by the name that a config's argument gives them.

Of each: every field of its network (`gridreg_jax.models`), its authors' optimiser, and their weights of smoothness with
each of the similarities that configs have.
"""

MODELS = {}
