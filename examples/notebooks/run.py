"""Runs the notebooks of this folder, each in a fresh kernel and on the CPU.

    python examples/notebooks/run.py [NOTEBOOK ...]           runs them and keeps their outputs
    python examples/notebooks/run.py --check [NOTEBOOK ...]   runs copies; fails where a cell fails, or where outputs in
                                                              the file are not of the code in the file

Needs the `notebook` extra. A notebook that was run carries a hash of its code, by which --check knows.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

HERE = Path(__file__).parent


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """Of all code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n# %%\n".join(sources).encode()).hexdigest()


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": path.parent}},
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    client.execute()
    _keep_bars(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would differ in every commit
    notebook.metadata["executed_code"] = code_hash(notebook)
    return notebook


def _keep_bars(notebook: nbformat.NotebookNode) -> None:
    """Progress bars as the text that they end with: widgets live only as long as their kernel."""
    saved = notebook.metadata.pop("widgets", {}).get("application/vnd.jupyter.widget-state+json", {})
    states = {name: model["state"] for name, model in saved.get("state", {}).items()}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            view = output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if view is not None:
                left, bar, right = (
                    states[child.removeprefix("IPY_MODEL_")] for child in states[view["model_id"]]["children"]
                )
                done = round(20 * bar["value"] / bar["max"])
                text = f"{left['value']}|{'█' * done}{' ' * (20 - done)}|{right['value']}"
                output["data"]["text/plain"] = html.unescape(text).replace("\xa0", " ")


def stale(notebook: nbformat.NotebookNode) -> bool:
    """Whether outputs in the file are not of the code in the file."""
    return notebook.metadata.get("executed_code") != code_hash(notebook)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all of this folder")
    parser.add_argument("--check", action="store_true", help="leave the files as they are")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    failed = 0
    for path in options.notebooks or sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        problem = "its outputs are of other code; run it and commit the result" if options.check else ""
        problem = problem if stale(nbformat.read(path, as_version=4)) else ""
        try:
            notebook = run(path.resolve())
        except CellExecutionError as error:
            problem = str(error)
        else:
            if not options.check:
                nbformat.write(notebook, path)
                problem = ""
        failed += bool(problem)
        print(f"{path.name}: {problem or 'good'} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
