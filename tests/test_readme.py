"""The README's Python examples run as they stand, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {"__name__": "readme"})
    assert len(capsys.readouterr().out.strip()) > 10


def test_there_are_examples():
    assert len(EXAMPLES) == 2


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
