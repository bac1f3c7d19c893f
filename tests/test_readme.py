"""The README's Python examples and those of docs/export.md run as they stand, and links in documents lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


EXAMPLES = blocks("README.md")


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.strip()) > 10


def test_there_are_examples():
    assert len(EXAMPLES) == 2


def test_export_from_one_process_to_another(tmp_path):
    for code in blocks("docs/export.md"):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10
    program = (tmp_path / "decode.bin").read_bytes()
    assert b"jax_monokernel_decode" in program
    assert b".py" not in program


@pytest.mark.parametrize("path", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("*/*.md")))])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / path).read_text()):
        assert ((ROOT / path).parent / target).exists(), target
