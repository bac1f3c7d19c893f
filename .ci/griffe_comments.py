"""For the API reference: the comment beside or above an attribute is its description."""

import ast
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Reads comments of attributes that have no docstring."""

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Gives the attribute its comment."""
        if attr.docstring or not isinstance(node, ast.AnnAssign | ast.Assign) or not attr.filepath:
            return
        lines = attr.filepath.read_text().splitlines()  # type: ignore[union-attr]
        end = node.end_lineno or node.lineno
        beside = lines[end - 1][node.end_col_offset or 0 :].partition("# ")[2]
        above: list[str] = []
        number = node.lineno - 2
        while not beside and number >= 0 and lines[number].lstrip().startswith("# "):
            above.insert(0, lines[number].strip()[2:])
            number -= 1
        text = beside or " ".join(above)
        # Comments for tools are not for readers.
        if text and not text.startswith(("type:", "noqa")):
            text = text[0].upper() + text[1:]
            attr.docstring = griffe.Docstring(text.rstrip(".") + ".", parent=attr, lineno=node.lineno)
