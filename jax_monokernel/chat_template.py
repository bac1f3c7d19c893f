"""Conversations as text, by a checkpoint's own Jinja template: what transformers' apply_chat_template renders.

The environment is transformers' (utils/chat_template_utils.py): sandboxed and immutable, trim_blocks and
lstrip_blocks, loop controls, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML's characters alone, and
`generation` blocks, which mark what the assistant said and render as what is in them.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jax_monokernel.safetensors_file import CheckpointError, read_json, read_text

Message = Mapping[str, Any]  # role and content, and whatever else a template reads

# Special tokens that templates know by name.
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(ValueError):
    """A template that is not valid Jinja, or that refuses a conversation."""


class ChatTemplate:
    """How messages become the text that a model continues.

    Args:
      source: the template, in Jinja.
      variables: what it can read besides the messages: special tokens by name, and options of its own.

    Raises:
      ChatTemplateError: not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        self.source = source
        self.variables = dict(variables or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template is not valid Jinja: {error.message} (line {error.lineno})"
            ) from error

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[str, dict[str, Any]]]:
        return ChatTemplate, (self.source, self.variables)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> ChatTemplate | None:
        """The template of a checkpoint folder: chat_template.jinja, else the one in tokenizer_config.json; or None.

        Of several named templates the one called "default" is taken.

        Raises:
          CheckpointError: the files are damaged, the template is not valid Jinja, or none of several is the default.
        """
        folder = Path(folder)
        config_path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_path) if os.path.exists(config_path) else {}
        place, source = (own, read_text(own)) if os.path.exists(own) else (config_path, config.get("chat_template"))
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
            if "default" not in named:
                raise CheckpointError(
                    f"{place} has chat templates {sorted(map(str, named))}; expected one named default"
                )
            source = named["default"]
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"{place}: chat_template is {type(source).__name__}; expected a text")
        values = {name: config.get(name) for name in _TOKENS}
        texts = {name: v.get("content") if isinstance(v, Mapping) else v for name, v in values.items()}
        try:
            return cls(source, {name: text for name, text in texts.items() if isinstance(text, str)})
        except ChatTemplateError as error:
            raise CheckpointError(f"{place}: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, special tokens included: encode it with add_special_tokens=False.

        Args:
          messages: dicts with "role" ("system", "user", "assistant", ...) and "content", oldest first.
          add_generation_prompt: end with what begins an answer.
          **variables: further variables, which go before those of the template.

        Raises:
          ChatTemplateError: no messages, or the template refuses them or fails, with its reason.
        """
        if not messages:
            raise ChatTemplateError("there are no messages; expected at least one")
        plain = [{k: v for k, v in message.items() if v is not None} for message in _plain(list(messages))]
        options = self.variables | _plain(variables) | {"add_generation_prompt": add_generation_prompt}
        # Templates ask whether these are there, some by `is none`.
        options = {"tools": None, "documents": None} | options
        try:
            return self._template.render(messages=plain, **options)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from error
        except Exception as error:  # a template is a program, and may fail as one
            raise ChatTemplateError(
                f"the chat template fails on this conversation: {type(error).__name__}: {error}"
            ) from error


class _GenerationBlocks(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} as what is between."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """What `namespace` makes, without names that Python gives a meaning, as in transformers."""

    def __init__(*args: Any, **values: Any) -> None:  # so that namespace(self=...) is possible
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have {name!r}; names must not begin with _")


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def _plain(value: Any) -> Any:
    """A copy made of JSON's types, so that a template gets at nothing else."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise ChatTemplateError(f"a message or variable has a {type(value).__name__} in it; expected JSON's types")


# For models that were not trained on conversations, such as the one in this package: the contents alone, as one text
# that goes on.
PLAIN = ChatTemplate(
    "{% for message in messages %}"
    "{% if message.role != 'assistant' and not loop.first %}{{ '\\n' }}{% endif %}{{ message.content }}"
    "{% endfor %}"
)
