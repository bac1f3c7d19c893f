"""The `jax-monokernel` command."""

from __future__ import annotations

import io
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from jax_monokernel._cli_bench import bench
from jax_monokernel._cli_chat import chat
from jax_monokernel._version import __version__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Decode language models from JAX, a whole request in one XLA custom call.",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _report(message: object) -> None:
    # One line, whatever the error's text looks like.
    typer.echo("error: " + " ".join(str(message).split()), err=True)


def _fail(message: object) -> NoReturn:
    _report(message)
    raise typer.Exit(2)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or Hugging Face model id. By default the small model in this package."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to generate.")] = 160,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this total probability.")] = 0.9,
    min_p: Annotated[float, typer.Option(help="Leave out tokens with less than this share of the best's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that occurred become less likely.")] = 1.05,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed and prompt give the same text.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default as the checkpoint says.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. By default MONOKERNEL_THREADS, else all CPUs available.")
    ] = None,
    stats: Annotated[bool, typer.Option(help="Print speed and share of the memory roof at the end.")] = True,
) -> None:
    """Continue a prompt, printing the text as it is made."""
    options = {
        "do_sample": temperature > 0,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        text = _standard_input() if prompt == "-" else prompt
        _generate(text, model, max_new_tokens, options, seed, dtype, threads, stats)
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever reads the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left goes at exit
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        _fail(error)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text: {error}") from None


def _generate(
    text: str,
    source: str | None,
    max_new_tokens: int,
    options: dict[str, Any],
    seed: int,
    dtype: str | None,
    threads: int | None,
    stats: bool,
) -> None:
    # Here rather than above, so that --help and usage errors do not wait for JAX.
    import jax
    import numpy as np

    from jax_monokernel import _native, models
    from jax_monokernel.generation_config import GenerationConfig
    from jax_monokernel.plan import default_platform, make_plan
    from jax_monokernel.prefill import bucket, check_ids
    from jax_monokernel.prepared import prepare
    from jax_monokernel.state import empty_state
    from jax_monokernel.streaming import stream

    # What can be checked before the model is loaded.
    config = GenerationConfig(max_new_tokens=max_new_tokens, **options)
    _native.current_isa()
    loaded = models.from_pretrained(models.SMALL if source is None else source, dtype=dtype)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer.json, so text cannot be turned into tokens")
    spec = loaded.spec
    if threads is not None and default_platform() != "cpu":
        raise ValueError("--threads is for CPUs, and JAX uses a GPU here; leave it out, or set JAX_PLATFORMS=cpu")
    ready = prepare(loaded, make_plan(spec, units=threads))
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    check_ids(spec, np.asarray(ids))
    start = time.perf_counter()
    capacity = bucket(len(ids)) + bucket(max_new_tokens)
    try:
        state = empty_state(spec, batch=1, capacity=capacity, key=jax.random.key(seed))
    except jax.errors.JaxRuntimeError:
        raise ValueError(
            f"there is not enough memory for a KV cache of {bucket(max_new_tokens)} tokens; lower --max-new-tokens"
        ) from None
    made, first, times = 0, 0.0, []
    with stream(ready, [ids], state=state, config=config, return_log_probs=False) as pieces:
        for piece in pieces:
            if not made:
                first = time.perf_counter() - start
                sys.stdout.write(text)
            made += 1
            times.append(piece.time)
            if piece.text:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if pieces.result.finish_reasons == ["capacity"]:
        typer.echo("the KV cache is full", err=True)
    if stats and len(times) > 1:
        _print_stats(made, statistics.median(np.diff(times).tolist()), first, ready.tape)


def _print_stats(made: int, seconds_per_token: float, first: float, tape: Any) -> None:
    from jax_monokernel._roof import read_roof

    rate = tape.bytes_per_token / seconds_per_token
    roof = read_roof(tape)
    share = "" if roof is None else f", {roof.share(rate)}"
    typer.echo(
        f"\n{made} tokens, {1 / seconds_per_token:,.0f} tok/s; weights read at {rate / 1e9:.1f} GB/s{share}; "
        f"first text after {first:.1f} s, compilation included",
        err=True,
    )


app.command(name="chat")(chat)


@app.command(name="compile")
def compile_(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or Hugging Face model id. By default the small model in this package."),
    ] = None,
    batch: Annotated[
        list[int], typer.Option(min=1, max=16, metavar="N", help="Requests of a call; may be given again.")
    ] = [1],  # noqa: B006
    capacity: Annotated[
        int, typer.Option(min=1, help="Positions of the KV cache, as of decode's. Up to 256 all give the same kernel.")
    ] = 2048,
    arch: Annotated[str | None, typer.Option(help="sm_90, gfx942, ... By default that of the GPU here.")] = None,
    units: Annotated[
        int | None, typer.Option(min=1, help="Multiprocessors or compute units. By default those of the GPU.")
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of units, as for make_plan, which decides by default.")
    ] = None,
    placed: Annotated[
        bool, typer.Option("--placed", help="For weights that are placed near units, on AMD GPUs that were measured.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default as the checkpoint says.")
    ] = None,
) -> None:
    """Compile a model's GPU kernel ahead of time. Needs the vendor's run-time compiler, but no GPU."""
    from jax_monokernel import _gpu, models
    from jax_monokernel.models.loading import pretrained_spec

    try:
        target = _gpu.target(arch, units)
        spec = pretrained_spec(models.SMALL if model is None else model, dtype=dtype)
        for size in batch:
            compiled = _gpu.compile_ahead(spec, target, batch=size, capacity=capacity, groups=groups, placed=placed)
            if not compiled.path:
                _fail("the kernel could not be saved; set MONOKERNEL_CACHE_DIR to a folder that can be written")
            how = f"compiled in {compiled.seconds:.1f} s" if compiled.seconds else "in the cache already"
            typer.echo(f"{target.arch}, {target.units} units, batch {size}: {how}: {compiled.path}")
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)


@app.command()
def doctor(
    test: Annotated[bool, typer.Option(help="Compile and run small models, which takes up to a minute.")] = True,
) -> None:
    """Say what this machine has for decoding and whether it works: a report that can be pasted into a bug report."""
    from jax_monokernel.doctor import report

    def print_(line: str) -> None:
        typer.echo(line)
        sys.stdout.flush()

    if not report(print_, test=test):
        raise typer.Exit(1)


@app.command(name="topology")
def topology(
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Probe the GPU, or with --platform cpu the CPUs, in a few seconds, and keep the result."
        ),
    ] = False,
    platform: Annotated[
        str | None, typer.Option(help="cpu, cuda or rocm. By default the first GPU, or the CPUs where there is none.")
    ] = None,
    device: Annotated[int, typer.Option(min=0, help="Its number among the GPUs of that platform.")] = 0,
    part: Annotated[
        str | None, typer.Option(help="A part that is not here instead: MI300X, MI355X/QPX/NPS1, H200, ...")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="With --measure: also write all that was measured to this file, .json or .json.gz."),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(help="File of --output, of a device measured elsewhere, instead of one here."),
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for pictures of groups, and of what was measured. Needs matplotlib.")
    ] = None,
    format: Annotated[str, typer.Option(help="Of pictures: png or svg.")] = "png",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint or Hugging Face model id, or small: for its placement and plan."),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of units, in the plan that is drawn. By default as choose_groups says.")
    ] = None,
) -> None:
    """Print what a device looks like: groups of units, memory domains, and what crossing them costs."""
    from jax_monokernel import topology as topologies
    from jax_monokernel.topology.store import check_record_name

    try:
        if groups is not None and (model is None or pictures is None):
            raise ValueError("--groups is for the picture of a plan; give --model and --pictures too")
        if part is not None and (measure or platform is not None):
            raise ValueError("--part is for a device that is not here; leave --measure and --platform out")
        if platform not in (None, "cpu", "cuda", "rocm"):
            raise ValueError(f"--platform is {platform}; expected cpu, cuda or rocm")
        if recorded is not None and (measure or part is not None or platform is not None):
            raise ValueError("--recorded is for a device that is not here; leave --measure, --part and --platform out")
        if output is not None and (not measure or platform == "cpu"):
            raise ValueError("--output is for what is measured of a GPU; give --measure too")
        if output is not None:
            check_record_name(output)
        if recorded is not None:
            measurement = topologies.recorded(recorded)
            found = topologies.Found(topologies.topology_of(measurement), measurement)
        elif part is not None:
            name, _, mode = part.partition("/")
            compute, _, memory = mode.upper().partition("/")
            made = topologies.part(name, compute=compute or "SPX", memory=memory or "NPS1")
            found = topologies.Found(made, None)
        elif measure:
            start = time.perf_counter()
            found = topologies.measure_device(
                platform,  # type: ignore[arg-type]
                device,
                report=lambda text: typer.echo(f"{time.perf_counter() - start:5.1f} s  {text}", err=True),
            )
        else:
            found = topologies.discover(platform, device)  # type: ignore[arg-type]
        typer.echo(topologies.tree(found.topology))
        if output is not None and found.measurement is not None:
            topologies.record(output, found.measurement)
            typer.echo(f"written: {output}", err=True)
        spec = None
        if model is not None:
            from jax_monokernel import models
            from jax_monokernel.models.loading import pretrained_spec
            from jax_monokernel.topology.placement import report

            spec = pretrained_spec(models.SMALL if model == "small" else model)
            typer.echo(f"placement of {model}'s pages: {report(spec, found)}")
        if pictures is not None:
            from jax_monokernel.plan import make_plan
            from jax_monokernel.topology.draw import draw

            device_ = found.topology
            plan = None
            if groups is not None and spec is not None:
                plan = make_plan(spec, platform=device_.platform, units=device_.units, groups=groups)
            for path in draw(found, pictures, spec=spec, plan=plan, model=model or "", format=format):
                typer.echo(f"drawn: {path}")
        if measure and found.measurement is not None and found.measurement.missing:
            # What was found has been printed, and written where that was asked for.
            raise RuntimeError(f"not all was measured: {'; '.join(found.measurement.missing.values())}")
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError, RuntimeError) as error:
        _fail(error)


@app.command(name="isa")
def isa() -> None:
    """Print this machine's CPU kernels, the one in use first."""
    from jax_monokernel import _native

    try:
        current = _native.current_isa()
    except ValueError as error:
        _fail(error)
    typer.echo("\n".join([current, *(name for name in _native.available_isas() if name != current)]))


app.command()(bench)


def main() -> None:
    """Entry point of the command."""
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # Usage errors are click's, or those of typer's own copy of it.
        if not hasattr(error, "format_message"):
            raise
        _report(error.format_message().rstrip(".") + " (see --help)")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
