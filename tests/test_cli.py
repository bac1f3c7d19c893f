"""The command, as a user types it."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from jax_monokernel import __version__
from jax_monokernel.cli import app


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
        (["x", "--model", "no/such/folder/here"], "check the path"),
        (["x", "--top-p", "7"], "top_p is 7.0"),
        (["x", "--dtype", "int3"], "int3"),
        (["", "-n", "3"], "the prompt is empty"),
    ],
    ids=["model", "top_p", "dtype", "empty"],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    result = run("generate", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "x", "-n", "0"], ["nonsense"]])
def test_usage_errors_exit_with_2(arguments):
    assert run(*arguments).exit_code == 2


def test_help_names_every_option():
    code = "import sys; from jax_monokernel import cli; cli.app(['generate', '--help'], standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for option in ("--model", "--max-new-tokens", "--temperature", "--seed", "--threads"):
        assert option in done.stdout


def test_version_and_isa():
    assert run("--version").stdout.strip() == __version__
    assert "scalar" in run("isa").stdout or "neon" in run("isa").stdout
