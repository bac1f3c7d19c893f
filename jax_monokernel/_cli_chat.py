"""`jax-monokernel chat`: a conversation in the terminal, or with a pipe."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from jax_monokernel._roof import Roof
    from jax_monokernel.chat import Chat, Piece

_HELP = """\
/reset         forget the conversation, but not the system message
/system TEXT   another system message; without a text, none
/save FILE     write the conversation as JSON
/load FILE     go on from a saved conversation
/quit          end; so does Ctrl-D
//...          a message that begins with /
Ctrl-C stops an answer."""


def chat(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or Hugging Face model id. By default the small model in this package."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="First message, which says how to answer.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="File with a chat template in Jinja, or plain for models that know no conversations: they go on with "
            "what you write. By default the checkpoint's own."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens of an answer.")] = 512,
    capacity: Annotated[int, typer.Option(min=1, help="Tokens of the whole conversation.")] = 4096,
    stop: Annotated[
        list[str], typer.Option(metavar="TEXT", help="A text before which answers end; may be given again.")
    ] = [],  # noqa: B006
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens of this total probability.")] = 0.9,
    min_p: Annotated[float, typer.Option(help="Leave out tokens with less than this share of the best's.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that occurred become less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="The same seed and messages give the same text.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32. By default as the checkpoint says.")
    ] = None,
    history: Annotated[Path | None, typer.Option(help="A saved conversation to go on from.")] = None,
    stats: Annotated[bool, typer.Option(help="Print speed and share of the memory roof after answers.")] = True,
) -> None:
    """Talk to a model. Only what is new of a conversation is prefilled in each turn."""
    options = {"do_sample": temperature > 0, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"temperature": temperature, "repetition_penalty": repetition_penalty}
    try:
        made = _make(model, system, template, max_new_tokens, capacity, stop, options, seed, dtype)
        if history is not None:
            made.load(history)
        _Session(made, str(model or "the small model"), stats=stats).run()
    except KeyboardInterrupt:
        typer.echo("\ninterrupted", err=True)
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever reads the answers has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        typer.echo(f"error: {_one_line(error)}", err=True)
        raise typer.Exit(2) from None


def _make(
    model: str | None,
    system: str | None,
    template: str | None,
    max_new_tokens: int,
    capacity: int,
    stop: list[str],
    options: dict[str, Any],
    seed: int,
    dtype: str | None,
) -> Chat:
    # Here rather than above, so that --help and usage errors do not wait for JAX.
    import jax

    from jax_monokernel import models
    from jax_monokernel.chat import Chat
    from jax_monokernel.generation_config import GenerationConfig
    from jax_monokernel.prepared import prepare

    # What can be checked before the model is loaded.
    GenerationConfig(max_new_tokens=max_new_tokens, **options)
    if template is not None and template != "plain":
        template = Path(template).read_text(encoding="utf-8")
    loaded = models.from_pretrained(models.SMALL if model is None else model, dtype=dtype)
    if not options["do_sample"]:
        options = {"repetition_penalty": options["repetition_penalty"]}
    try:
        return Chat(
            prepare(loaded),
            system=system,
            template=template,
            max_new_tokens=max_new_tokens,
            capacity=capacity,
            stop=stop,
            key=jax.random.key(seed),
            **options,
        )
    except ValueError as error:
        if "no chat template" not in str(error):
            raise
        raise ValueError(
            f"{model or 'the small model in this package'} has no chat template, so it was probably not trained on "
            "conversations; --template plain has it go on with what you write, --template FILE takes one in Jinja"
        ) from None


class _Session:
    """Questions from standard input, answers to standard output, everything else to the terminal or standard error."""

    def __init__(self, chat: Chat, name: str, *, stats: bool):
        from rich.console import Console

        self.chat = chat
        self.name = name
        self.stats = stats
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.console = Console(highlight=False, soft_wrap=True)
        self._roof: Roof | None = None
        self._roof_known = False

    def run(self) -> None:
        if self.terminal:
            if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, signal.default_int_handler)  # until here it ends the command
            self.note(f"{self.name}. /help has commands, Ctrl-C stops an answer, Ctrl-D ends.")
        for line in self.lines():
            if not line.strip():
                continue
            if line.startswith("/") and not line.startswith("//"):
                if line.split()[0] in ("/quit", "/exit"):
                    return
                self.guarded(lambda line=line: self.command(line))  # type: ignore[misc]
            else:
                text = line[1:] if line.startswith("//") else line
                self.guarded(lambda text=text: self.turn(text))  # type: ignore[misc]

    def lines(self) -> Iterator[str]:
        if not self.terminal:
            try:
                yield from (line.rstrip("\r\n") for line in sys.stdin)
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input is not text: {error}") from None
            return
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history and can be edited
        while True:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                self.note("\nCtrl-D or /quit ends")
            except EOFError:
                print()
                return

    def guarded(self, action: Callable[[], None]) -> None:
        """In a terminal, an error is no reason to end the session."""
        try:
            action()
        except (ValueError, OSError) as error:
            if not self.terminal or isinstance(error, BrokenPipeError):
                raise
            self.note(f"error: {_one_line(error)}")

    def note(self, text: str) -> None:
        if self.terminal:
            self.console.print(text, style="dim", markup=False)
        else:
            typer.echo(text, err=True)

    def command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/help":
            self.note(_HELP)
        elif name == "/reset":
            self.chat.reset()
            self.note("forgotten")
        elif name == "/system":
            self.chat.system = rest or None
            self.note("the system message is another one from now on" if rest else "there is no system message now")
        elif name in ("/save", "/load") and rest:
            path = Path(rest).expanduser()
            self.chat.save(path) if name == "/save" else self.chat.load(path)
            self.note(f"{len(self.chat.history)} messages {'written to' if name == '/save' else 'read from'} {path}")
        elif name in ("/save", "/load"):
            raise ValueError(f"{name} needs the name of a file")
        else:
            raise ValueError(f"there is no command {name}; /help lists them")

    def turn(self, text: str) -> None:
        import jax

        answer = self.chat.send(text)
        with _CtrlC() as ctrl_c:
            try:
                pieces = ctrl_c.until_pressed(answer)
                if self.terminal:
                    waiting = "prefilling" if self.chat.last else "compiling, which the first answer waits for"
                    _show_live(self.console, pieces, _Growing(waiting, ctrl_c))
                else:
                    _show_plain(pieces)
            except (jax.errors.JaxRuntimeError, ValueError) as error:
                if not ctrl_c.pressed:  # a decode that is stopped raises one of these
                    raise ValueError(error) from error
            finally:
                answer.close()  # type: ignore[attr-defined]
        if ctrl_c.pressed:
            self.note("stopped")
        elif self.chat.last is not None and self.chat.last.finish_reason == "capacity":
            self.note("the conversation fills the KV cache; /reset, or start with a larger --capacity")
        if self.stats:
            self.note(self.summary())

    def summary(self) -> str:
        """After an answer."""
        turn, tape = self.chat.last, self.chat.prepared.tape
        assert turn is not None
        made = f"{turn.new_tokens or 'no'} token{'s' if turn.new_tokens != 1 else ''}"
        prefilled = (
            f"{turn.prefilled_tokens} of {turn.conversation_tokens} tokens before them prefilled in "
            f"{turn.prefill_seconds:.2f} s"
        )
        if not turn.tokens_per_second:  # of a single token there is no speed
            return f"{made}; {prefilled}"
        if not self._roof_known:
            from jax_monokernel._roof import read_roof

            self._roof, self._roof_known = read_roof(tape), True
        speed = turn.tokens_per_second
        share = "" if self._roof is None else f", {self._roof.share(speed * tape.bytes_per_token)}"
        return f"{made}, {speed:,.0f} tok/s{share}; {prefilled}"


def _show_plain(pieces: Iterable[Piece]) -> None:
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


class _Growing:
    """What is redrawn under the finished lines of an answer: the line that grows and the speed, or what is awaited."""

    def __init__(self, waiting: str, ctrl_c: _CtrlC):
        from rich.spinner import Spinner

        self.line = ""
        self._waiting = waiting
        self._ctrl_c = ctrl_c
        self._spinner = Spinner("dots", style="dim")
        self._count, self._first, self._last = 0, 0.0, 0.0

    def put(self, piece: Piece) -> list[str]:
        """The lines that this piece finishes."""
        self._first = self._first or piece.time
        self._count, self._last = self._count + (piece.token is not None), piece.time
        *done, self.line = (self.line + piece.text).split("\n")
        return done

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        note = self._waiting
        if self._ctrl_c.pressed:
            note = "stopping; Ctrl-C again ends the session"
        if not self._count:
            self._spinner.update(text=Text(note, style="dim"))
            return self._spinner
        seconds, count = self._last - self._first, self._count - 1
        speed = f"{count} tokens, {count / seconds:,.0f} tok/s" if seconds > 0 else ""
        return Group(Text(self.line), Text(note if self._ctrl_c.pressed else speed, style="dim"))


def _show_live(console: Console, pieces: Iterable[Piece], growing: _Growing) -> None:
    """Finished lines stay; the line that grows and the speed so far are redrawn under them."""
    from rich.live import Live
    from rich.text import Text

    with Live(growing, console=console, transient=True, refresh_per_second=15):
        for piece in pieces:
            for text in growing.put(piece):
                console.print(Text(text))
    console.print(Text(growing.line))


class _CtrlC:
    """While it is entered, Ctrl-C is only noted: a running decode stops by itself, compiling and prefill cannot be.

    Pressed again after more than a second, it raises.
    """

    def __init__(self) -> None:
        self.pressed = 0.0  # when, on the clock of time.monotonic
        self._before: Any = None

    def __enter__(self) -> _CtrlC:
        self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self.pressed and time.monotonic() > self.pressed + 1:
            raise KeyboardInterrupt
        self.pressed = self.pressed or time.monotonic()

    def until_pressed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            yield piece
            if self.pressed:
                return


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
