"""One runner: `python -m benchmarks COMMAND`, with `--help` after each.

run       peers beside each other on the CPUs, each in a process of its own: JSON files
gpu       likewise on a GPU, in one process
report    the README's tables and pictures, from the committed JSON files
timeline  a picture of what each unit of a GPU did, from a trace
predictions  what the performance model says of AMD's parts
calibration  how well it describes an H200, and its numbers fitted anew
streaming  what streaming costs, and when tokens come
"""

import importlib
import sys

_COMMANDS = ("run", "gpu", "report", "timeline", "predictions", "calibration", "streaming")


def main() -> None:
    """Hands the arguments to the command's own module."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print((__doc__ or "").strip())
        return
    if command not in _COMMANDS:
        sys.exit(f"there is no command {command!r}; expected one of {', '.join(_COMMANDS)}")
    if command == "run":  # before JAX starts its backends
        import jax

        jax.config.update("jax_platforms", "cpu")
    sys.argv = [f"python -m benchmarks {command}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{command}").main()


main()
