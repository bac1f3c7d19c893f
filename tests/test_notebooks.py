"""The notebooks run, and what they show is what their code gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_there_are_four_notebooks_and_the_readme_names_them():
    text = (FOLDER / "README.md").read_text()
    assert len(NOTEBOOKS) == 4
    assert all(f"[{path.name}]({path.name})" in text for path in NOTEBOOKS)


# Each in a process and kernel of its own, as somebody would run it.
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_outputs_are_fresh(path):
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", "--check", path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"good \(\d+ s\)", done.stdout)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_pictures_and_bars_and_no_paths(path):
    text = path.read_text()
    outputs = [o for cell in json.loads(text)["cells"] for o in cell.get("outputs", [])]
    kinds = [kind for o in outputs for kind in o.get("data", {})]
    assert "image/png" in kinds
    assert any("100%|" in "".join(o.get("data", {}).get("text/plain", "")) for o in outputs)
    assert not any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs)
    assert not re.search(r'[" ](/home|/root|/tmp|/usr|/work)/', text)


def test_outputs_of_other_code_are_found_out(tmp_path):
    notebook = json.loads(NOTEBOOKS[0].read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code[0]["source"] = ["1 + 1"]
    notebook["cells"] = code[:1]
    path = tmp_path / "changed.ipynb"
    path.write_text(json.dumps(notebook))
    command = [sys.executable, FOLDER / "run.py", path]
    done = subprocess.run([*command, "--check"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "its outputs are of other code" in done.stdout
    notebook["cells"][0]["source"] = ["1 / 0"]
    path.write_text(json.dumps(notebook))
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout
