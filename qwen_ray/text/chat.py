"""Messages → prompt text, by the model's own Jinja template.

Gives templates what transformers gives them, so that they render alike (transformers/utils/chat_template_utils.py):
sandboxed, blocks trimmed, loop controls, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML alone, and
`{% generation %}` (rendered as its body). Knows OpenAI's message shapes; knows nothing of ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from qwen_ray.core.errors import CheckpointError, InvalidRequest

MANY_CHARACTERS = 2**16
_CUT = "\ue000cut\ue000"  # of private use: it stands in no text


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What becomes a prompt. `begins_answer` opens a new message, `continues` leaves the last one open.

    `variables` are the template's own switches.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    begins_answer: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def num_characters(self) -> int:
        """At most so many, of what is not the template's: a measure of the work. Tools and calls count as very long."""
        texts = sum(len(one.get(key) or "") for one in self.messages for key in ("content", "reasoning_content"))
        num_calls = sum(len(one.get("tool_calls") or ()) for one in self.messages)
        return texts + len(self.messages) + MANY_CHARACTERS * (len(self.tools) + num_calls)


class ChatTemplate:
    """A model's templates, compiled once. `special_tokens` are variables that every template sees."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._texts = tuple(templates.values())
        self.default_text = templates.get("default")
        self._special_tokens = dict(special_tokens)
        self._templates: dict[str, jinja2.Template] = {}
        for name, text in templates.items():
            try:
                self._templates[name] = environment.from_string(text)
            except jinja2.TemplateError as error:
                raise CheckpointError(f"chat template {name!r}: {error}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Raises InvalidRequest when there is no template, or when it refuses these messages.

        With `continue_final_message` it ends where the last message's content does.
        """
        template = self._pick(tools)
        if not messages:
            raise InvalidRequest("messages must not be empty.", param="messages")
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        if continue_final_message:
            plain[-1]["content"] = plain[-1].get("content", "") + _CUT
        given = {**self._special_tokens, **variables}
        given |= {
            "messages": plain,
            "tools": [dict(tool) for tool in tools] if tools else None,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = template.render(given)
        except Exception as error:  # whatever a template does with messages it did not expect
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        if not continue_final_message:
            return text
        if _CUT not in text:
            raise InvalidRequest("The model's chat template does not show the last message.", param="messages")
        return text[: text.rindex(_CUT)]

    def speaks_of(self, text: str) -> bool:
        """Whether a template has `text` in it."""
        return any(text in template for template in self._texts)

    def _pick(self, tools: Sequence[Mapping[str, Any]] | None) -> jinja2.Template:
        template = (self._templates.get("tool_use") if tools else None) or self._templates.get("default")
        if template is None:
            raise InvalidRequest(
                "This model has no chat template, so it takes no messages; use /v1/completions.", param="messages"
            )
        return template


def _plain_message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A message as templates expect it: text content, parsed tool arguments, absent instead of null."""
    plain = {key: value for key, value in message.items() if value is not None}
    if isinstance(plain.get("content"), list):
        plain["content"] = _flat_text(plain["content"], index)
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_plain_tool_call(call, index) for call in plain["tool_calls"]]
    reasoning = plain.get("reasoning_content", plain.get("reasoning"))
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    return plain


def _flat_text(parts: list[Any], index: int) -> str:
    texts: list[str] = []
    for number, part in enumerate(parts):
        where = f"messages[{index}].content[{number}]"
        kind = cast("dict[str, Any]", part).get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise InvalidRequest(f"{where}: type {kind!r} is not served; this model takes text.", param="messages")
        text = cast("dict[str, Any]", part).get("text")
        if not isinstance(text, str):
            raise InvalidRequest(f"{where}: text must be a string.", param="messages")
        texts.append(text)
    return "\n".join(texts)


def _plain_tool_call(call: dict[str, Any], index: int) -> dict[str, Any]:
    """OpenAI sends arguments as a JSON string, templates expect the object."""
    try:
        function: dict[str, Any] = call["function"]
        arguments: Any = function["arguments"]
        parsed = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        return {**call, "function": {**function, "arguments": parsed}}
    except (KeyError, TypeError, ValueError) as error:
        where = f"messages[{index}].tool_calls"
        raise InvalidRequest(
            f"{where}: a call needs function.arguments in JSON ({error}).", param="messages"
        ) from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    filters = cast("dict[str, Any]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters["tojson"] = _tojson
    variables = cast("dict[str, Any]", environment.globals)  # pyright: ignore[reportUnknownMemberType]
    variables |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
