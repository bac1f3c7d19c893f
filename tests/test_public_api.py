"""The public API is annotated and documented: types, shapes, errors."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jax_monokernel
from jax_monokernel import models, performance, topology

MODULES = (jax_monokernel, models, performance, topology)
# Words that say what an array is where brackets would say less.
SHAPE = re.compile(r"\[[^\]]*\]|scalar|jax\.random\.key|any shape|shapes")


def public() -> Iterator[tuple[str, Any]]:
    """(name, object) of all that is public and has code of ours."""
    for module in MODULES:
        for name in module.__all__:
            found = getattr(module, name)
            if inspect.isroutine(found) or inspect.isclass(found):
                yield f"{module.__name__}.{name}", found


def functions() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, the docstring that has its arguments) of public functions and the methods of public classes."""
    for name, found in public():
        if inspect.isclass(found):
            for attribute, value in vars(found).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                special = attribute.startswith("_") and attribute != "__init__"
                if special or not inspect.isfunction(function) or function.__module__ != found.__module__:
                    continue
                if attribute == "__init__":
                    if not dataclasses.is_dataclass(found):
                        yield name, function, inspect.getdoc(found) or ""
                else:
                    yield f"{name}.{attribute}", function, inspect.getdoc(function) or ""
        else:
            function = inspect.unwrap(found)
            yield name, function, inspect.getdoc(function) or ""


FUNCTIONS = {name: (function, doc) for name, function, doc in functions()}


def test_there_are_some():
    assert len(FUNCTIONS) > 40


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_annotated(name):
    function, _ = FUNCTIONS[name]
    signature = inspect.signature(function)
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not parameter.empty, f"{parameter.name} has no type"
    if not name.rpartition(".")[2][0].isupper():  # a class's __init__
        assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_documented(name):
    function, doc = FUNCTIONS[name]
    assert len(doc) > 5
    signature = inspect.signature(function)
    arrays = [p.name for p in signature.parameters.values() if re.search(r"\b(Array|ndarray)", str(p.annotation))]
    arguments = doc.partition("Args:")[2].partition("Raises:")[0]
    for parameter in arrays:
        said = re.search(rf"^  {parameter}: (.*(?:\n    .*)*)", arguments, re.MULTILINE)
        assert said, f"the array {parameter} is not described"
        assert SHAPE.search(said[1]), f"nothing says which shape {parameter} has: {said[1]!r}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_documented(name):
    function, doc = FUNCTIONS[name]
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = {
        call.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call) and isinstance(call.func, ast.Name)
    }
    documented = doc.partition("Raises:")[2]
    for error in raised:
        assert error in documented, f"{error} is raised and not under Raises:"


@pytest.mark.parametrize(
    ("name", "found"), [pair for pair in public() if inspect.isclass(pair[1])], ids=lambda x: str(x)
)
def test_classes_are_documented(name, found):
    assert len(inspect.getdoc(found) or "") > 5
    assert not (found.__doc__ or "").startswith(f"{found.__name__}("), "the text that dataclasses make says nothing"
    if dataclasses.is_dataclass(found):
        assert set(inspect.get_annotations(found)) >= {field.name for field in dataclasses.fields(found)} - inherited(
            found
        )


def inherited(found: type) -> set[str]:
    """Names of fields of base classes."""
    return {name for base in found.__mro__[1:] for name in inspect.get_annotations(base)}


def test_annotations_can_be_read():
    for name, (function, _) in FUNCTIONS.items():
        if name.startswith(("jax_monokernel.generate", "jax_monokernel.decode", "jax_monokernel.pack")):
            assert typing.get_type_hints(function)


_MEASURE = """
import time
import {first}
start = time.process_time()
import {module}
print(time.process_time() - start)
"""


def test_import_takes_little_more_than_jax():
    def seconds(module: str, first: str) -> float:
        code = _MEASURE.format(module=module, first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        return float(done.stdout)

    # Of the processor, so that other work on the machine does not count; the fastest of several.
    assert min(seconds("jax_monokernel", "jax") for _ in range(5)) < 0.15


def test_import_leaves_heavy_packages_alone():
    code = "import sys, jax; before = set(sys.modules); import jax_monokernel; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"flax", "tokenizers", "huggingface_hub", "typer", "rich", "matplotlib", "safetensors"}


def test_it_is_built_with_the_headers_of_the_oldest_jax():
    """Handlers that were compiled with newer headers are refused by an older JAX when a backend starts."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    oldest = next(d for d in project["project"]["dependencies"] if d.startswith("jax>="))
    minor = int(oldest.removeprefix("jax>=0."))
    assert f"jax>=0.{minor},<0.{minor + 1}" in project["build-system"]["requires"]
