"""`jax-monokernel chat`, through a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from jax_monokernel import generate, models
from jax_monokernel.cli import app

PLAIN = ["chat", "--template", "plain", "-t", "0"]


def run(*arguments: str, text: str = "", command=PLAIN):
    return CliRunner().invoke(app, [*command, *arguments], input=text)


def test_a_conversation_through_a_pipe(tmp_path):
    saved = tmp_path / "talk.json"
    result = run("-n", "24", text=f"def add(a, b):\n\nimport os\n/save {saved}\n")
    assert result.exit_code == 0, result.output
    history = json.loads(saved.read_text())
    assert [m["role"] for m in history] == ["user", "assistant"] * 2
    assert result.stdout == f"{history[1]['content']}\n{history[3]['content']}\n"
    speeds = re.findall(
        r"24 tokens, [\d,]+ tok/s, \d+% of the [\d.]+ GB/s that \d+ threads can read; "
        r"(\d+) of (\d+) tokens before them prefilled in \d",
        result.stderr,
    )
    assert len(speeds) == 2
    assert speeds[0][0] == speeds[0][1]
    assert int(speeds[1][0]) < int(speeds[1][1]) - 20
    assert f"4 messages written to {saved}" in result.stderr
    # Gone on with, it says what it would have said.
    more = run("-n", "24", "--no-stats", text=f"def add(a, b):\nimport os\nclass A:\n/save {saved}2\n")
    resumed = run("-n", "24", "--no-stats", "--history", str(saved), text="class A:\n/quit\nnever read\n")
    assert resumed.stdout == more.stdout.removeprefix(result.stdout)
    assert resumed.stderr == ""


def test_an_answer_of_one_token_has_no_speed():
    result = run("-n", "1", text="import os\n")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"1 token; (\d+) of \1 tokens before them prefilled in [\d.]+ s\n", result.stderr)


def test_a_checkpoint_with_a_template_of_its_own(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models.SMALL, folder)
    path = folder / "tokenizer_config.json"
    own = "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}\n{{ m.content }}{{ eos_token }}{% endfor %}# A"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": own}))
    result = run("-n", "12", "--no-stats", text="hello\n", command=["chat", "-t", "0", "--model", str(folder)])
    assert result.exit_code == 0, result.output
    model = models.from_pretrained(models.SMALL)
    ids = [0, *model.tokenizer.encode("USER\nhello<|endoftext|># A", add_special_tokens=False)]
    assert result.stdout == generate(model, [ids], max_new_tokens=12).text[0] + "\n"


def test_templates_stops_and_commands(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}")
    result = run(
        "-n", "30", "--no-stats", "--stop", "e", "--system", "x", text="//hi\n/system y\n/reset\n/help\n",
        command=["chat", "--template", str(template), "--seed", "3"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "e" not in result.stdout
    assert "the system message is another one from now on\nforgotten\n/reset" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["chat"], "x\n", "the small model in this package has no chat template, .* --template plain"),
        (["chat", "--template", "/no/such/file"], "", "No such file or directory: '/no/such/file'"),
        (["chat", "--model", "no/such/folder/here"], "", "check the path"),
        ([*PLAIN, "--history", __file__], "", "is not a saved conversation"),
        ([*PLAIN, "--capacity", "3"], "def fibonacci(n):\n", "more than the 3 that this chat has room for"),
        ([*PLAIN, "--stop", ""], "", "a stop string is ''"),
        ([*PLAIN, "--top-p", "7"], "", "top_p is 7.0"),
        (PLAIN, "/nonsense\n", "there is no command /nonsense; /help lists them"),
        (PLAIN, "/save\n", "/save needs the name of a file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, text, message):
    result = run(text=text, command=arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(f"error: .*{message}.*\n", result.stderr)


def test_a_damaged_template_is_one_line_too(tmp_path):
    (tmp_path / "bad.jinja").write_text("\n{% for %}")
    result = run(command=["chat", "--template", str(tmp_path / "bad.jinja")])
    assert result.exit_code == 2
    assert re.fullmatch(r"error: the chat template is not valid Jinja: .* \(line 2\)\n", result.stderr)


class Terminal:
    """A process in a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *arguments: str):
        main, side = pty.openpty()
        # A new session takes its first terminal for its own when it opens it.
        code = "import os; os.close(os.open(os.ttyname(0), os.O_RDWR)); from jax_monokernel_command import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=side, stdout=side, stderr=side, start_new_session=True, env=os.environ | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(side)
        self.main, self.seen, self.read_to = main, "", 0

    def expect(self, pattern: str, seconds: float = 90) -> re.Match:
        """Waits for what matches after what was expected before."""
        until = time.monotonic() + seconds
        while True:
            found = re.compile(pattern).search(self.seen, self.read_to)
            if found:
                self.read_to = found.end()
                return found
            if not select.select([self.main], [], [], max(0, until - time.monotonic()))[0]:
                raise AssertionError(f"{pattern!r} did not come after:\n{self.seen}")
            try:
                data = os.read(self.main, 65536)
            except OSError:  # the process has ended
                data = b""
            if not data:
                raise AssertionError(f"the process ended before {pattern!r}:\n{self.seen}")
            self.seen += data.decode(errors="replace")

    def press(self, key: str, pattern: str) -> None:
        """Presses a key until what matches comes: Python loses a Ctrl-C between a prompt and its waiting for keys."""
        for _ in range(20):
            self.type(key)
            try:
                self.expect(pattern, seconds=3)
            except AssertionError:
                continue
            return
        raise AssertionError(f"{pattern!r} did not come after:\n{self.seen}")

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())

    def wait(self) -> int:
        while True:
            try:
                if not os.read(self.main, 65536):
                    break
            except OSError:
                break
        return self.process.wait(60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)


@pytest.fixture
def terminal():
    made = Terminal(*PLAIN, "-n", "30000", "--capacity", "32000")
    yield made
    made.close()


def test_ctrl_c_stops_the_answer_and_not_the_session(terminal):
    terminal.expect("the small model. /help has commands")
    terminal.expect("> ")
    terminal.press("\x03", "Ctrl-D or /quit ends")
    terminal.expect("> ")
    for awaited in ("compiling", "prefilling"):
        terminal.type("import os\n")
        terminal.expect(awaited)
        terminal.expect("[1-9]\\d* tokens, [1-9][\\d,]* tok/s")
        start = time.monotonic()
        terminal.type("\x03\x03")  # whoever is impatient does not lose the session
        terminal.expect("stopped")
        assert time.monotonic() - start < 20
        # What was said stays part of the conversation.
        terminal.expect("tok/s, \\d+% of the .* GB/s that .* threads can read; \\d+ of \\d+ tokens before them")
        terminal.expect("> ")
    terminal.type("/save /no/such/folder/x\n")
    terminal.expect("error: .*No such file or directory")
    terminal.expect("> ")
    terminal.type("/nonsense\n")
    terminal.expect("error: there is no command /nonsense")
    terminal.expect("> ")
    terminal.type("\x1b[A")  # up
    terminal.expect("/nonsense")
    terminal.type("\n")
    terminal.expect("error: there is no command /nonsense")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
