"""Makes tests/golden/data/chats.json with transformers: python tests/golden/make_chats.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tokenizers
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden import DATA
from golden.chats import CONVERSATIONS, OPTIONS, TEMPLATES, TOKENS


def main() -> None:
    """Writes what each template gives for each conversation, or that it refuses it."""
    out: dict[str, str | None] = {"transformers": transformers.__version__}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x"))
    for name, template in TEMPLATES.items():
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **TOKENS)
        for conversation, messages in CONVERSATIONS.items():
            for option, given in OPTIONS.items():
                options = {"add_generation_prompt": True} | given
                try:
                    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                except Exception:
                    text = None
                out[f"{name}/{conversation}/{option}"] = text
    (DATA / "chats.json").write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
