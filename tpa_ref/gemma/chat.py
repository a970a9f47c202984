"""From prompts and conversations to token ids: the model's own chat template, or Gemma's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..errors import TPAError
from .side_files import SideFiles
from .tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer, place_images

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
    return ids if bos or ids[:1] != [BOS] else ids[1:]


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


def rendered(side_files: SideFiles, turns: Turns) -> str:
    """A conversation by the template that came with the model, in Jinja's sandbox, as `transformers` renders it."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    messages = [{"role": "assistant" if role == "model" else role, "content": text} for role, text in turns]
    try:
        template = environment.from_string(side_files.chat_template or "")
        return template.render(messages=messages, add_generation_prompt=True, **side_files.special_tokens)
    except Exception as problem:  # a template can raise anything
        line = str(problem).split("\n", 1)[0][:120]
        raise TPAError(f"chat: the model's chat template cannot be used: {line}") from None


def next_turn(tokenizer: Tokenizer, side_files: SideFiles, turns: Turns, text: str, vision: Any = None) -> list[int]:
    """Token ids of one more user text: what closes the model's answer, the last of `turns`, and what follows it."""
    if uses_gemma_template(side_files):
        return tokenizer.encode(f"<end_of_turn>\n{chat_text([('user', text)])}", bos=False, vision=vision)
    before, whole = rendered(side_files, turns[:-1]), rendered(side_files, [*turns, ("user", text)])
    answer = turns[-1][1].strip()
    start = whole.find(answer, len(before)) if whole.startswith(before) else -1
    if start < 0:
        raise TPAError("chat: the model's chat template rewrites earlier turns; begin again with /reset")
    return tokenizer.encode(whole[start + len(answer) :], bos=False, vision=vision)
