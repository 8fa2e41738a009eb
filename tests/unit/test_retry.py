"""Trying again: how often, after which waits, and which error is raised in the end."""

from __future__ import annotations

import pytest

from clipfilter import retry as module
from clipfilter.errors import reason
from clipfilter.retry import retry


class Flaky:
    """Fails with each of `errors` in turn, then gives 7."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    return waits


def test_what_passes_is_tried_after_each_wait(slept: list[float]) -> None:
    asked: list[tuple[str, int]] = []

    def may_pass(error: Exception, attempt: int) -> bool:
        asked.append((str(error), attempt))
        return True

    call = Flaky(OSError("a"), OSError("b"))
    assert retry(call, (wait for wait in (0.5, 1.0, 2.0)), may_pass) == 7
    assert (call.calls, slept, asked) == (3, [0.5, 1.0], [("a", 1), ("b", 2)])


def test_the_last_error_is_raised(slept: list[float]) -> None:
    call = Flaky(OSError("a"), OSError("b"), OSError("c"))
    with pytest.raises(OSError, match="b"):
        retry(call, (0.5,), lambda error, attempt: True)
    assert (call.calls, slept) == (2, [0.5])


def test_what_does_not_pass_is_raised_at_once(slept: list[float]) -> None:
    call = Flaky(OSError("a"), ValueError("never"), OSError("c"))
    with pytest.raises(ValueError, match="never"):
        retry(call, (0.5, 1.0), lambda error, attempt: isinstance(error, OSError))
    assert (call.calls, slept) == (2, [0.5])


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("\nfirst\nsecond")) == "first"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 300))) == 200
