"""Where a model came from: its checkpoint's folder, config and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from jax_monokernel.tokenizer import TOKENIZER, Tokenizer, special_ids


@dataclasses.dataclass(frozen=True)
class Origin:
    """The static part of a loaded model that is not its mathematics.

    Hashable and compared by value, as NNX asks of static attributes: models loaded twice share compiled functions.
    """

    folder: Path
    config_json: str  # config.json

    @property
    def config(self) -> dict[str, Any]:
        """config.json, a new copy each time."""
        return json.loads(self.config_json)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The folder's tokenizer; None where it has no tokenizer.json.

        Raises:
          CheckpointError: its files are damaged.
        """
        return Tokenizer.from_folder(self.folder) if os.path.exists(self.folder / TOKENIZER) else None

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The tokens that end a text, known without a tokenizer too.

        Raises:
          CheckpointError: a file that names them is damaged.
        """
        return special_ids(self.folder, "eos") if self.tokenizer is None else self.tokenizer.eos_token_id
