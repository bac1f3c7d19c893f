"""Code in documents runs as it stands, names and links in them lead somewhere, and pictures are those of the code."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from doc_blocks import DOCUMENTS, LANGUAGES, ROOT, Block, blocks_of, programs, source

import jax_monokernel
from jax_monokernel import models, performance, topology
from jax_monokernel.cli import app

NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
BLOCKS = {name: blocks_of(path) for name, path in zip(NAMES, DOCUMENTS, strict=True)}
ALL = [block for blocks in BLOCKS.values() for block in blocks]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def environment() -> dict[str, str]:
    """With the command of this environment first on the path, and XLA quick to compile."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if programs(blocks)])
def test_blocks_run(name, tmp_path):
    ran = 0
    for kind, blocks in programs(BLOCKS[name]):
        if kind == "python":
            file = tmp_path / "program.py"
            # The document's own name and lines in tracebacks.
            file.write_text(f"exec(compile({source(blocks)!r}, {name!r}, 'exec'))\n")
            command = [sys.executable, "-W", "error", file.name]
        else:
            command = ["bash", "-euo", "pipefail", "-c", blocks[0].code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{blocks[0].place}\n{done.stdout}\n{done.stderr}"
        ran += len(done.stdout.strip()) > 10
        if name == "docs/export.md" and (program := tmp_path / "decode.bin").exists():
            assert b"jax_monokernel_decode" in program.read_bytes()
            assert b".py" not in program.read_bytes()
    assert ran, "nothing that runs on this page says anything"


def test_every_block_is_run_or_says_why_not():
    assert sum(block.language == "python" for block in ALL) >= 10
    for block in ALL:
        assert block.language in LANGUAGES, f"{block.place}: expected one of {LANGUAGES} after ```"
        if block.marker == "not run":
            assert len(block.reason) > 10, f"{block.place}: say why it is not run"
            print(f"{block.place} is not run: {block.reason}")  # shown by pytest -rP
    shown = [block.place for block in ALL if block.language == "python" and block.marker == "not run"]
    assert not shown, "Python can be run everywhere"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "sh"], ids=lambda block: block.place)
def test_shell_blocks_are_valid(block: Block):
    done = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


_COMMAND = r"jax-monokernel|python -m benchmarks(?:\.\w+| \w+)?"


def commands(text: str) -> list[list[str]]:
    """The words of each use of our command, and of `python -m benchmarks...`, in lines of shell code or in `code`."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for match in re.finditer(
            r"(?:^|[\s/])(jax-monokernel|python -m benchmarks(?:\.\w+| \w+)?)((?: [^|&;\n]*)?)", line
        ):
            found.append([*match[1].split(), *shlex.split(match[2], comments=True)])
    return found


def used() -> list[tuple[str, list[str]]]:
    """(where, words) in all documents."""
    places = [(block.place, words) for block in ALL if block.language == "sh" for words in commands(block.code)]
    for name, path in zip(NAMES, DOCUMENTS, strict=True):
        if name in ("docs/performance-log.md", "CHANGELOG.md"):  # what there was at its time
            continue
        generated = r"<!-- (\w+):start -->.*?<!-- \1:end -->"  # commands that made results, likewise
        prose = re.sub(rf"{generated}|^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`]+)`", prose):
            places += [(name, words) for words in commands(" ".join(code.split()))]
    return places


def test_commands_and_options_exist():
    seen = set()
    for place, words in used():
        if words[0] == "python":  # python -m benchmarks run, or benchmarks.run
            name = ".".join(words[2 : 3 + (words[2] == "benchmarks")])
            options = set(re.findall(r"--[\w-]+", help_of(name)))
        elif len(words) == 1 or words[1].startswith("-"):
            continue
        else:
            name = words[1]
            assert name in COMMANDS, f"{place}: there is no command {name!r}"
            options = {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        seen.add(name)
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--"):
                assert option in options, f"{place}: {shlex.join(words)} has no option {option}"
    assert {"generate", "doctor", "topology", "compile", "bench", "benchmarks.run"} <= seen


_help: dict[str, str] = {}


def help_of(module: str) -> str:
    """What `python -m MODULE --help` prints."""
    if module not in _help:
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"python -m {module} --help: {done.stderr}"
        _help[module] = done.stdout
    return _help[module]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)]*)?\)", text):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor[1:] in anchors, f"{target}{anchor}"


def test_public_names_are_in_the_api_reference():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown)), "a name is there twice"
    for module in (jax_monokernel, models, performance, topology):
        for name in set(module.__all__) - {"__version__"}:
            path = next((p for p in shown if p.endswith(f".{name}") and p.startswith(module.__name__)), None)
            assert path, f"{module.__name__}.{name} is not on a page of docs/api"
            owner = importlib.import_module(path.rpartition(".")[0])
            assert getattr(owner, name) is getattr(module, name), path


def test_pictures_are_those_of_the_code(tmp_path):
    done = {name: (ROOT / "docs" / "images" / name).read_text() for name in ("data-path.svg", "hand-offs.svg")}
    code = (ROOT / "docs" / "images" / "draw.py").read_text()
    namespace = {"__name__": "draw", "__file__": str(ROOT / "docs" / "images" / "draw.py")}
    exec(compile(code, "docs/images/draw.py", "exec"), namespace)
    namespace["main"](tmp_path)
    for name, text in done.items():
        assert (tmp_path / name).read_text() == text, "run python docs/images/draw.py"


def test_debugging_page_knows_every_hand_off():
    header = (ROOT / "ffi" / "gpu" / "kernel" / "sync" / "words.h").read_text()
    names = re.findall(r"\bh\d_\w+", header.partition("enum HandOff")[2].partition("}")[0])
    page = (ROOT / "docs" / "debugging-a-hang.md").read_text()
    assert len(names) >= 9
    assert re.findall(r"^\| `(h\d_\w+)` \|", page, re.MULTILINE) == names
    said = re.sub(r'"\s*\n?\s*"', "", (ROOT / "ffi" / "gpu" / "run.cc").read_text())
    for words in ("a wait inside the kernel took more than", "and decode ended early. Unit", " waited ", "in layer "):
        assert words in said
        assert words in " ".join(page.split())


def test_environment_page_knows_every_variable():
    described = set(re.findall(r"MONOKERNEL_\w+", (ROOT / "docs" / "environment.md").read_text()))
    code = {
        folder: "".join(p.read_text() for p in (ROOT / folder).rglob("*") if p.suffix in (".cc", ".h", ".py"))
        for folder in ("ffi", "jax_monokernel", "tests")
    }
    read = set(re.findall(r'(?:variable|getenv|is_set)\("(MONOKERNEL_\w+)', code["ffi"]))
    read |= set(re.findall(r'environ\S*"(MONOKERNEL_\w+)', code["jax_monokernel"]))
    assert len(read) >= 10
    assert read <= described
    assert all(name in "".join(code.values()) for name in described), "a variable that nothing reads"
