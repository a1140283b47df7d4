"""Chat templates against transformers' apply_chat_template."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kbit.engine.chat import ChatTemplate
from kbit.engine.tokenizer import Tokenizer
from kbit.errors import KbitError
from tests.kbit.speaker import CHAT, byte_level, write_tokenizer

TALK = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "  Hé, «how»?\n"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Good."},
]
TEMPLATES = {
    "plain": CHAT,
    "whitespace control": """{{- bos_token }}
{% for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<<SYS>>' + message.content | trim + '<</SYS>>' }}
    {%- else %}
{{ message.role | upper }}: {{ message['content'].strip() }}{{ eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
ASSISTANT:
{% endif %}
""",
    "loop controls": """
{%- for m in messages %}
{%- if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index0 }} {{ m.content }}
{%- if loop.index0 > 2 %}{% break %}{% endif %}
{%- endfor %}""",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "namespace": """{% set ns = namespace(first=true) %}{% for m in messages -%}
{% if ns.first %}{% set ns.first = false %}[{% endif %}{{ m.content }}{% endfor %}]""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "tools are none": "{% if tools is none and not documents %}no tools{% endif %}",
    "values": "{{ enable_thinking is defined and enable_thinking }}{{ pad_token is defined }}",
    "date": "{{ strftime_now('%Y') }}",
}


def write(path: Path, template: Any) -> None:
    write_tokenizer(path, byte_level(), chat_template=template)


def load(path: Path) -> ChatTemplate | None:
    tokenizer = Tokenizer.load(path)
    return ChatTemplate.load(path, tokenizer.config, tokenizer.special_tokens)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers(tmp_path: Path, name: str, prompt: bool) -> None:
    write(tmp_path, TEMPLATES[name])
    template, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert template is not None
    for values in ({}, {"enable_thinking": True}):
        expected = theirs.apply_chat_template(
            TALK, tokenize=False, add_generation_prompt=prompt, **values
        )
        assert template.render(TALK, add_generation_prompt=prompt, **values) == expected
        assert expected


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    write(tmp_path, "from the config")
    assert load(tmp_path).render([]) == "from the config"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").write_text("from its file")
    assert load(tmp_path).render([]) == "from its file"  # type: ignore[union-attr]
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path, [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert load(tmp_path).render([]) == "d"  # type: ignore[union-attr]
    write_tokenizer(tmp_path, byte_level())
    assert load(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from JSON"}))
    assert load(tmp_path).render([]) == "from JSON"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{{ messages[0].content.nope.nope }}", "refuses"),
        ("{% for %}", "no valid Jinja"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 1 + 'a' }}", "fails on this conversation"),
        ([{"name": "tool_use", "template": "t"}], "none is called default"),
        ({"a": 1}, "is no text"),
    ],
)
def test_refusals(tmp_path: Path, template: Any, told: str) -> None:
    write(tmp_path, template)
    with pytest.raises(KbitError, match=told):
        load(tmp_path).render(TALK)  # type: ignore[union-attr]
