"""The faults of tools/faults can still be planted: each place is in the code once, and the tests that it names exist."""

from __future__ import annotations

import pytest

from tests.support.engine import REPO
from tools.faults.faults import FAULTS, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_place_is_there_once(fault: Fault) -> None:
    text = (REPO / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    assert fault.tests
    assert all((REPO / test.partition("::")[0]).exists() for test in fault.tests)


def test_there_are_enough_and_no_two_are_the_same() -> None:
    assert (
        len({fault.name for fault in FAULTS}) == len({(fault.file, fault.old) for fault in FAULTS}) == len(FAULTS) >= 20
    )
