"""Work on many rows at once that loses those alone that raise: they are found by halving."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from clipfilter.errors import ClipfilterError, RowError, unexpected

log = logging.getLogger("clipfilter.engine")
T = TypeVar("T")


def but_for_culprits(
    count: int, whole: Callable[[], T], attempt: Callable[[Sequence[int]], T]
) -> tuple[T, dict[int, RowError]]:
    """The work for all of `count` rows; where it raises, for all but those to blame, and what each of them is told.

    attempt: the work for some rows only, without any for the others. Raises what is no row's fault: refusals, trouble with
    the system, too little memory (torch's own too), and what the work for no rows at all raises as well.
    """
    try:
        return whole(), {}
    except (ClipfilterError, OSError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        try:
            attempt([])
        except Exception:
            raise error from None
        blamed = _search(range(count), error, attempt)
    return attempt([row for row in range(count) if row not in blamed]), blamed


def _search(rows: Sequence[int], error: Exception, attempt: Callable[[Sequence[int]], T]) -> dict[int, RowError]:
    """Which of these rows, which raise together, raise by themselves."""
    if len(rows) == 1:
        log.warning("one row raised what nobody foresaw", exc_info=error)
        return {rows[0]: unexpected(error)}
    found: dict[int, RowError] = {}
    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]):
        try:
            attempt(half)
        except Exception as other:
            found |= _search(half, other, attempt)
    return found
