"""Code blocks of documents: what they are, and how they run."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FOLDERS = ("*.md", "docs/**/*.md", "benchmarks/*.md", "jax_monokernel/data/*/*.md")
DOCUMENTS = sorted(path for pattern in _FOLDERS for path in ROOT.glob(pattern))
LANGUAGES = {"python", "sh", "text"}  # text is shown and not run: formulas, output

# A comment right above a block says what is special about it.
_MARKER = re.compile(r"<!-- (not run|in a new process|ci)(?:: ([^>]*))? -->")
_FENCE = re.compile(r"^```(.*)$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str  # relative to the repository
    line: int  # of its first line of code, from 1
    language: str
    code: str
    marker: str  # "", "not run", "in a new process" or "ci"
    reason: str  # of "not run"; the name of "ci"

    @property
    def place(self) -> str:
        """Where it is, for people."""
        return f"{self.document}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a document.

    Raises:
      ValueError: a block that does not end, or code that is marked by indentation alone.
    """
    document = path.relative_to(ROOT).as_posix()
    lines = path.read_text().splitlines()
    found: list[Block] = []
    start: int | None = None
    language = ""
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if start is None:
            if fence:
                start, language = number + 1, fence[1].strip()
            elif line.startswith("    ") and number > 1 and not lines[number - 2].strip():
                raise ValueError(f"{document}:{number}: code is marked by ``` here, and not by indentation")
        elif fence:
            above = lines[start - 3].strip() if start > 2 else ""
            marker = _MARKER.fullmatch(above)
            kind, reason = (marker[1], marker[2] or "") if marker else ("", "")
            code = "\n".join(lines[start - 1 : number - 1]) + "\n"
            found.append(Block(document, start, language, code, kind, reason))
            start = None
    if start is not None:
        raise ValueError(f"{document}:{start}: a block that does not end")
    return found


def programs(blocks: list[Block]) -> list[tuple[str, list[Block]]]:
    """("python" or "sh", blocks) in the order in which they run.

    Blocks of Python build on each other, so they are one program, which runs at the place of the first; a marker begins
    another one. Each block of commands is a program of its own.
    """
    made: list[tuple[str, list[Block]]] = []
    python: list[Block] | None = None
    for block in blocks:
        if block.language == "text" or block.marker in ("not run", "ci"):
            continue
        if block.language == "python" and block.marker != "in a new process" and python is not None:
            python.append(block)
            continue
        made.append((block.language, [block]))
        if block.language == "python":
            python = made[-1][1]
    return made


def source(blocks: list[Block]) -> str:
    """A program in which each block stands at the line that it has in its document, so that tracebacks are of that."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines) + "\n"
