"""Trying again what may pass: networks, stores and servers have bad moments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def retry(call: Callable[[], T], waits: Iterable[float], may_pass: Callable[[Exception, int], bool]) -> T:
    """What `call` returns; after an error that may pass it is called again, once after each of `waits` (seconds).

    may_pass: asked after every failure, with the error and the number of the attempt (1 first). The error that does not
    pass, or the last one, is raised.
    """
    for attempt, wait in enumerate([*waits, None], 1):
        try:
            return call()
        except Exception as error:
            if not may_pass(error, attempt) or wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")
