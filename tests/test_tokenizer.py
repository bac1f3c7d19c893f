"""Text to tokens and back, all at once and as a stream."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from jax_monokernel.checkpoints import CheckpointError
from jax_monokernel.tokenizer import Tokenizer, special_ids

CORPUS = [
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "the cat sat on the mat, and the naïve café served crème brûlée",
    "你好 世界。你好吗。 日本語のテキスト 👩‍👩‍👧 🇫🇷 🎉🎉",
] * 4
TEXTS = [
    "the cat sat",
    " leading and  double  spaces ",
    "你好世界 naïve 👩‍👩‍👧🎉 🇫🇷",
    "tabs\tand\r\nnewlines\n\n",
    "zalgo e\u0301\u0323 \u202e \ufeff \x00 \x7f \U0010ffff \ue000",
    "a literal \ufffd and two \ufffd\ufffd",
    "",
]


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3, Qwen and our own: bytes as the alphabet, so characters are split over tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: "▁" for spaces, whole characters, and single bytes for those that it lacks."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted({c for c in "".join(CORPUS) if c.isascii() and c.isprintable() and c != " "})
    vocab = {piece: i for i, piece in enumerate(pieces)}
    for a, b in [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]:
        vocab[a + b] = len(vocab)
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<unk>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


KINDS = {"byte level": Tokenizer(byte_level()), "byte fallback": Tokenizer(byte_fallback())}


@pytest.fixture(params=KINDS)
def tokenizer(request) -> Tokenizer:
    return KINDS[request.param]


def folder_with(folder: Path, backend: tokenizers.Tokenizer | None = None, **files) -> Path:
    folder.mkdir(exist_ok=True)
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def streamed(tokenizer: Tokenizer, ids, **options) -> list[str]:
    stream = tokenizer.stream(**options)
    return [*(stream.put(i) for i in ids), stream.finish()]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 0
    assert all(type(i) is int for i in ids)
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array(ids, np.int32)) == text
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<s>")


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_stream_joins_to_the_text(tokenizer, text):
    pieces = streamed(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30), kind=st.sampled_from(list(KINDS)))
def test_any_text_survives(text, kind):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(KINDS)))
def test_any_tokens_can_be_streamed(data, kind):
    """Also those that no text has: half characters, ids past the vocabulary."""
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    pieces = streamed(tokenizer, ids)
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole
    # Whatever happens to broken characters, the rest comes through, in order.
    if kind == "byte level":
        assert "".join(pieces) == whole


def test_pieces_come_as_soon_as_they_are_complete():
    tokenizer = KINDS["byte level"]
    ids = [i for c in "aé你🎉b" for i in single_bytes(tokenizer, c)]
    pieces = streamed(tokenizer, ids)
    assert pieces == ["a", "", "é", "", "", "你", "", "", "", "🎉", "b", ""]


def single_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the single-byte tokens of a byte-level vocabulary that spell a text."""
    # Its alphabet: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on, in order.
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    letters = (chr(b) if b in plain else chr(0x100 + rest.index(b)) for b in text.encode())
    return [tokenizer.backend.token_to_id(letter) for letter in letters]


def test_unfinished_characters_come_at_the_end():
    tokenizer = KINDS["byte fallback"]
    first_bytes = [3 + b for b in "好".encode()[:2]]
    assert streamed(tokenizer, first_bytes) == ["", "", "\ufffd\ufffd"]
    # Then the stream is as new: a text's first token loses its space.
    stream = tokenizer.stream()
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    for _ in range(2):
        assert "".join([*(stream.put(i) for i in ids), stream.finish()]) == "the cat"


def test_bytes_that_turn_out_invalid_do_not_eat_what_follows():
    tokenizer = KINDS["byte fallback"]
    ids = [3 + b for b in "你".encode()] + [3 + "好".encode()[0]] + tokenizer.encode("n", add_special_tokens=False)[1:]
    assert streamed(tokenizer, ids) == ["", "", "你", "", "\ufffdn", ""]


def test_special_tokens_in_a_stream():
    tokenizer = KINDS["byte fallback"]
    ids = [0, *tokenizer.encode("the cat", add_special_tokens=False), 1]
    assert "".join(streamed(tokenizer, ids)) == "the cat"
    assert "".join(streamed(tokenizer, ids, skip_special_tokens=False)) == tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_long_streams_stay_quick(tokenizer):
    decoded = 0

    class Counting:
        decoder = tokenizer.backend.decoder

        def no_truncation(self):
            pass

        no_padding = no_truncation

        def decode(self, ids, **options):
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.backend.decode(ids, **options)

    ids = tokenizer.encode("the cat sat on 你好 " * 100)
    assert "".join(streamed(Tokenizer(Counting()), ids)) == tokenizer.decode(ids)
    assert decoded < 10 * len(ids)


def test_bad_arguments():
    tokenizer = KINDS["byte level"]
    with pytest.raises(ValueError, match="expected a text"):
        tokenizer.encode(["a", "b"])
    with pytest.raises(ValueError, match="cannot be expressed in UTF-8"):
        tokenizer.encode("half a pair \ud83d")
    for call in (tokenizer.decode, lambda ids: tokenizer.stream().put(ids[-1])):
        with pytest.raises(ValueError, match=r"token id -1 cannot be decoded.*fills rows past their length"):
            call([5, -1])
        with pytest.raises(ValueError, match="cannot be decoded"):
            call([2**31])
        with pytest.raises(TypeError):
            call([1.5])


def test_truncation_and_padding_of_training_are_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, backend))
    assert tokenizer.encode(TEXTS[2]) == KINDS["byte level"].encode(TEXTS[2])


def test_copies(tmp_path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, config={"eos_token_id": 1}))
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
        assert other.eos_token_id == (1,)


# Special ids

SPECIAL = {
    "nothing": ({}, None, ()),
    "generation_config first": (
        {
            "generation_config": {"bos_token_id": 4, "eos_token_id": [5, 6]},
            "config": {"bos_token_id": 1, "eos_token_id": 2},
        },
        4,
        (5, 6),
    ),
    "null falls through": ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 2}}, None, (2,)),
    "each on its own": ({"generation_config": {"eos_token_id": 3}, "config": {"bos_token_id": 1}}, 1, (3,)),
    "repeated": ({"config": {"eos_token_id": [3, 3, 2]}}, None, (3, 2)),
    "empty list": ({"config": {"eos_token_id": []}}, None, ()),
    "text_config": ({"config": {"text_config": {"eos_token_id": 9}}}, None, (9,)),
    "by name": ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 0, (1,)),
    "unknown name": ({"tokenizer_config": {"eos_token": "<nope>"}}, None, ()),
    "null name": ({"tokenizer_config": {"eos_token": None}}, None, ()),
    "ids before names": ({"config": {"eos_token_id": 7}, "tokenizer_config": {"eos_token": "</s>"}}, None, (7,)),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_special_ids(tmp_path, case):
    files, bos, eos = SPECIAL[case]
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, **files))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, eos)
    if "tokenizer_config" not in files:
        assert special_ids(tmp_path, "eos") == eos


@pytest.mark.parametrize("value", ["2", -1, 2.0, True, [1, "2"], [[1]], {"a": 1}, 2**31], ids=repr)
@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_special_ids_that_are_none(tmp_path, file, value):
    with pytest.raises(CheckpointError, match=rf"{file}\.json: eos_token_id is .*; expected token ids"):
        Tokenizer.from_folder(folder_with(tmp_path, **{file: {"eos_token_id": value}}))


# Files


def test_missing_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; with transformers, AutoTokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b'{"model": {"type": "BPE"}}',
        b'{"version":"1.0","model":{"type":"Nope"}}',
        b"[" * 10**5,
    ],
    ids=["empty", "object", "list", "not UTF-8", "no vocab", "unknown model", "nested"],
)
def test_broken_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_tokenizer_that_is_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Tokenizer.from_folder(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_tokenizer_never_crashes(tmp_path_factory, data):
    content = bytearray(KINDS["byte fallback"].backend.to_str().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0123{}[]",: xe'))
    folder = tmp_path_factory.mktemp("t")
    (folder / "tokenizer.json").write_bytes(content)
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except CheckpointError:
        return
    assert isinstance(tokenizer.decode(range(300)), str)


@pytest.mark.parametrize("add_bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_same_ids_and_text_as_transformers(tmp_path, make, add_bos):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        backend = make()
        if not add_bos:
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        folder_with(tmp_path, backend, tokenizer_config=config, config={"model_type": "llama"})
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = Tokenizer.from_folder(tmp_path)
        assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, (theirs.eos_token_id,))
        for text in TEXTS:
            ids = theirs.encode(text)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
