"""A conversation as the text a model was trained on, by the checkpoint's own chat template.

Templates are Jinja programs that come with a download, so they run in jinja2's sandbox, with the
names that transformers gives them: raise_exception, strftime_now, the tojson filter, `break` and
`continue`, and the `{% generation %}` block, which only marks the assistant's words for training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kbit.errors import KbitError

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant", "content": text}, and what else a template reads."""


class _GenerationBlock(Extension):
    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled chat template; made by `ChatTemplate.load` or from its source.

    special_tokens: bos_token, eos_token, ... which templates write out.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise KbitError(f"the checkpoint's chat template is no valid Jinja ({error})") from None

    @classmethod
    def load(
        cls, path: Path, tokenizer_config: dict[str, Any], special_tokens: dict[str, str]
    ) -> ChatTemplate | None:
        """The checkpoint's template, or None where it has none.

        Read from chat_template.jinja, tokenizer_config.json (of several named ones the one called
        "default") or chat_template.json.
        """
        source: Any = None
        file, json_file = path / "chat_template.jinja", path / "chat_template.json"
        if file.exists():
            source = file.read_text(encoding="utf-8")
        elif tokenizer_config.get("chat_template"):
            source = tokenizer_config["chat_template"]
        elif json_file.exists():
            try:
                source = json.loads(json_file.read_text(encoding="utf-8")).get("chat_template")
            except (ValueError, AttributeError):
                raise KbitError(f"{json_file}: is no JSON object with a chat_template") from None
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
            if source is None:
                raise KbitError(
                    f"{path}: has chat templates {', '.join(map(str, named))}, but none is "
                    "called default"
                )
        if source is None:
            return None
        if not isinstance(source, str):
            raise KbitError(f"{path}: its chat_template is no text")
        return cls(source, special_tokens)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """The conversation as text that ends where the assistant is to speak.

        values: further names for the template (tools, documents, enable_thinking, ...). Raises
        KbitError where the template refuses the messages.
        """
        names: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens, **values}
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **names
            )
        except jinja2.TemplateError as error:
            raise KbitError(f"the checkpoint's chat template refuses: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise KbitError(
                f"the checkpoint's chat template fails on this conversation ({error})"
            ) from None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which would stand in the prompt.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
