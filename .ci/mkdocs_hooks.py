"""What the site needs beyond MkDocs: documents from outside docs/ as pages, and the package's sources in one tree."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

# Pages that lie elsewhere in the repository.
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "small-model.md": "jax_monokernel/data/small/README.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@event_priority(100)  # before mkdocstrings makes its handlers
def on_config(config: Any) -> Any:
    """Lays the sources out as they are installed: with models/ as jax_monokernel.models."""
    tree = Path(tempfile.mkdtemp(prefix="monokernel-docs-"))
    package = tree / "jax_monokernel"
    package.mkdir()
    for path in (ROOT / "jax_monokernel").iterdir():
        (package / path.name).symlink_to(path)
    (package / "models").symlink_to(ROOT / "models")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(tree)]
    config.extra["sources"] = str(tree)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie elsewhere."""
    for page, source in PAGES.items():
        text = _FRONT_MATTER.sub("", (ROOT / source).read_text())
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links that hold in the repository into those of the site; to what is no page, into their text."""
    own = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {source: name for name, source in PAGES.items()}

    def replaced(match: re.Match[str]) -> str:
        opening, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(os.path.dirname(own), target))
        if (ROOT / path).is_dir() and (ROOT / path / "README.md").exists():
            path = os.path.join(path, "README.md")
        name = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if name is None and (ROOT / path).exists():  # a source file
            return opening[1:-2]
        name = name or path  # MkDocs says that it is not there
        return f"{opening}{os.path.relpath(name, os.path.dirname(page.file.src_uri))}{anchor})"

    # Not in code.
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [_LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Removes the tree of sources."""
    shutil.rmtree(config.extra["sources"])
