"""`python -m jax_monokernel` is the command `jax-monokernel`."""

from jax_monokernel.cli import main

if __name__ == "__main__":
    main()
