"""Text to token ids and back, by a checkpoint's tokenizer.json (the `tokenizers` library)."""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers

from jax_monokernel.chat_template import ChatTemplate
from jax_monokernel.safetensors_file import CheckpointError, read_json, read_text, short

TOKENIZER = "tokenizer.json"
# What undecodable bytes become; at the end of a text it may be the beginning of a character.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """A tokenizer and the ids that begin and end a text.

    Args:
      backend: does the work. Its truncation and padding are turned off: they are left-overs of its training.
      bos_token_id: None where texts have no beginning token.
      eos_token_id: the tokens that end a text; any number of them.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, bos_token_id: int | None = None, eos_token_id: tuple[int, ...] = ()
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._folder: Path | None = None  # of the checkpoint

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        The special ids are those of generation_config.json, else config.json, else the token that tokenizer_config.json
        names.

        Raises:
          CheckpointError: there is no tokenizer.json, or one of these files is damaged.
        """
        folder = Path(folder)
        path = folder / TOKENIZER
        if not os.path.exists(path):
            raise CheckpointError(
                f"{folder} has no {TOKENIZER}; with transformers, "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) makes one from other tokenizer files"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(path))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises nothing more special
            raise CheckpointError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
        bos = special_ids(folder, "bos", backend)
        made = cls(backend, bos_token_id=bos[0] if bos else None, eos_token_id=special_ids(folder, "eos", backend))
        made._folder = folder
        return made

    @functools.cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, read at first use; None where it has none.

        Raises:
          CheckpointError: its files are damaged.
        """
        return None if self._folder is None else ChatTemplate.from_folder(self._folder)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included. A model's vocabulary may be larger, for alignment."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: any valid Unicode.
          add_special_tokens: put the beginning (and whatever else the tokenizer's post-processor knows) around it.

        Raises:
          ValueError: not a string, or one with lone surrogates, which UTF-8 cannot express.
        """
        if not isinstance(text, str):
            raise ValueError(f"expected a text (str) to encode, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text cannot be expressed in UTF-8: {error}") from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids beyond the tokenizer's vocabulary have no text.

        Raises:
          ValueError: a negative id.
        """
        return self.backend.decode([_checked(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Decodes tokens as they come."""
        decode = functools.partial(self.backend.decode, skip_special_tokens=skip_special_tokens)
        return TextStream(decode, bytes_only=isinstance(self.backend.decoder, tokenizers.decoders.ByteLevel))


def text_stream(tokenizer: Any) -> TextStream:
    """Of whatever has `decode`."""
    return tokenizer.stream() if isinstance(tokenizer, Tokenizer) else TextStream(tokenizer.decode)


class TextStream:
    """Turns tokens into text one by one, holding back what may be an unfinished character.

    The pieces of text, the last from `finish`, join to what `decode` gives for all tokens at once, as far as the tokens
    are valid UTF-8.

    Args:
      decode: the text of token ids, such as `Tokenizer.decode`.
      bytes_only: texts are nothing but their tokens' bytes, so that whole characters do not depend on what is before.
    """

    def __init__(self, decode: Callable[[list[int]], str], *, bytes_only: bool = False):
        self._decode = decode
        self._bytes_only = bytes_only
        # The tokens of the last piece, then those that have no text yet. Some decoders treat the first token of a text
        # in their own way (drop its space), so new tokens are decoded together with those before them.
        self._tokens: list[int] = []
        self._done = 0
        self._done_text = ""

    def put(self, token: SupportsIndex) -> str:
        """The text that this token completes, often empty.

        Raises:
          ValueError: a negative id.
        """
        self._tokens.append(_checked(token))
        text = self._decode(self._tokens)
        if text.endswith(_REPLACEMENT) or text == self._done_text:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The text held back so far; unfinished characters in it are U+FFFD. The stream can then be used anew."""
        text = self._emit(self._decode(self._tokens))
        self._tokens, self._done, self._done_text = [], 0, ""
        return text

    def _emit(self, text: str) -> str:
        if self._bytes_only:
            self._tokens = []
            return text
        new = self._tokens[self._done :]
        # Bytes that turn out invalid can make a decoder change its mind about the ones before.
        piece = text[len(self._done_text) :] if text.startswith(self._done_text) else self._decode(new)
        self._tokens, self._done, self._done_text = new, len(new), self._decode(new)
        return piece


def special_ids(folder: Path, kind: str, backend: tokenizers.Tokenizer | None = None) -> tuple[int, ...]:
    """Ids of the "bos" or "eos" tokens of a checkpoint folder, empty where it has none.

    Args:
      folder: the checkpoint's folder.
      kind: "bos" or "eos".
      backend: looks up the name that tokenizer_config.json gives, where the other files give no id.

    Raises:
      CheckpointError: a file is damaged or gives something that is not an id.
    """
    for file in ("generation_config.json", "config.json"):
        values = _read_if_there(folder / file)
        for section in (values, values.get("text_config")):
            found = section.get(f"{kind}_token_id") if isinstance(section, Mapping) else None
            if found is None:
                continue
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
                raise CheckpointError(f"{folder / file}: {kind}_token_id is {short(found)}; expected token ids")
            return tuple(dict.fromkeys(ids))
    token: Any = _read_if_there(folder / "tokenizer_config.json").get(f"{kind}_token")
    if isinstance(token, Mapping):
        token = token.get("content")
    found = backend.token_to_id(token) if backend is not None and isinstance(token, str) else None
    return () if found is None else (found,)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.exists(path) else {}


def _checked(token: SupportsIndex) -> int:
    value = operator.index(token)
    if not 0 <= value < 2**31:
        raise ValueError(f"token id {value} cannot be decoded; ids are not negative (-1 fills rows past their length)")
    return value
