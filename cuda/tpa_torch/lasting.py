"""Arrays that are made while something else is computed, and kept: tables, constants, memory that is used again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """What is made here is of use to whoever comes later: no inference tensor, which calibration and healing could not
    change or go backwards through, and no part of a graph, whoever asks first. Also a decorator.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield
