"""The Python standard library's sources as a corpus: reading, the split for validation, and a tokenizer for it."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
# Not part of the library proper, generated tables, or text that is not Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3", "turtledemo"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
HELD_OUT = 0.05  # share of the library's files (not of its tests, which are only trained on)


def python_files(corpus: Path) -> Iterator[tuple[str, bytes]]:
    """(name relative to the corpus, content) of every .py file of a folder or a tar archive."""
    if corpus.is_dir():
        for path in corpus.rglob("*.py"):
            if path.is_file():
                yield path.relative_to(corpus).as_posix(), path.read_bytes()
        return
    with tarfile.open(corpus) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".py"):
                yield member.name.removeprefix("./"), archive.extractfile(member).read()  # type: ignore[union-attr]


def read_corpus(corpus: Path, *, tests: bool) -> tuple[dict[str, str], dict[str, str]]:
    """Texts by name, for training and held out. Sorted, without repeats, empty files, or files that are not UTF-8."""
    texts: dict[str, str] = {}
    seen: set[str] = {""}
    for name, content in sorted(python_files(corpus)):
        if not SKIPPED_FOLDERS.isdisjoint(name.split("/")[:-1]) or (in_tests(name) and not tests):
            continue
        try:
            text = content.decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if text.strip() not in seen and END not in text:
            texts[name] = text
            seen.add(text.strip())
    held = {name: text for name, text in texts.items() if is_held_out(name)}
    if not held or len(held) == len(texts):
        raise ValueError(f"{len(texts)} usable .py files in {corpus} do not make a training and a validation set")
    return {name: text for name, text in texts.items() if name not in held}, held


def in_tests(name: str) -> bool:
    """Whether a file belongs to the test suite."""
    return not TEST_FOLDERS.isdisjoint(name.split("/")[:-1])


def is_held_out(name: str) -> bool:
    """Whether a file is for validation: a fixed share of the library's, by their names alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return not in_tests(name) and int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE: every text can be encoded and comes back unchanged. Token 0 separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=24,  # no tokens for whole rulers of dashes
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, not the {vocab} asked for")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """int32 [tokens]: an end mark, then every text followed by one."""
    pieces = [[0], *([*encoding.ids, 0] for encoding in tokenizer.encode_batch_fast(texts))]
    return np.concatenate([np.array(piece, np.int32) for piece in pieces])


def python_version(corpus: Path) -> str:
    """Of a corpus: this interpreter's when it is its own library, else an archive is taken to be named for it."""
    own = Path(sysconfig.get_paths()["stdlib"])
    return platform.python_version() if corpus.resolve() == own.resolve() else corpus.name.split(".tar")[0]
