"""`python -m gridreg_jax`: the same as the program `gridreg`."""

from gridreg_jax.cli import main

if __name__ == "__main__":
    main()
