"""Chat templates in the ways of several families, and conversations to render with them.

The templates are written for these tests, from what the families' formats look like and with the Jinja that their own
templates use. What transformers renders is in data/chats.json: python tests/golden/make_chats.py makes it.
"""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TEMPLATES = {
    # ChatML with a default system message, as Qwen 2 and SmolLM 2.
    "chatml": """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
""",
    # Headers, trimmed contents, tools as indented JSON, as Llama 3.
    "headers": """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = "26 Jul 2024" %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    # Another name for the assistant, no system messages, roles that must alternate, as Gemma.
    "turns": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
""",
    # The system message inside the first or last user message, a namespace and break, as Mistral.
    "inst": """\
{{- bos_token }}
{%- set ns = namespace(last=-1, system='') %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{%- set ns.system = m.content + '\\n\\n' %}{%- continue %}{%- endif %}
    {%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
        {%- if loop.index0 > 20 %}{%- break %}{%- endif %}
    {%- endif %}
{%- endfor %}
""",
    # Earlier turns lose their reasoning; an empty one where it is switched off; macros and reversed loops, as Qwen 3.
    "thinking": """\
{%- macro block(role, text) -%}
{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' -}}
{%- endmacro -%}
{%- set ns = namespace(query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.found %}{%- set ns.query = index %}{%- set ns.found = true %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.query and reasoning %}
            {{- block(message.role, '<think>\\n' + reasoning + '\\n</think>\\n\\n' + content) }}
        {%- else %}{{- block(message.role, content) }}{%- endif %}
    {%- else %}{{- block(message.role, content) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    # Marks what the assistant said, numbers and filters, as SmolLM 3 and Granite.
    "marked": """\
{%- for message in messages -%}
    {%- if message["role"] in ["user", "system"] -%}
        {{ "<|start_of_role|>" ~ message.role ~ "<|end_of_role|>" ~ message.content ~ "<|end_of_text|>\\n" }}
    {%- elif message["role"] == "assistant" -%}
        {% generation %}{{ "<|start_of_role|>assistant<|end_of_role|>" + message.content + "<|end_of_text|>\\n" }}\
{% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if documents -%}{{ documents | map(attribute='text') | join('; ') | upper }}{%- endif -%}
{{- {'count': messages | length, 'é': '<&>'} | tojson -}}
{%- if add_generation_prompt -%}{{ "<|start_of_role|>assistant<|end_of_role|>" }}{%- endif -%}
""",
}


def _say(*texts: str, system: str | None = None) -> list[dict]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


CONVERSATIONS = {
    "one": _say("Hello, what is 2 < 3 & 4?"),
    "three": _say("  spaces around  ", "<think>\nhm\n</think>\n\nan answer", "naïve 你好 🎉\n\nmore"),
    "system": _say("Hi", "Ho", "Hi again", system="Be terse."),
    "none": [{"role": "user", "content": "x", "name": None}],
    "wrong": _say("a") + _say("b"),
}

OPTIONS: dict[str, dict] = {
    "": {},
    "closed": {"add_generation_prompt": False},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]},
    "variables": {"enable_thinking": False, "date_string": "1 May 2025", "documents": [{"text": "one"}]},
}
