"""From prompts and conversations to token ids: the model's own chat template, or Gemma's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from ..errors import TPAError
from .side_files import SideFiles
from .tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer, place_images

Turns = Sequence[tuple[str, str]]  # (role, text); roles are system, user, and model or assistant


def chat_text(turns: Turns) -> str:
    """Gemma's chat template, without BOS; a leading "system" text goes before the first user text, as it is.

    >>> chat_text([("user", " Hi ")])
    '<start_of_turn>user\\nHi<end_of_turn>\\n<start_of_turn>model\\n'
    """
    system, turns = split_system(turns)
    said = ""
    for number, (role, text) in enumerate(turns):
        before = f"{system}\n\n" if system is not None and number == 0 else ""
        said += f"<start_of_turn>{role}\n{before}{text.strip()}<end_of_turn>\n"
    return said + "<start_of_turn>model\n"


def split_system(turns: Turns) -> tuple[str | None, list[tuple[str, str]]]:
    """(system text, turns of user and model), checked to alternate."""
    turns = [(("model" if role == "assistant" else role), text) for role, text in turns]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if not turns:
        raise TPAError("chat: a conversation needs a user turn, got none")
    for number, (role, _) in enumerate(turns):
        expected = "model" if number % 2 else "user"
        if role != expected:
            raise TPAError(f"chat: roles must alternate, turn {number} must be {expected!r}, got {role!r}")
    return system, turns


def prompt_tokens(
    model: Any, prompt: str, chat: bool, images: int = 0, system: str | None = None, bos: bool = True
) -> list[int]:
    """Token ids of the prompt, in the chat template if `chat`, with placeholders for its images. bos: start with BOS.

    model: anything with a tokenizer, a config and side files.
    """
    check_system(system, chat)
    if not prompt.strip():
        raise TPAError("generate: the prompt must not be empty")
    vision = model.config.vision
    prompt = place_images(prompt, images) if vision else prompt
    if not chat:
        return model.tokenizer.encode(prompt, bos, vision)
    turns = [("user", prompt)] if system is None else [("system", system), ("user", prompt)]
    ids = chat_tokens(model.tokenizer, model.side_files, turns, vision)
    return ids if bos or ids[:1] != [model.tokenizer.bos] else ids[1:]


def check_system(system: str | None, chat: bool) -> None:
    if system is not None and not chat:
        raise TPAError("generate: a system text belongs to a chat, but chat (--chat) is not asked for")


def stop_tokens(model: Any, chat: bool) -> frozenset[int]:
    """Ids that end a text: what the model's files say, and in a chat with Gemma's turns the end of one."""
    template = model.side_files.chat_template or "<end_of_turn>"
    turns = chat and model.tokenizer.marks_turns and "<end_of_turn>" in template
    return model.side_files.stop_tokens | ({END_OF_TURN} if turns else set())


def chat_tokens(tokenizer: Tokenizer, side_files: SideFiles, turns: Turns, vision: Any = None) -> list[int]:
    """Token ids of a whole conversation, up to where the model's answer begins."""
    if uses_gemma_template(side_files):
        if not tokenizer.marks_turns:
            got = tokenizer.encode("<start_of_turn>", bos=False)
            raise TPAError(f"chat: <start_of_turn> must be the one token {START_OF_TURN} of the tokenizer, got {got}")
        return tokenizer.encode(chat_text(turns), vision=vision)
    return tokenizer.encode(rendered(side_files, turns), bos=False, vision=vision)  # the template has it, or means none


def uses_gemma_template(side_files: SideFiles) -> bool:
    """True without a template of its own, or, where Jinja is missing, if that has Gemma's turns."""
    if side_files.chat_template is None:
        return True
    try:
        import jinja2  # noqa: F401
    except ImportError:
        if "<start_of_turn>" in side_files.chat_template:
            return True
        raise TPAError("chat: the model has its own chat template, which needs jinja2: pip install jinja2") from None
    return False


def rendered(side_files: SideFiles, turns: Turns, answers: bool = True) -> str:
    """A conversation by the template that came with the model, as `transformers` renders it.

    answers: end where the model's answer begins.
    """
    messages = [{"role": "assistant" if role == "model" else role, "content": text} for role, text in turns]
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": answers}
    try:
        return environment().from_string(side_files.chat_template or "").render(**given, **side_files.special_tokens)
    except Exception as problem:  # a template can raise anything
        line = str(problem).split("\n", 1)[0][:120]
        raise TPAError(f"chat: the model's chat template cannot be used: {line}") from None


@cache
def environment() -> Any:
    """Jinja's sandbox, with what `transformers` adds to it."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what a model is trained on: no difference here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": refuse, "strftime_now": lambda format: datetime.now().strftime(format)}
    return made


def next_turn(
    tokenizer: Tokenizer, side_files: SideFiles, turns: Turns, text: str, vision: Any = None
) -> list[int] | None:
    """Token ids of one more user text: what closes the model's answer, the last of `turns`, and what follows it. None
    where the template shows earlier turns in another way than before.
    """
    if uses_gemma_template(side_files):
        return tokenizer.encode(f"<end_of_turn>\n{chat_text([('user', text)])}", bos=False, vision=vision)
    asked, closed = rendered(side_files, turns[:-1]), rendered(side_files, turns, answers=False)
    whole, answer = rendered(side_files, [*turns, ("user", text)]), turns[-1][1].strip()
    if not (answer and closed.startswith(asked + answer) and whole.startswith(closed)):
        return None
    return tokenizer.encode(whole[len(asked + answer) :], bos=False, vision=vision)
