"""Conversations: the cache kept from turn to turn and taken back where they part, stop strings, and what goes wrong."""

from __future__ import annotations

import copy
import importlib
import json
import re
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
from chatting import TEMPLATE, Talker, talker, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import SPECS, random_weights

from jax_monokernel import Chat, ChatTemplate, chat, generate, prepare
from jax_monokernel.models import Decoder
from jax_monokernel.stop_strings import StopStrings

pytestmark = pytest.mark.usefixtures("quick_compiles")

CAPACITY = 256
generate_module = importlib.import_module("jax_monokernel.generate")  # the name is the function's
MESSAGES = ["the cat, a dog.", "ab abba\n", "what", "hm. the the the, and more of it", "x"]
SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 12, "repetition_penalty": 1.3}
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def model():
    return talker()


@pytest.fixture
def prefilled(monkeypatch):
    """How many tokens prefill is given, call by call."""
    seen: list[int] = []
    original = chat._prefill

    def count(source, tokens, lengths, *rest, **options):
        if lengths[0]:
            seen.append(int(lengths[0]))
        return original(source, tokens, lengths, *rest, **options)

    monkeypatch.setattr(chat, "_prefill", count)
    return seen


def rendered(made: Chat, text: str) -> list[int]:
    messages = [*made.history, {"role": "user", "content": text}]
    return made._tokenizer.encode(made._template.render(messages), add_special_tokens=False)


def from_scratch(model, ids: list[int], **options) -> tuple[list[int], str]:
    """What generate says after the whole conversation."""
    # A long row beside it, so that all lengths share a compiled program.
    result = generate(model, [ids, [5] * 130], capacity=CAPACITY, **options)
    return result.tokens[0, : result.lengths[0]].tolist(), result.text[0]


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize(
    ("options", "backend"), [(SAMPLING | {"key": KEY}, None), ({}, "reference")], ids=["sampling", "reference"]
)
def test_answers_are_those_of_the_whole_conversation_and_only_new_tokens_are_prefilled(
    model, prefilled, options, backend
):
    made = Chat(model, system="be brief", max_new_tokens=20, capacity=CAPACITY, backend=backend, **options)
    held: list[int] = []
    for text in MESSAGES:
        ids = rendered(made, text)
        want, said = from_scratch(model, ids, max_new_tokens=20, backend=backend, **options)
        pieces = list(made.send(text))
        assert [piece.token for piece in pieces if piece.token is not None] == want
        assert "".join(piece.text for piece in pieces) == said == made.history[-1]["content"]
        assert all(a.time <= b.time for a, b in pairwise(pieces))
        # The last token that was generated is not in the cache, and the last of the conversation is decode's to read.
        keep = min(common(ids, held[:-1]), len(ids) - 1)
        assert made.last.prefilled_tokens == len(ids) - keep
        assert prefilled == ([] if len(ids) == keep + 1 else [len(ids) - keep - (keep > 0)])
        prefilled.clear()
        held = ids + want
        assert made.cached_tokens == held
    assert [m["role"] for m in made.history] == ["system"] + ["user", "assistant"] * len(MESSAGES)
    assert made.last.conversation_tokens == len(ids) > 60


def test_a_turn_costs_its_own_tokens(model, prefilled):
    # Without merges, what is generated is encoded as it was: nothing but the new message is ever prefilled.
    made = Chat(
        model,
        max_new_tokens=30,
        capacity=CAPACITY,
        logit_bias=dict.fromkeys((0, 1, 2, 3, 4, 5, 11, 34, 35, 36), -100.0),  # special tokens, a, b, h and words
    )
    for text in ("ac", "de", "fgi", "i"):
        before = len(made.cached_tokens)
        made.ask(text)
        # The message between <u> and <a>, and of the answer before, its last token and the </s> after it.
        new = len(text) + (4 if before else 2)
        assert made.last.prefilled_tokens == new
        assert sum(prefilled) == new - (before > 0)
        prefilled.clear()
    assert made.last.conversation_tokens > 100


def test_a_changed_history_takes_the_cache_back():
    model = talker("windows", seed=2)
    options = {"max_new_tokens": 8, "key": KEY} | SAMPLING
    made = Chat(model, capacity=CAPACITY, **options)
    rng = np.random.default_rng(7)
    taken_back = 0
    for turn in range(14):
        kind = rng.integers(0, 5)
        if kind == 0 and made.history:  # another answer
            made.history[-1] = {"role": "assistant", "content": "the end, ab"}
        elif kind == 1:  # the last question again
            del made.history[-2:]
        elif kind == 2:
            made.system = ["ab", "of", None][rng.integers(3)]
        elif kind == 3 and turn % 2:
            made.history[:] = copy.deepcopy(made.history[:3])
        text = MESSAGES[rng.integers(len(MESSAGES))]
        ids = rendered(made, text)
        taken_back += common(ids, made.cached_tokens) < min(len(ids), len(made.cached_tokens)) - 2
        want, said = from_scratch(model, ids, **options)
        assert made.ask(text) == said
        assert made.cached_tokens == ids + want
        if len(ids) > 150:
            made.reset()
    assert taken_back >= 4


def test_a_template_that_rewrites_earlier_turns(model):
    # As reasoning models do: what was said before the first comma is dropped from all but the last answer.
    template = TEMPLATE.replace("~ m.content", "~ (m.content if m.role != 'assistant' else m.content.split(',')[-1])")
    made = Chat(model, template=template, max_new_tokens=24, capacity=CAPACITY)
    for text in MESSAGES:
        want = from_scratch(model, rendered(made, text), max_new_tokens=24)[1]
        assert made.ask(text) == want


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=12),
)
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, cuts):
    scan = StopStrings.checked(stops).scan()
    ends = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    got, read = "", 0
    for a, b in pairwise(ends):
        got += scan.put(text[a:b])
        read = b
        assert scan.taken == b
        if scan.stopped:
            break
    got += scan.finish()
    found = [at for at in (text[:read].find(stop) for stop in stops) if at >= 0]
    # Of two that overlap, the one that is complete first ends the text.
    assert scan.stopped == bool(found)
    assert got == (text[: min(found)] if found else text)
    assert not (scan.stopped and scan.put("abc"))


def test_an_answer_ends_before_a_stop_string_that_spans_tokens(model):
    options = {"max_new_tokens": 30, "eos_token_id": ()}
    free = Chat(model, capacity=CAPACITY, **options).ask(MESSAGES[0])
    stop = free[9:13]
    at = free.index(stop)
    made = Chat(model, capacity=CAPACITY, stop=["never said", stop], **options)
    pieces = list(made.send(MESSAGES[0]))
    assert "".join(p.text for p in pieces) == free[:at] == made.history[-1]["content"]
    assert made.last.finish_reason == "stop"
    assert len(pieces) < 30
    # What was decoded after it is out of the cache's tokens, and the next turn is as if it had never been.
    prompt = made._tokenizer.encode(made._template.render(made.history[:1]), add_special_tokens=False)
    said = made.cached_tokens[len(prompt) :]
    assert made.cached_tokens[: len(prompt)] == prompt
    assert free[:at].startswith(made._tokenizer.decode(said))
    assert len(said) >= 5
    want = from_scratch(model, rendered(made, "and"), **options)[1]
    assert made.ask("and") == (want[: want.index(stop)] if stop in want else want)


def test_text_held_back_for_a_stop_string_comes_in_the_end(model):
    options = {"max_new_tokens": 12, "eos_token_id": ()}
    free = Chat(model, capacity=CAPACITY, **options).ask(MESSAGES[0])
    made = Chat(model, capacity=CAPACITY, stop=free[-2:] + "zzz", **options)
    pieces = list(made.send(MESSAGES[0]))
    assert "".join(p.text for p in pieces) == free
    assert (pieces[-1].token, pieces[-1].text) == (None, free[-2:])
    assert made.last.finish_reason == "length"


def test_who_stops_reading_keeps_what_was_said(model):
    made = Chat(model, max_new_tokens=40, capacity=CAPACITY, eos_token_id=())
    said = ""
    for i, piece in enumerate(made.send(MESSAGES[0])):
        said += piece.text
        if i == 8:
            break
    del piece
    assert made.history[-1] == {"role": "assistant", "content": said}
    assert made.last.finish_reason == "interrupted"
    assert (
        made.ask("go on") == from_scratch(model, rendered_before(made, "go on"), max_new_tokens=40, eos_token_id=())[1]
    )


def rendered_before(made: Chat, text: str) -> list[int]:
    """The conversation up to the last answer."""
    assert made.history[-2]["content"] == text
    return made._tokenizer.encode(made._template.render(made.history[:-1]), add_special_tokens=False)


def test_a_new_question_ends_the_answer_before(model):
    made = Chat(model, max_new_tokens=40, capacity=CAPACITY)
    first = made.send(MESSAGES[0])
    said = next(first).text + next(first).text
    made.ask("b")
    assert list(first) == []
    assert [m["content"] for m in made.history[:3]] == [MESSAGES[0], said, "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, jax.errors.JaxRuntimeError, MemoryError])
def test_a_decode_that_fails_costs_the_cache_but_not_the_conversation(model, monkeypatch, error):
    made = Chat(model, max_new_tokens=20, capacity=CAPACITY, eos_token_id=())
    made.ask(MESSAGES[0])
    history = copy.deepcopy(made.history)

    def fail(weights, tape, tokens, counts, params, key, state, *rest, **options):
        jax.tree.map(lambda leaf: leaf.delete(), state)  # as an execution that fails does
        raise error("out of something")

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "_run", fail)
        with pytest.raises(error):
            made.ask(MESSAGES[1])
    assert made.cached_tokens == []
    assert made.history == history
    want = from_scratch(model, rendered(made, "so"), max_new_tokens=20, eos_token_id=())[1]
    assert made.ask("so") == want
    assert made.last.prefilled_tokens == made.last.conversation_tokens


def test_who_interrupts_the_reading_keeps_the_cache(model, prefilled):
    made = Chat(model, max_new_tokens=40, capacity=CAPACITY, eos_token_id=())
    made.ask(MESSAGES[0])
    held, said = len(made.cached_tokens), ""

    def read():
        nonlocal said
        for piece in made.send(MESSAGES[1]):
            said += piece.text
            if len(said) > 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert [m["content"] for m in made.history[2:]] == [MESSAGES[1], said]
    ids = rendered(made, "so")
    assert held < common(ids, made.cached_tokens)
    prefilled.clear()
    want = from_scratch(model, ids, max_new_tokens=40, eos_token_id=())[1]
    assert made.ask("so") == want
    assert sum(prefilled) <= made.last.prefilled_tokens < made.last.conversation_tokens - held


def test_what_does_not_fit_is_refused_and_changes_nothing(model):
    made = Chat(model, max_new_tokens=60, capacity=48, eos_token_id=())
    made.ask("ok")
    assert made.last.finish_reason == "capacity"
    assert made.last.new_tokens > 30
    history, cached = copy.deepcopy(made.history), made.cached_tokens
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, more than the 48 .* reset it"):
        made.send("more")
    assert (made.history, made.cached_tokens) == (history, cached)
    made.reset()
    assert made.history == []
    # One token of room is enough for one token.
    length = 48 - len(rendered(made, ""))
    made.ask("x" * length)
    assert (made.last.conversation_tokens, made.last.new_tokens) == (48, 1)
    made.reset()
    with pytest.raises(ValueError, match="49 tokens"):
        made.send("x" * (length + 1))


def test_a_history_goes_to_a_file_and_back(model, tmp_path):
    made = Chat(model, system="be the cat", max_new_tokens=9, capacity=CAPACITY)
    made.ask(MESSAGES[0])
    path = tmp_path / "talk.json"
    made.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["talk.json"]
    assert json.loads(path.read_text()) == made.history
    other = Chat(model, max_new_tokens=9, capacity=CAPACITY)
    other.load(path)
    assert (other.history, other.system) == (made.history, "be the cat")
    assert other.ask("x") == made.ask("x")
    assert (other.last.prefilled_tokens, made.last.prefilled_tokens < 16) == (other.last.conversation_tokens, True)
    for text in ("{", '{"role": "user"}', '[{"role": "user"}]', '[{"role": 1, "content": "x"}]', "\udcff"):
        path.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=r"talk\.json is not a saved conversation"):
            other.load(path)
    assert other.history == made.history
    with pytest.raises(OSError, match="nowhere"):
        other.load(tmp_path / "nowhere")


def test_the_system_message_stays_and_changes(model):
    made = Chat(model, system="a", max_new_tokens=4, capacity=CAPACITY)
    made.ask("x")
    made.reset()
    assert made.history == [{"role": "system", "content": "a"}]
    made.system = "the cat"
    assert made.ask("x") == Chat(model, system="the cat", max_new_tokens=4, capacity=CAPACITY).ask("x")
    made.system = None
    assert (made.system, len(made.history)) == (None, 2)


def test_a_prepared_model_without_weights_by_role_talks_the_same(model):
    lean = Chat(prepare(model, keep_weights=False), max_new_tokens=20, capacity=CAPACITY)
    made = Chat(model, max_new_tokens=20, capacity=CAPACITY)
    assert [lean.ask(text) for text in MESSAGES] == [made.ask(text) for text in MESSAGES]


def test_another_chat_compiles_nothing(model, compilations):
    def talk(seed):
        made = Chat(model, max_new_tokens=20, capacity=CAPACITY, key=jax.random.key(seed), stop=["zz"], **SAMPLING)
        return made.ask("x" * (20 + seed)), list(made.send("more"))

    talk(1)
    del compilations[:]
    talk(2)
    talk(3)
    assert compilations == []


def test_plain_texts_go_on(model):
    made = Chat(model, template="plain", max_new_tokens=12, capacity=CAPACITY)
    made.ask("the")
    made.ask("ab")
    assert made._template.render(made.history) == f"the{made.history[1]['content']}\nab{made.history[3]['content']}"


class Mute(Talker):
    tokenizer = tokenizer(None)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Decoder, {}, ValueError, "the model has no tokenizer, so it cannot be talked to"),
        (Mute, {}, ValueError, 'has no chat template, .* pass template="plain"'),
        (Talker, {"template": "{% if"}, ValueError, "not valid Jinja"),
        (Talker, {"template": 7}, TypeError, "template is int; expected a ChatTemplate or a text in Jinja"),
        (Talker, {"stop": ["a", ""]}, ValueError, "a stop string is ''"),
        (Talker, {"stop": [3]}, ValueError, "a stop string is 3"),
        (Talker, {"capacity": 0}, ValueError, "capacity is 0; expected a positive integer"),
        (Talker, {"system": 3}, ValueError, r"a message is int; expected a text \(str\)"),
        (Talker, {"temperature": 0.5}, ValueError, "temperature changes nothing unless do_sample=True"),
        (Talker, {"do_sample": True}, ValueError, "sampling needs a key"),
        (Talker, {"max_new_tokens": [1, 2]}, ValueError, "max_new_tokens has 2 values; expected one"),
        (Talker, {"no_such": 1}, TypeError, "has no option 'no_such'"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, error, message):
    model = kind.from_weights(SPECS["plain"], random_weights(SPECS["plain"]))
    with pytest.raises(error, match=message):
        Chat(model, **arguments)


@pytest.mark.parametrize(
    ("text", "message"), [(7, "a message is int"), ("\udcff", "cannot be expressed in UTF-8"), (None, "a message is")]
)
def test_bad_messages_are_named(model, text, message):
    made = Chat(model, capacity=CAPACITY)
    with pytest.raises(ValueError, match=message):
        made.send(text)
    assert made.history == []


def test_a_template_that_refuses_leaves_the_history(model):
    made = Chat(model, template=ChatTemplate("{{ raise_exception('no') if messages|length > 1 else '<u>' }}"))
    made.ask("a")
    with pytest.raises(ValueError, match="refuses this conversation: no"):
        made.send("b")
    assert len(made.history) == 2


def test_the_documentation_runs(capsys):
    text = (Path(__file__).parents[1] / "docs" / "chat.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/chat.md", "exec"), {"__name__": "docs"})
    assert re.search(r"\d+ of \d+ tokens were new", capsys.readouterr().out)
