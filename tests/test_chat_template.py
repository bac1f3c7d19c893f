"""Chat templates render as transformers renders them, come from checkpoints in every form, and cannot do harm."""

from __future__ import annotations

import json
import pickle
import re
import time
from pathlib import Path

import pytest
from golden import DATA
from golden.chats import CONVERSATIONS, OPTIONS, TEMPLATES, TOKENS

from jax_monokernel.chat_template import PLAIN, ChatTemplate, ChatTemplateError
from jax_monokernel.checkpoints import CheckpointError

RENDERED = json.loads((DATA / "chats.json").read_text())
ASK = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_renders_what_transformers_renders(name, conversation):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    for option, given in OPTIONS.items():
        want = RENDERED[f"{name}/{conversation}/{option}"]
        if want is None:
            with pytest.raises(ChatTemplateError, match="the chat template refuses this conversation: "):
                template.render(CONVERSATIONS[conversation], **given)
        else:
            assert template.render(CONVERSATIONS[conversation], **given) == want


def test_the_cases_differ():
    texts = [text for name, text in RENDERED.items() if "/" in name and text is not None]
    assert len(texts) == 112
    assert len(set(texts)) > 70


def folder_with(path: Path, config: object = None, jinja: str | None = None) -> Path:
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (path / "chat_template.jinja").write_text(jinja)
    return path


@pytest.mark.parametrize(
    ("config", "jinja"),
    [
        ({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "bos_token": "<s>"}, None),
        ({"chat_template": "another one", "bos_token": {"content": "<s>"}}, "{{ bos_token }}{{ messages[0].content }}"),
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
                ],
                "bos_token": "<s>",
                "eos_token": None,
            },
            None,
        ),
        (None, "<s>{{ messages[0].content }}"),
    ],
    ids=["config", "file", "named", "file alone"],
)
def test_a_checkpoint_brings_its_template(tmp_path, config, jinja):
    template = ChatTemplate.from_folder(folder_with(tmp_path, config, jinja))
    assert template.render(ASK) == "<s>hi"
    assert pickle.loads(pickle.dumps(template)).render(ASK) == "<s>hi"


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_no_template_is_none(tmp_path, config):
    assert ChatTemplate.from_folder(folder_with(tmp_path, config)) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": "{% if %}"}, r"tokenizer_config.json: the chat template is not valid Jinja: .* \(line 1\)"),
        ({"chat_template": 7}, "chat_template is int; expected a text"),
        (
            {"chat_template": [{"name": "rag", "template": "x"}]},
            r"chat templates \['rag'\]; expected one named default",
        ),
    ],
)
def test_damaged_templates_are_named(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message):
        ChatTemplate.from_folder(folder_with(tmp_path, config))


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{{ raise_exception('only one') }}", ASK, "refuses this conversation: only one"),
        ("{{ messages[0].content + 1 }}", ASK, "fails on this conversation: TypeError"),
        ("{{ messages[5].content.x }}", ASK, "refuses this conversation"),
        ("x", [], "there are no messages"),
        ("x", [{"role": "user", "content": object()}], "has a object in it; expected JSON's types"),
    ],
)
def test_what_goes_wrong_is_said(source, messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(_x=1) }}",
        "{% set _ = messages.append(1) %}{{ messages }}",
        "{{ ''.__class__.mro() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
    ],
)
def test_a_template_gets_at_nothing_outside(source):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(ASK)


def test_the_time_can_be_asked_for():
    text = ChatTemplate("{{ strftime_now('%Y') }}").render(ASK)
    assert abs(int(text) - time.localtime().tm_year) <= 1


def test_the_plain_template_is_a_text_that_goes_on():
    messages = [
        {"role": role, "content": text} for role, text in (("user", "a ="), ("assistant", " 1"), ("user", "b ="))
    ]
    assert PLAIN.render(messages) == "a = 1\nb ="
    assert PLAIN.render([{"role": "system", "content": "# maths"}, *messages]) == "# maths\na = 1\nb ="
    assert not re.search("user|assistant", PLAIN.render(messages))
