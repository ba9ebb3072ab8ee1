"""A conversation as OpenAI writes it: messages, and how they become a prompt through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from qwen_ray.core.errors import InvalidRequest
from qwen_ray.serving.fields import Flag, Part, null_is_default
from qwen_ray.serving.tool_schema import Calls, Tools
from qwen_ray.text.chat import Conversation

MAX_MESSAGES = 2048  # as OpenAI has it, like the number of parts
MAX_PARTS = 2048


class TextPart(Part):
    type: Literal["text"]
    text: str


class Message(Part):
    """One message of a conversation. Parts other than text are refused.

    `prefix` (or `partial`, which is Qwen's word for it) of the last one, an assistant's: the answer goes on from there.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # what other servers call the same
    annotations: Annotated[list[Any], Field(max_length=MAX_PARTS)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Calls | None = None
    tool_call_id: str | None = None
    prefix: Flag | None = None
    partial: Flag | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for number, part in enumerate(value[: MAX_PARTS + 1] if isinstance(value, list) else ()):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise ValueError(f"part {number} is of type {kind!r}; this model takes text and nothing else")
        return value

    @model_validator(mode="after")
    def _fits_the_role(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise ValueError(f"{name} is for messages of role {role!r}, this one is of role {self.role!r}")
        return self

    @property
    def is_open(self) -> bool:
        return bool(self.prefix or self.partial)

    def to_template(self) -> dict[str, Any]:
        """As chat templates want it: plain strings."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or ())
        role = "system" if self.role == "developer" else self.role
        extra = {
            "name": self.name,
            "reasoning_content": self.reasoning if self.reasoning_content is None else self.reasoning_content,
            "tool_call_id": self.tool_call_id,
            "tool_calls": [call.to_template() for call in self.tool_calls or ()] or None,
        }
        return {"role": role, "content": text, **{key: value for key, value in extra.items() if value is not None}}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ConversationFields(BaseModel):
    """How messages become a prompt through the chat template."""

    tools: Annotated[Tools, BeforeValidator(null_is_default, json_schema_input_type=Tools | None)] = Field(
        default_factory=list
    )
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any], BeforeValidator(null_is_default, json_schema_input_type=dict[str, Any] | None)
    ] = Field(default_factory=dict)

    def to_conversation(self, messages: Sequence[Message], *, has_tools: bool = True) -> Conversation:
        """Raises InvalidRequest for messages that do not go together with the rest."""
        if any(message.is_open for message in messages[:-1]):
            raise InvalidRequest("Only the last message may have prefix or partial.", param="messages")
        last = messages[-1]
        continues = last.is_open if self.continue_final_message is None else self.continue_final_message
        if continues and (last.role != "assistant" or last.tool_calls):
            message = "To go on from the last message, it must be the assistant's, and without tool_calls."
            raise InvalidRequest(message, param="messages")
        if continues and self.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message exclude each other."
            raise InvalidRequest(message, param="add_generation_prompt")
        return Conversation(
            messages=[message.to_template() for message in messages],
            tools=[tool.to_template() for tool in self.tools] if has_tools else [],
            continues=continues,
            begins_answer=not continues if self.add_generation_prompt is None else self.add_generation_prompt,
            variables=self.chat_template_kwargs,
        )
