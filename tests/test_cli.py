"""The command, as a user types it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jax_monokernel import __version__
from jax_monokernel.cli import app, main


def run(*arguments: str, **options):
    return CliRunner().invoke(app, list(arguments), **options)


def test_generates_text_and_says_how_fast():
    result = run("generate", "def fibonacci(n):", "-n", "24", "--threads", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def fibonacci(n):\n")
    assert len(result.stdout) > len("def fibonacci(n):\n") + 20
    assert re.search(r"24 tokens, [\d,]+ tok/s; .* \d+% of the [\d.]+ GB/s that 2 threads can read", result.stderr)


def test_the_seed_decides():
    texts = [
        run("generate", "import os", "-n", "20", "--seed", seed, "-t", "1.0", "--no-stats").stdout
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]


def test_reads_standard_input():
    result = run("generate", "-", "-n", "4", "--no-stats", "-t", "0", input="class Stack:")
    assert result.stdout.startswith("class Stack:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--model", "no/such/folder/here"], "check the path"),
        (["generate", "x", "--model", __file__], "is a file; expected the folder it is in"),
        (["generate", "x", "--model", str(Path(__file__).parent)], "config.json does not exist"),
        (["generate", "x", "--top-p", "7"], "top_p is 7.0"),
        (["generate", "x", "--top-p", "nan"], "top_p is nan"),
        (["generate", "x", "--top-k", "99999999999"], "top_k is 99999999999; expected an integer from 0"),
        (["generate", "x", "--dtype", "int3"], "int3"),
        (["generate", "", "-n", "3"], "the prompt is empty"),
        (["generate", "x\udcff"], "cannot be expressed in UTF-8"),
        (["generate", "x", "-n", str(2**40)], "max_new_tokens is 1099511627776"),
        (["generate", "x", "-n", str(2**31 - 1)], "not enough memory for a KV cache of 2147483648 tokens"),
        (["generate", "x", "--threads", "100000"], "100000; expected 1 to 4096"),
        # What typer finds out itself.
        (["generate"], "Missing argument"),
        (["generate", "x", "y"], "unexpected extra argument"),
        (["generate", "x", "-n", "-1"], "--max-new-tokens"),
        (["generate", "x", "-n", "many"], "--max-new-tokens"),
        (["generate", "x", "-t", "nan"], "temperature"),
        (["generate", "x", "--seed", str(2**32)], "--seed"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["nonsense"], "nonsense"),
    ],
    ids=lambda value: " ".join(value)[-30:] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["jax-monokernel", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def as_a_process(*arguments: str, encoding: str = "utf-8", **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jax_monokernel.cli", "generate", *arguments]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(command, stderr=subprocess.PIPE, env=environment, timeout=120, check=False, **options)


def test_standard_input_that_is_not_text():
    done = as_a_process("-", "-n", "2", input=b"caf\xe9", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"error: standard input is not text: ")
    assert done.stderr.count(b"\n") == 1


def test_output_that_cannot_show_every_character():
    done = as_a_process("# caf\xe9", "-n", "2", "--no-stats", encoding="ascii", stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"# caf?")


def test_a_reader_that_has_enough():
    read, write = os.pipe()
    os.close(read)
    done = as_a_process("x", "-n", "2", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("delay", [0.0, 0.2, 0.7, 1.5])
def test_ctrl_c_while_everything_is_imported(delay):
    # Or a model loaded, a program compiled, text made; from when the command has begun, which this code says.
    code = (
        "import signal, jax_monokernel_command as c; set = signal.signal; "
        "signal.signal = lambda *a: set(*a) and print(end='go ', flush=True); c.main()"
    )
    command = [sys.executable, "-c", code, "generate", "x", "-n", "20000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(3) == "go "
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, "\ninterrupted\n")


def test_no_command_is_help():
    assert "generate" in run().stdout


def test_help_names_every_option():
    code = "import sys; from jax_monokernel import cli; cli.app(['generate', '--help'], standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--model", "--max-new-tokens", "--temperature", "--seed", "--threads"):
        assert option in done.stdout


def test_version_and_isa():
    assert run("--version").stdout.strip() == __version__
    assert "scalar" in run("isa").stdout or "neon" in run("isa").stdout
