"""The command `jax-monokernel bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

SCHEMA = 1  # of the JSON file
_CLEAR = "\r\x1b[2K"


def _say(line: str) -> None:
    _progress("")
    typer.echo(line)


def _progress(text: str) -> None:
    """In a terminal, what is being done now, in a line that the next one takes the place of."""
    if sys.stderr.isatty():
        sys.stderr.write(_CLEAR + text)
        sys.stderr.flush()


def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL", help="Checkpoint folder, Hugging Face model id, or small, the default; may be given again."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="Random weights of a published shape: smollm2-135m, qwen3-0.6b, ...; may be given again.",
        ),
    ] = None,
    batch: Annotated[
        list[int], typer.Option(min=1, max=16, metavar="N", help="Requests together; may be given again.")
    ] = [1],  # noqa: B006
    prompt: Annotated[
        list[int], typer.Option(min=2, metavar="N", help="Tokens of the prompts; may be given again.")
    ] = [32],  # noqa: B006
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a call.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="In each, every peer is measured once.")] = 10,
    peers: Annotated[
        str, typer.Option(help="Of ours, jax_loop (a jitted JAX loop) and probe (the memory's read roof).")
    ] = "ours,jax_loop,probe",
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default the checkpoint's, or bfloat16.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of ours and of the probe.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File for the results.")] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture, .svg or .png. Needs matplotlib.")] = None,
) -> None:
    """Measure decode beside a jitted JAX loop and the memory's read roof, all in this process.

    Every combination of models, batches and prompts is measured, in rounds in which each peer has its turn.
    """
    try:
        # Here rather than above, so that --help and usage errors do not wait for JAX.
        from jax_monokernel._bench.plot import check, draw
        from jax_monokernel._bench.sweep import Sweep, run

        if plot is not None:
            check(plot)
        if output is not None and not output.absolute().parent.is_dir():
            raise ValueError(f"{output} lies in a folder that is not there")
        sweep = Sweep(
            models=tuple(model or (() if shape else ("small",))),
            shapes=tuple(shape or ()),
            batches=tuple(batch),
            prompts=tuple(prompt),
            new_tokens=new_tokens,
            rounds=rounds,
            peers=tuple(peers.split(",")),
            dtype=dtype,
            threads=threads,
        )
        results = run(sweep, _say, _progress)
        if output is not None:
            output.write_text(json.dumps({"schema": SCHEMA, "results": results}, indent=1) + "\n")
        if plot is not None:
            draw(results, plot)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo("error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from None
