"""Where the command `jax-monokernel` begins: outside the package, which takes a second or more to import."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command, and exits.

    Ctrl-C ends it at any time, with a line and exit code 130. KeyboardInterrupt would come out wherever Python happens
    to be: in a library's `except` or a callback of the garbage collector, which lose it, or between a thread that
    compiles and the client that it compiles for. No command leaves anything behind that has to be ended in order; a
    chat in a terminal has a handler of its own.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as for a background job
        signal.signal(signal.SIGINT, _leave)
    from jax_monokernel.cli import main as run

    run()


def _leave(*_: object) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(130)
