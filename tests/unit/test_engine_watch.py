"""What the driver makes of heartbeats, of workers that are lost with their machines, and of steps that take long."""

from __future__ import annotations

from typing import Any

import pytest

from clipfilter.engine.driver import MAX_LOST, StageRun, Unit
from clipfilter.engine.executors import interface
from clipfilter.engine.executors.interface import Outcome, Watch
from clipfilter.engine.worker import Heartbeat, Step
from clipfilter.runs import Plan
from clipfilter.sources import Shard
from clipfilter.storage import Directory


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(interface.time, "monotonic", lambda: now[0])
    return now


def test_silence_is_told_and_then_ended_but_not_that_of_the_watcher_itself(clock: list[float]) -> None:
    watch = Watch("worker 7")
    watch.ready = True
    watch.hear(Heartbeat(3, [Step("a.tar", "decode", "k9", 0.2)]))
    clock[0] += 3600  # this process itself stood still
    watch.look()
    assert (watch.wait, watch.problem) == (None, None)
    for _ in range(15):
        clock[0] += 1
        watch.look()
    assert watch.wait == "worker 7 silent for 16 s in a.tar; ending it at 40 s"
    assert watch.problem is None
    for _ in range(25):
        clock[0] += 1
        watch.look()
    assert watch.problem == "worker 7 was silent for 41 s in a.tar and was ended"
    watch.hear()
    assert watch.problem is None


def test_a_long_step_is_told_and_ended_after_an_hour() -> None:
    watch = Watch("worker 1")
    watch.ready = True
    watch.hear(Heartbeat(0, [Step("a.tar", "encode_images", "k1", 45.0), Step("b.tar", "read", "", 12.0)]))
    assert watch.wait == "worker 1 embedding a.tar, from k1 on, for 45 s"
    assert watch.problem is None
    watch.hear(Heartbeat(0, [Step("b.tar", "read", "", 3601.0)]))
    assert watch.problem == "worker 1 was reading b.tar for 3601 s and was ended"


def test_a_lost_machine_is_no_attempt_and_no_reason_to_decode_apart(tmp_path: Any) -> None:
    plan = Plan(job="embed", source={}, policy=None, policy_sha256=None, model={}, options={}, text_column=False)

    class Executor:
        name = "fake"
        tasks: list[Any] = []  # noqa: RUF012
        outcomes = iter(["lost"] * (MAX_LOST + 3))

        def free(self) -> int:
            return 1

        def submit(self, ticket: int, task: Any) -> None:
            self.tasks.append((ticket, task))

        def poll(self, timeout: float) -> list[Outcome]:
            return [Outcome(self.tasks[-1][0], next(self.outcomes), message="its node was lost")]  # type: ignore[arg-type]

        def rows_done(self) -> int:
            return 0

        def workers_alive(self) -> int:
            return 1

        def waits_for(self) -> list[str]:
            return ["a worker"]

    executor = Executor()
    shown: list[Any] = []

    class Display:
        def update(self, progress: Any) -> None:
            shown.append((progress.attempts_failed, list(progress.waits_for)))

    runner = StageRun(Directory(str(tmp_path)), plan, executor, op="embed", stage="embedded", display=Display())  # type: ignore[arg-type]
    from clipfilter.engine import driver

    driver_seconds, driver._RETRY_SECONDS = driver._RETRY_SECONDS, 0.0
    try:
        result = runner.run(iter([Unit(Shard("s" * 16, "a.tar", "tar"))]))
    finally:
        driver._RETRY_SECONDS = driver_seconds
    assert [task.attempt for _, task in executor.tasks] == [1] * (MAX_LOST + 1) + [2, 3]
    assert not any(task.isolated for _, task in executor.tasks)
    assert result.failed[0].attempts == 3
    assert shown[0] == (0, ["a worker"])
