"""Decode speed beside peers, measured in one run: see `python -m benchmarks.run --help`."""

import sys
from pathlib import Path

# `python -m` puts the repository first on the path, where the sources of jax_monokernel (without their native part)
# would hide an installed package.
_repository = Path(__file__).resolve().parent.parent
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _repository] + [str(_repository)]
