"""generate: prompts of every form in, tokens and text out; what is compiled and packed when."""

from __future__ import annotations

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import SPECS, VOCAB, NaiveRow, prompt, random_weights

from jax_monokernel.generate import generate
from jax_monokernel.models import Decoder
from jax_monokernel.prefill import prefill
from jax_monokernel.prepared import prepare, prepared_for
from jax_monokernel.sampling import GenerationConfig, sampling_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

SPEC = SPECS["nope"]
KEY = jax.random.key(21)


class Letters:
    """One id per letter; 0 begins a text and 1 ends it."""

    letters = "__abcdefghijklmnopqrstuvwxyz .,:;"
    eos_token_id = (1,)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [0] * add_special_tokens + [self.letters.index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join(self.letters[i] if i < len(self.letters) else "?" for i in ids if i > 1)


class Speaker(Decoder):
    """A decoder with a tokenizer of its own."""

    tokenizer = Letters()
    eos_token_id = None  # then the tokenizer's


def make(kind: type = Decoder, seed: int = 0):
    return kind.from_weights(SPEC, random_weights(SPEC, seed))


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def speaker():
    return make(Speaker)


def naive_tokens(ids, steps, row=0, batch=1, key=KEY, **options) -> list[int]:
    key_data = jax.random.key_data(jax.random.fold_in(key, row))
    naive = NaiveRow(SPEC, random_weights(SPEC), np.asarray(key_data))
    naive.say(ids)
    params = sampling_params(GenerationConfig(max_new_tokens=steps, **options), batch=batch, vocab_size=VOCAB)
    return naive.decode(params, row, steps)[0]


def rows(generation) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(generation.tokens, generation.lengths, strict=True)]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_tokens_equal_the_naive_loop(model, backend):
    prompts = [prompt(3), prompt(17)]
    options = {"do_sample": [False, True], "temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    got = generate(model, prompts, max_new_tokens=[12, 10], key=KEY, backend=backend, return_log_probs=True, **options)
    want = [naive_tokens(ids, n, i, 2, **options) for i, (ids, n) in enumerate(zip(prompts, (12, 10), strict=True))]
    assert rows(got) == want
    assert got.tokens.shape == got.log_probs.shape == (2, 12)
    assert got.tokens[1, 10:].tolist() == [-1, -1]
    assert np.all(got.log_probs[0] < 0)
    assert got.log_probs[1, 10:].tolist() == [0, 0]
    assert got.finish_reasons == ["length", "length"]
    assert got.text is None


def test_every_form_of_a_prompt_means_the_same(model):
    ids = prompt(5)
    padded = np.zeros((2, 9), np.int64)
    padded[0, :5], padded[1, :3] = ids, ids[:3]
    want = rows(generate(model, [ids, ids[:3]], max_new_tokens=6))
    for form in ([np.array(ids, np.uint8), jnp.array(ids[:3])], (tuple(ids), [np.int32(i) for i in ids[:3]])):
        assert rows(generate(model, form, max_new_tokens=6)) == want
    for array in (padded, jnp.asarray(padded, jnp.int32)):
        assert rows(generate(model, array, lengths=[5, 3], max_new_tokens=6)) == want
    one = rows(generate(model, [ids], max_new_tokens=6))
    assert one == want[:1]
    for form in (ids, np.array(ids), np.array([ids])):
        assert rows(generate(model, form, max_new_tokens=6)) == one


def test_text_in_and_out(speaker):
    tokenizer = speaker.tokenizer
    one = generate(speaker, "hello there", max_new_tokens=20)
    ids = [0, *(tokenizer.letters.index(letter) for letter in "hello there")]
    assert rows(one) == rows(generate(speaker, [ids], max_new_tokens=20))
    assert one.text == [tokenizer.decode(rows(one)[0])]
    two = generate(speaker, ["hello there", "a"], max_new_tokens=20)
    assert two.text[0] == one.text[0]
    assert len(two.text) == 2


def test_a_text_ends_at_the_models_own_token_unless_told_otherwise(speaker):
    free = generate(speaker, "abc", max_new_tokens=20, eos_token_id=())
    assert free.lengths.tolist() == [20]
    first = rows(free)[0]
    # Make the next-but-one token this model's end.
    model = make(Speaker)
    model.eos_token_id = first[2]
    cut = generate(model, "abc", max_new_tokens=20)
    assert rows(cut) == [first[: first.index(first[2]) + 1]]
    assert cut.finish_reasons == ["eos"]
    assert rows(generate(model, "abc", max_new_tokens=20, eos_token_id=())) == [first]
    config = GenerationConfig(eos_token_id=first[0], max_new_tokens=20)
    assert rows(generate(model, "abc", config=config)) == [first[:1]]
    assert rows(generate(model, "abc", config=config, eos_token_id=())) == [first]


def test_a_conversation_goes_on_from_its_state(model):
    turns = [[prompt(4), prompt(9)], [prompt(2, 1), []], [prompt(3, 2), prompt(1, 2)]]
    said: list[list[int]] = [[], []]
    state = None
    for turn in turns:
        result = generate(model, turn, state=state, max_new_tokens=[3, 5], capacity=None if state else 64)
        state = result.state
        for row in range(2):
            said[row] += turn[row] + rows(result)[row]
    assert state.capacity == 64
    once = generate(model, said, max_new_tokens=6)
    assert rows(generate(model, state=state, max_new_tokens=6)) == rows(once)


def test_a_text_that_goes_on_gets_no_second_beginning(speaker):
    first = generate(speaker, ["ab", "c"], max_new_tokens=2, capacity=40, eos_token_id=())
    position = first.state.position.tolist()
    second = generate(speaker, ["de", ""], max_new_tokens=0, state=first.state)
    assert second.state.position.tolist() == [position[0] + 2, position[1]]
    assert second.tokens.shape == (2, 0)
    assert second.text == ["", ""]


def test_a_row_does_not_depend_on_the_rest_of_the_batch(model):
    prompts = [prompt(n) for n in (1, 30, 6)]
    keys = jax.random.split(KEY, 3)
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 1.3}
    together = rows(generate(model, prompts, key=keys, **options))
    for ids, key, want in zip(prompts, keys, together, strict=True):
        assert rows(generate(model, [ids], key=key[None], **options)) == [want]
    assert rows(generate(model, prompts, key=jax.random.split(jax.random.key(1), 3), **options)) != together


def test_a_given_capacity_ends_rows(model):
    result = generate(model, [prompt(4), prompt(10)], max_new_tokens=8, capacity=12)
    assert result.lengths.tolist() == [8, 3]
    assert result.finish_reasons == ["length", "capacity"]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_other_values_do_not_compile_again(backend, compilations):
    model = make(seed=3)

    def run(length, n, seed, seeds=(0, 1), **options):
        key = jax.random.key(seed)
        prompts = [prompt(length, seeds[0]), prompt(2, seeds[1])]
        return generate(model, prompts, max_new_tokens=n, key=key, backend=backend, do_sample=True, **options)

    first = run(17, 20, 1)
    count = len(compilations)
    assert count > 0
    run(18, 20, 2)  # another length in the same bucket, another key
    run(32, 17, 3, (5, 6), temperature=0.5, top_p=0.9)
    run(31, [1, 32], 4, eos_token_id=[3, 4], repetition_penalty=1.1, top_k=3, min_p=0.1)
    assert len(compilations) == count
    # Weights are operands as well.
    model.final_norm[...] = model.final_norm[...] * jnp.linspace(-1, 2, SPEC.hidden_size)
    del compilations[count:]  # what the line above needed
    assert rows(run(17, 20, 1)) != rows(first)
    assert len(compilations) == count
    run(33, 20, 1)  # the next bucket
    assert len(compilations) > count


def test_a_tape_is_packed_once_and_again_when_parameters_change():
    model = make(seed=4)
    first = prepared_for(model)
    assert prepared_for(model).tape is first.tape
    kept = prepare(model)
    before = rows(generate(model, [prompt(5)], max_new_tokens=8))
    model.layers.o[...] = -model.layers.o[...]
    assert prepared_for(model).tape is not first.tape
    after = rows(generate(model, [prompt(5)], max_new_tokens=8))
    assert after != before
    assert rows(generate(kept, [prompt(5)], max_new_tokens=8)) == before
    assert rows(generate(prepare(kept), [prompt(5)], max_new_tokens=8)) == before


def test_nothing_is_kept_of_a_model_that_is_gone():
    model = make(seed=5)
    streams = weakref.ref(prepared_for(model).tape.streams)
    assert streams() is not None
    del model
    gc.collect()
    assert streams() is None


def test_what_was_prepared_goes_without_its_model():
    model = make(seed=7)
    ready = prepare(model)
    generate(ready, [prompt(5)], max_new_tokens=2)
    streams, tape = weakref.ref(ready.tape.streams), ready.tape
    del ready
    gc.collect()
    assert streams() is not None  # by itself it can still be decoded
    del tape
    gc.collect()
    assert streams() is None


def test_parameters_that_can_change_in_place_are_read_each_time():
    model = make(seed=6)
    norm = np.array(model.final_norm[...])
    model.final_norm.set_value(norm)
    before = rows(generate(model, [prompt(5)], max_new_tokens=8))
    norm *= np.linspace(-1, 2, SPEC.hidden_size)
    assert rows(generate(model, [prompt(5)], max_new_tokens=8)) != before


class OwnPrefill(Decoder):
    """Prefills token 7 before every prompt."""

    @staticmethod
    def prefill(spec, weights, tokens, lengths, state):
        tokens = jnp.concatenate([jnp.full_like(tokens[:, :1], 7), tokens], axis=1)
        return prefill(spec, weights, tokens, lengths + 1, state)


class BoundPrefill(Decoder):
    def prefill(self, spec, weights, tokens, lengths, state):
        return state


def test_a_model_may_bring_its_own_prefill(model):
    own = rows(generate(make(OwnPrefill), [prompt(4)], max_new_tokens=8))
    assert own == rows(generate(model, [[7, *prompt(4)]], max_new_tokens=8))
    with pytest.raises(ValueError, match=r"BoundPrefill.prefill must be a staticmethod"):
        generate(make(BoundPrefill), [prompt(4)], max_new_tokens=8)


def test_a_state_is_used_up(model):
    state = generate(model, [prompt(4)], max_new_tokens=2).state
    copy = jax.tree.map(jnp.copy, state)
    first = rows(generate(model, state=state, max_new_tokens=4))
    assert state.k_cache.is_deleted()
    with pytest.raises(ValueError, match="the state was used up by an earlier call"):
        generate(model, state=state, max_new_tokens=4)
    assert rows(generate(model, state=copy, max_new_tokens=4)) == first


def test_a_new_key_in_a_later_turn_counts(model):
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    states = [generate(model, [prompt(4)], key=KEY, capacity=64, **options).state for _ in range(3)]
    same = rows(generate(model, state=states[0], **options))
    assert rows(generate(model, state=states[1], **options)) == same
    assert rows(generate(model, state=states[2], key=jax.random.key(99), **options)) != same


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": None}, ValueError, "neither a prompt nor a state"),
        ({"prompt": []}, ValueError, r"the prompt is \[\]; expected a text"),
        ({"prompt": "abc"}, ValueError, "the model has no tokenizer"),
        ({"prompt": b"abc"}, ValueError, r"the prompt is b'abc'; expected a text"),
        ({"prompt": 5}, ValueError, "the prompt is 5; expected a text"),
        ({"prompt": ["abc", [1]]}, ValueError, "row 0 of the prompt is 'abc'; expected a list of token ids"),
        ({"prompt": [[1, 2], []]}, ValueError, "row 1 of the prompt is empty"),
        ({"prompt": [[1, 2.5]]}, ValueError, "row 0 of the prompt has float64 values; expected integers"),
        ({"prompt": [[True, False]]}, ValueError, "row 0 of the prompt has bool values; expected integers"),
        ({"prompt": [[1, "a"]]}, ValueError, "row 0 of the prompt has .* values; expected integers"),
        ({"prompt": [[1, [2]]]}, ValueError, r"row 0 of the prompt is \[1, \[2\]\]; expected a list of token ids"),
        ({"prompt": [[[1, 2]]]}, ValueError, r"row 0 of the prompt has shape \[1, 2\]"),
        ({"prompt": [1, [2]]}, ValueError, "row 0 of the prompt is 1; expected a list of token ids"),
        ({"prompt": [[1, VOCAB]]}, ValueError, f"token id {VOCAB} is outside the vocabulary of {VOCAB} tokens"),
        ({"prompt": [[-1]]}, ValueError, "token id -1 is outside the vocabulary"),
        ({"prompt": [[2**80]]}, ValueError, "row 0 of the prompt has object values"),
        ({"prompt": np.zeros((1, 2))}, ValueError, "the prompt has float64 values; expected integers"),
        (
            {"prompt": np.zeros((1, 2, 3), int)},
            ValueError,
            r"the prompt has shape \[1, 2, 3\]; expected \[batch, tokens\]",
        ),
        ({"prompt": np.zeros((0, 2), int)}, ValueError, r"the prompt has shape \[0, 2\]"),
        ({"prompt": np.zeros((2, 0), int)}, ValueError, "row 0 of the prompt is empty"),
        ({"prompt": np.zeros((2, 3), int), "lengths": [1]}, ValueError, r"lengths are \[1\]; expected 2 numbers"),
        ({"prompt": np.zeros((2, 3), int), "lengths": [1, 4]}, ValueError, "expected 2 numbers from 0 to 3"),
        ({"prompt": np.zeros((2, 3), int), "lengths": [1, 0]}, ValueError, "row 1 of the prompt is empty"),
        ({"prompt": np.zeros((2, 3), int), "lengths": [1.0, 2.0]}, ValueError, "lengths has float64 values"),
        ({"lengths": [2]}, ValueError, "lengths go with a prompt that is an array"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1; expected an integer from 0"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5"),
        ({"max_new_tokens": [1, 2]}, ValueError, "max_new_tokens has 2 values; expected one"),
        ({"capacity": 2}, ValueError, "row 0's prompt of 3 tokens is longer than the capacity of 2"),
        ({"capacity": 0}, ValueError, "capacity is 0; expected a positive integer"),
        ({"capacity": 2.5}, ValueError, "capacity is 2.5"),
        ({"do_sample": True}, ValueError, r"sampling needs a key; pass key=jax.random.key\(seed\)"),
        ({"key": 7}, ValueError, r"key is int; expected jax.random.key\(seed\)"),
        ({"key": jax.random.PRNGKey(1)}, ValueError, "expected a key made by jax.random.key"),
        ({"key": jax.random.key(1, impl="rbg")}, ValueError, "the key uses rbg"),
        ({"key": jax.random.split(KEY, 2)}, ValueError, "expected one key or 1 keys"),
        ({"temperature": 0.5}, ValueError, "temperature changes nothing unless do_sample=True"),
        ({"top_k": 5}, ValueError, "top_k changes nothing unless do_sample=True"),
        (
            {"temprature": 0.5},
            TypeError,
            "generate has no option 'temprature'; the options are max_new_tokens, do_sample",
        ),
        ({"config": {"do_sample": True}}, TypeError, "config is dict; expected a GenerationConfig"),
        ({"eos_token_id": VOCAB}, ValueError, f"eos_token_id {VOCAB} is outside the vocabulary"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'; expected one of"),
        ({"state": 5}, ValueError, "state is int; expected the state of an earlier result"),
        ({"model": 5}, ValueError, "expected a model with `spec` and `decoder_weights"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(model, arguments, error, message):
    with pytest.raises(error, match=message):
        generate(**({"model": model, "prompt": [[1, 2, 3]], "max_new_tokens": 4} | arguments))


def test_bad_use_of_a_state_is_named(model):
    state = generate(model, [prompt(20), prompt(3)], max_new_tokens=2, capacity=24).state
    for arguments, message in (
        ({"prompt": [prompt(3)]}, "1 prompts for a state of 2 rows"),
        ({"prompt": [prompt(3), []]}, "row 0's prompt of 3 tokens, after 22 that it holds already, does not fit"),
        ({"capacity": 30}, "capacity goes with a new state; the one that is given has room for 24 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, **({"state": state, "max_new_tokens": 2} | arguments))
    other = Decoder.from_weights(SPECS["plain"], random_weights(SPECS["plain"]))
    with pytest.raises(ValueError, match=r"state.k_cache is float32"):
        generate(other, state=state, max_new_tokens=2)
    assert not state.k_cache.is_deleted()


def test_inside_jit_the_way_out_is_named(model):
    with pytest.raises(ValueError, match="inside jit, use prefill and decode"):
        jax.jit(lambda tokens: generate(model, tokens, max_new_tokens=2).tokens)(np.ones((1, 3), np.int32))
