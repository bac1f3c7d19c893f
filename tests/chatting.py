"""Models of 37 tokens that can be talked to: letters, a few words, and a template."""

from __future__ import annotations

import tokenizers
from naive import SPECS, VOCAB, random_weights
from tokenizers import decoders, models

from jax_monokernel.chat_template import ChatTemplate
from jax_monokernel.models import Decoder
from jax_monokernel.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<u>", "<a>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz ,.\n", "ab", "th", "the"]
TEMPLATE = """\
{%- for m in messages %}
{{- {'system': '<s>', 'user': '<u>', 'assistant': '<a>'}[m.role] ~ m.content }}
{{- '</s>' if m.role == 'assistant' else '' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<a>' }}{% endif %}"""
assert len(SPECIAL) + len(WORDS) == VOCAB


def tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate([*SPECIAL, *WORDS])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b"), ("t", "h"), ("th", "e")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL)
    made = Tokenizer(backend, bos_token_id=0, eos_token_id=(1,))
    made.chat_template = None if template is None else ChatTemplate(template)
    return made


class Talker(Decoder):
    """A decoder with that tokenizer."""

    tokenizer = tokenizer()
    eos_token_id = None  # then the tokenizer's


def talker(name: str = "plain", seed: int = 0) -> Talker:
    return Talker.from_weights(SPECS[name], random_weights(SPECS[name], seed))
