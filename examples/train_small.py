"""Trains the small Llama-type model that ships with jax_monokernel, from the Python standard library's own sources.

    python examples/train_small.py --out small

makes an ordinary Hugging Face checkpoint folder: config.json, generation_config.json, model.safetensors (bf16),
tokenizer.json, tokenizer_config.json, README.md (model card), training.json (losses, options, corpus) and
validation_sample.txt (held-out text whose loss training.json records, so that anyone can check the weights).

The defaults are for a GPU. To see it work on a CPU in a minute, train something smaller:

    python examples/train_small.py --out small --steps 20 --eval-every 10 --eval-tokens 1024 --batch 4 --seq-len 64 \\
        --hidden 64 --intermediate 128 --layers 2

Everything is fixed by the corpus and the options: files are read in sorted order, held-out files are chosen by a hash
of their names, batches by seeded permutations. (Equal bits on a GPU need XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
Parameters are f32; matrix products take them rounded to --dtype, by default bf16, in which the model is saved. The
weights kept are those with the lowest validation loss of all evaluations.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import platform
import string
import sysconfig
import tarfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from python_corpus import END, encode, in_tests, python_version, read_corpus, train_tokenizer
from tokenizers import Tokenizer

from jax_monokernel import DecoderSpec
from jax_monokernel.models import Decoder, llama, save_pretrained
from jax_monokernel.spec import DTypeName

SAMPLE_BYTES = 8192
PROMPTS = ("def fibonacci(n):", "class Stack:\n    def __init__(self):", "import os\n\n\ndef walk(path):")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One training run. Defaults are those of the bundled model."""

    out: Path
    corpus: Path = Path(sysconfig.get_paths()["stdlib"])
    tests: bool = True  # train on the test suite's sources too
    steps: int = 6000
    eval_every: int = 300
    eval_tokens: int = 1 << 30  # of the validation stream, in the evaluations on the way; the last one takes all
    batch: int = 32  # sequences
    seq_len: int = 512  # tokens
    seed: int = 0
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.5  # high, because every file is seen many times
    warmup: int = 300  # steps
    dtype: DTypeName = "bfloat16"  # of matrix products in training
    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 768
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late or oddly."""
        for name in ("steps", "eval_every", "eval_tokens", "batch", "seq_len", "vocab", "hidden", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {self.dtype!r}; expected bfloat16 or float32")
        if self.steps % self.eval_every:
            raise ValueError(f"steps ({self.steps}) must be a multiple of eval_every ({self.eval_every})")

    def config(self) -> dict[str, Any]:
        """The model's shape as a Hugging Face config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self.seq_len,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.02,
        }

    def spec(self, dtype: DTypeName) -> DecoderSpec:
        """What that model computes."""
        return llama.spec_from_config(self.config(), dtype=dtype)


def batch_starts(tokens: int, options: Options) -> np.ndarray:
    """int32 [steps, batch]: where each sequence begins. An epoch is a permutation of all windows, shifted at random."""
    windows = (tokens - 1) // options.seq_len - 1
    if windows < 1:
        raise ValueError(f"the corpus has {tokens} tokens, too few for sequences of {options.seq_len}")
    needed = options.steps * options.batch
    epochs = []
    for epoch in range(-(-needed // windows)):
        rng = np.random.default_rng([options.seed, epoch])
        epochs.append(rng.permutation(windows) * options.seq_len + rng.integers(options.seq_len))
    return np.concatenate(epochs)[:needed].reshape(options.steps, options.batch).astype(np.int32)


def validation_loss(options: Options, model: Decoder, stream: np.ndarray, limit: int | None = None) -> float:
    """Mean loss per token in nats over (about the first `limit` tokens of) a stream, in windows of seq_len."""
    length = options.seq_len
    windows = -(-(len(stream) - 1) // length)
    if limit is not None:
        windows = max(1, min(windows, limit // length))
    padded = np.zeros(windows * length + 1, np.int32)
    used = min(len(stream), len(padded))
    padded[:used] = stream[:used]
    total = 0.0
    for first in range(0, windows, options.batch):
        # Rows past the end repeat the first window and count nothing, so that every call has one shape.
        rows = np.arange(first, first + options.batch)
        at = np.where(rows < windows, rows, 0)[:, None] * length + np.arange(length)
        counts = (at + 1 < used) & (rows < windows)[:, None]
        total += float(masked_loss_sum(model, *map(jnp.asarray, (padded[at], padded[at + 1], counts))))
    return total / (used - 1)


@nnx.jit
def masked_loss_sum(model: Decoder, inputs: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Loss in nats, summed over the targets [batch, tokens] that `mask` counts."""
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets) * mask)


def initial_parameters(options: Options) -> nnx.State:
    """f32. Matrices that write to the residual stream start smaller, so that its size does not grow with depth."""
    model = Decoder(options.spec("float32"), rngs=nnx.Rngs(options.seed))
    for matrix in (model.layers.o, model.layers.down):
        matrix[...] = matrix[...] / np.sqrt(2 * options.layers)
    return nnx.state(model, nnx.Param)


def optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW with clipped gradients; the learning rate rises linearly, then falls to zero along a cosine."""
    warmup = min(options.warmup, options.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, warmup, options.steps)

    def is_matrix(path: tuple, _leaf: object) -> bool:
        return "norm" not in jax.tree_util.keystr(path)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=options.weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
        ),
    )


def train(options: Options, stream: np.ndarray, held_stream: np.ndarray) -> tuple[Decoder, list[dict[str, float]]]:
    """The best model seen, in bf16, and the losses (nats per token) at every evaluation."""

    def abstract(dtype: DTypeName) -> nnx.GraphDef:
        return nnx.split(nnx.eval_shape(lambda: Decoder(options.spec(dtype), rngs=nnx.Rngs(0))))[0]

    compute, saved = abstract(options.dtype), abstract("bfloat16")

    def model_of(params: nnx.State, graph: nnx.GraphDef, dtype: str) -> Decoder:
        return nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), params))

    tx = optimizer(options)
    params = initial_parameters(options)
    opt_state = tx.init(params)

    def loss(params: nnx.State, window: jax.Array) -> jax.Array:
        logits = model_of(params, compute, options.dtype)(window[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params, opt_state, tokens, starts):
        def step(carry, start):
            params, opt_state = carry
            window = tokens[start[:, None] + jnp.arange(options.seq_len + 1)]
            value, gradients = jax.value_and_grad(loss)(params, window)
            updates, opt_state = tx.update(gradients, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), starts)
        return params, opt_state, jnp.mean(losses)

    tokens = jnp.asarray(stream)
    starts = batch_starts(len(stream), options)
    history: list[dict[str, float]] = []
    best: Decoder | None = None
    for done in range(0, options.steps, options.eval_every):
        begin = time.perf_counter()
        chunk = starts[done : done + options.eval_every]
        params, opt_state, train_loss = run(params, opt_state, tokens, jnp.asarray(chunk))
        train_loss = float(train_loss)
        rate = chunk.size * options.seq_len / (time.perf_counter() - begin)
        model = model_of(params, saved, "bfloat16")
        held_loss = validation_loss(options, model, held_stream, options.eval_tokens)
        history.append({"step": done + len(chunk), "train_loss": train_loss, "validation_loss": held_loss})
        print(f"step {done + len(chunk):6d}  train {train_loss:.4f}  validation {held_loss:.4f}  {rate:,.0f} tokens/s")
        if not np.isfinite(train_loss):
            raise FloatingPointError("the loss is no longer finite; lower the learning rate")
        if best is None or held_loss <= min(h["validation_loss"] for h in history):
            best = model
    assert best is not None
    return best, history


@nnx.jit
def best_token(model: Decoder, row: jax.Array, place: jax.Array) -> jax.Array:
    """The most likely token after place `place` of row [1, tokens]."""
    return jnp.argmax(model(row)[0, place])


def continuation(model: Decoder, tokenizer: Tokenizer, prompt: str, length: int = 128) -> str:
    """Greedy text of `length` tokens, prompt included; all is recomputed for each token, so no decoder is needed."""
    tokens = tokenizer.encode(prompt).ids[:length]
    while len(tokens) < length:
        row = np.zeros((1, length), np.int32)
        row[0, : len(tokens)] = tokens
        token = int(best_token(model, jnp.asarray(row), jnp.asarray(len(tokens) - 1)))
        if token == 0:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


CARD = string.Template("""\
---
license: apache-2.0
library_name: jax-monokernel
pipeline_tag: text-generation
tags: [llama, python, tiny]
---
# A small Python-writing Llama

A $millions M parameter Llama-type model ($layers layers, hidden size $hidden, $heads query and $kv_heads key/value
heads, byte-level BPE with $vocab tokens, tied head, bf16) for demonstrations and tests of jax_monokernel. It knows what
Python source looks like and nothing else: do not expect working programs, and do not use it for anything that matters.

|  |  |
| --- | --- |
| validation loss | $loss_token nats per token, $loss_byte nats per byte ($bits bits per byte) |
| training loss at that point | $loss_train nats per token |
| validation data | $held_files files of the library that were not trained on, $held_bytes bytes, $held_tokens tokens |
| training data | $files files, $bytes bytes, $tokens tokens: `.py` sources of the Python $python \
standard library$tests |
| training | $steps steps of $batch sequences of $seq_len tokens ($epochs epochs), AdamW, peak learning rate \
$learning_rate, weight decay $weight_decay, cosine schedule; the weights of step $best_step |
| made by | `examples/train_small.py`; `training.json` has every option and all losses |

The training data is part of CPython, which is under the Python Software Foundation License, as is the excerpt in
`validation_sample.txt`. Sequences of $seq_len tokens were cut from the files one after the other, with `<|endoftext|>`
between files.

What it writes (greedy):

$samples
""")


def write_checkpoint(
    options: Options, model: Decoder, tokenizer: Tokenizer, record: dict[str, Any], samples: list[str], sample: str
) -> None:
    """Fills options.out."""
    out = options.out
    save_pretrained(model, out, config=options.config(), overwrite=True)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)

    def write_json(name: str, value: object) -> None:
        (out / name).write_text(json.dumps(value, indent=2) + "\n")

    write_json("generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False})
    write_json(
        "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": options.seq_len,
        },
    )
    write_json("training.json", record)
    (out / "validation_sample.txt").write_text(sample)
    (out / "README.md").write_text(model_card(options, record, samples))


def model_card(options: Options, record: dict[str, Any], samples: list[str]) -> str:
    """README.md."""
    corpus, best = record["corpus"], record["best"]
    return CARD.substitute(
        {k: v for k, v in dataclasses.asdict(options).items() if k != "tests"},
        millions=f"{record['parameters'] / 1e6:.1f}",
        loss_token=f"{best['validation_loss']:.3f}",
        loss_byte=f"{best['validation_loss_per_byte']:.3f}",
        bits=f"{best['validation_loss_per_byte'] / np.log(2):.3f}",
        loss_train=f"{best['train_loss']:.3f}",
        best_step=best["step"],
        held_files=corpus["held_out"]["files"],
        held_bytes=corpus["held_out"]["bytes"],
        held_tokens=corpus["held_out"]["tokens"],
        files=corpus["training"]["files"],
        bytes=corpus["training"]["bytes"],
        tokens=corpus["training"]["tokens"],
        python=corpus["python"],
        tests=" and its tests" if corpus["training"]["test_files"] else " without its tests",
        epochs=f"{options.steps * options.batch * options.seq_len / corpus['training']['tokens']:.1f}",
        samples="\n\n".join(f"```text\n{text}\n```" for text in samples),
    )


def run(options: Options) -> dict[str, Any]:
    """Trains, fills options.out, and returns what training.json says."""
    begin = time.perf_counter()
    texts, held = read_corpus(options.corpus, tests=options.tests)
    library = [text for name, text in texts.items() if not in_tests(name)]
    tokenizer = train_tokenizer(library, options.vocab)
    stream, held_stream = encode(tokenizer, list(texts.values())), encode(tokenizer, list(held.values()))
    held_bytes = sum(len(text.encode()) for text in held.values())
    corpus = {
        "python": python_version(options.corpus),
        "sha256": hashlib.sha256("\0".join([*texts.values(), *held.values()]).encode()).hexdigest(),
        "training": {
            "files": len(texts),
            "test_files": len(texts) - len(library),
            "bytes": sum(len(text.encode()) for text in texts.values()),
            "tokens": len(stream),
        },
        "held_out": {"files": len(held), "bytes": held_bytes, "tokens": len(held_stream)},
    }
    print(json.dumps(corpus, indent=2))

    model, history = train(options, stream, held_stream)

    best = min(history, key=lambda h: h["validation_loss"])
    loss = validation_loss(options, model, held_stream)
    per_byte = loss * (len(held_stream) - 1) / held_bytes
    sample = validation_sample(held)
    sample_tokens = encode(tokenizer, [sample])
    samples = [continuation(model, tokenizer, prompt) for prompt in PROMPTS]
    record = {
        "parameters": sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
        "best": best | {"validation_loss": loss, "validation_loss_per_byte": per_byte},
        "sample": {"tokens": len(sample_tokens) - 1, "loss": validation_loss(options, model, sample_tokens)},
        "corpus": corpus,
        "held_out_files": list(held),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k not in ("out", "corpus")},
        "history": history,
        "made_with": {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "seconds": round(time.perf_counter() - begin, 1),
        },
    }
    write_checkpoint(options, model, tokenizer, record, samples, sample)
    print("\n\n".join(samples))
    print(
        f"step {best['step']}: validation loss {loss:.4f} per token, {per_byte:.4f} per byte; "
        f"written to {options.out} in {record['made_with']['seconds']} s"
    )
    return record


def validation_sample(held: dict[str, str]) -> str:
    """Whole lines from the start of the held-out files, about SAMPLE_BYTES in all."""
    pieces = []
    for text in held.values():
        lines = text.splitlines(keepends=True)
        pieces.append("".join(lines[:60]))
        if sum(map(len, pieces)) >= SAMPLE_BYTES:
            break
    return "".join(pieces)


def main(argv: list[str] | None = None) -> None:
    """Command line: every field of Options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for field in dataclasses.fields(Options):
        flag = "--" + field.name.replace("_", "-")
        kind = {"Path": Path, "int": int, "float": float, "DTypeName": str, "bool": bool}[str(field.type)]
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.default is dataclasses.MISSING:
            parser.add_argument(flag, type=kind, required=True)
        else:
            parser.add_argument(flag, type=kind, default=field.default, help=f"default: {field.default}")
    try:
        run(Options(**vars(parser.parse_args(argv))))
    except (ValueError, OSError, tarfile.TarError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
