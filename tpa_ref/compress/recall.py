"""The recall task: a fact stated early, asked for up to 900 tokens later, far beyond a local layer's window.

Only a model that really reads its long-range KV cache can answer, so it shows what compression breaks there. The text
is plain; any tokenizer can read it. No array library is imported here.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

KEYS = (
    "amber birch cedar delta ember falcon garnet harbor indigo jasper kernel lagoon maple nectar onyx "
    "pepper quartz raven saddle timber umber violet walnut yarrow zephyr anchor beacon copper dagger "
    "engine feather glacier"
).split()
VALUES = (
    "apple bread cloud dream eagle flame grape house island juice knife lemon mouse night ocean paper "
    "queen river stone tiger uncle voice water yacht zebra brick chair dance earth fruit glass horse"
).split()


def statement(key: str, value: str) -> str:
    """The sentence that states a fact.

    >>> statement("amber", "river")
    'Note: amber river.\\n'
    """
    return f"Note: {key} {value}.\n"


def question(key: str) -> str:
    """The sentence that asks for it, up to the answer.

    >>> question("amber")
    'Recall: amber'
    """
    return f"Recall: {key}"


def prompt_and_answer(
    rng: random.Random, tokenizer: Any, filler: list[int], distance: int, facts: int = 8
) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids, without BOS: the fact asked for stands `distance` tokens before its answer.

    The other facts stand around it, text fills the rest. `filler` are token ids of any text.
    """
    encode = partial(tokenizer.encode, bos=False)
    keys, values = rng.sample(KEYS, facts), rng.sample(VALUES, facts)
    statements = [encode(statement(key, value)) for key, value in zip(keys, values, strict=True)]
    asked = rng.randrange(facts)
    answer = encode(f" {values[asked]}")
    tail = encode("\n" + question(keys[asked]))
    after = [token for ids in statements[asked + 1 :] for token in ids]
    # From the value inside its statement to the value in the answer.
    rest_of_statement = len(statements[asked]) - len(encode(statement(keys[asked], values[asked])[:-2]))
    fill = distance - rest_of_statement - len(after) - len(tail) - len(answer)
    if fill < 0:
        raise ValueError(f"recall: distance must be at least {distance - fill} tokens here, got {distance}")
    start = rng.randrange(max(1, len(filler) - fill))
    before = [token for ids in statements[: asked + 1] for token in ids]
    return before + after + filler[start : start + fill] + tail, answer
