"""Which shards a night processes, the version it leads to when others write too, the way back, the history's records."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipfilter.engine.driver import Unit
from clipfilter.errors import ClipfilterError, RefusedError
from clipfilter.nightly import accept_night, history, record, roll_back
from clipfilter.nightly.arrivals import Appending, Base, Missing, find_arrivals
from clipfilter.runs import COUNTS, FailedShard, Run, Totals, Version, ledger
from clipfilter.runs.plan import Plan, settle_plan
from clipfilter.sources import Shard
from clipfilter.storage import Directory
from tests.support.runs import commit_of

ZERO = dict.fromkeys(COUNTS, 0)


def shard(path: str, etag: str, identity: str | None = None) -> Shard:
    return Shard(identity or f"{path.encode().hex():0>16}"[:16], path, "tar", size=len(etag), etag=etag)


class Ledger:
    """A dataset that exists only in its commits and versions."""

    def __init__(self, folder: Path) -> None:
        self.directory = Directory(str(folder / "out"))
        settle_plan(self.directory, Plan("run", {}, None, None, {}, {}, False))

    def commit(self, item: Shard, *, rows: int = 10, failed: dict[str, int] | None = None) -> str:
        """The next commit of a shard, as the engine would write it."""
        known = ledger.list_commits(self.directory).get((item.id, "decided"))
        counts = {**ZERO, "rows": rows, "decided": rows, "keep": rows}
        generation = known.generation + 1 if known else 1
        made = commit_of(item, "decided", generation=generation, counts=counts, failed_by_class=failed or {})
        return ledger.write_commit(self.directory, made)[0].name

    def night(
        self,
        listing: list[Shard],
        *,
        broken: tuple[str, ...] = (),
        missing: Missing = "keep",
        retry: bool = False,
        thresholds: dict[str, float] | None = None,
        base: Base | None = None,
    ) -> Version:
        """A night's bookkeeping; files in `broken` cannot be processed."""
        base = base or Base.read(self.directory)
        arrivals = find_arrivals(base, listing, retry_failed=retry)
        growth = Appending(self.directory, base, arrivals, missing, refit=False)
        good = [unit.shard for unit in arrivals.units if unit.shard.path not in broken]
        bad = [unit.shard for unit in arrivals.units if unit.shard.path in broken]
        newest = ledger.list_commits(self.directory)
        names = []
        for item in good:
            known = newest.get((item.id, "decided"))
            same = known and ledger.read_commit(self.directory, known.path).shard.etag == item.etag and not retry
            names.append(known.path if known and same else self.commit(item))
        failed = [FailedShard(item, "broken", 3) for item in bad]
        return growth.version(Version("p", "decided", names, failed, thresholds or {}, Totals()))  # type: ignore[arg-type]

    def held(self) -> dict[str, str]:
        """The newest version: file state by path (all shards of it)."""
        run = Run.open(self.directory.url)
        shards = [commit.shard for commit in run.commits()]
        assert run.version.totals == Totals.of(run.commits(), run.version.failed_shards, run.version.listing)
        ids = [shard.id for shard in shards]
        assert len(set(ids)) == len(ids)
        return {f"{shard.path}:{shard.id[-2:]}": shard.etag for shard in shards}


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


A, B, C = shard("a", "1"), shard("b", "1"), shard("c", "1")


def test_only_what_is_new_or_changed_is_processed(book: Ledger) -> None:
    book.night([A, B])
    found = find_arrivals(Base.read(book.directory), [A, shard("b", "22"), C], retry_failed=False)
    assert [unit.shard.path for unit in found.units] == ["b", "c"]
    assert (found.new, found.changed, found.again, found.vanished) == (1, 1, 0, [])
    assert find_arrivals(Base.read(book.directory), [A, B], retry_failed=False).units == []


def test_a_vanished_file_stays_unless_told_otherwise(book: Ledger) -> None:
    book.night([A, B])
    kept = book.night([A])
    assert (kept.number, len(book.held())) == (1, 2)
    book.night([A, C])
    assert set(book.held().values()) == {"1"}
    assert len(book.held()) == 3
    book.night([A], missing="drop")
    assert len(book.held()) == 1


def test_a_file_that_is_cut_anew_replaces_all_its_shards(book: Ledger) -> None:
    first = [shard("p", "1", f"{n:016x}") for n in (1, 2, 3)]
    book.night([A, *first])
    second = [shard("p", "22", f"{n:016x}") for n in (1, 7)]
    book.night([A, *second])
    assert book.held() == {"a:61": "1", "p:01": "22", "p:07": "22"}
    # Where one of the new shards cannot be read the file keeps its old rows, and is tried again.
    third = [shard("p", "333", f"{n:016x}") for n in (1, 8)]
    version = book.night([A, *third], broken=("p",))
    assert book.held() == {"a:61": "1", "p:01": "22", "p:07": "22"}
    assert len(version.failed_shards) == 2
    again = book.night([A, *third])
    assert book.held() == {"a:61": "1", "p:01": "333", "p:08": "333"}
    assert again.failed_shards == []


def test_damaged_shards_are_tried_again_on_request(book: Ledger) -> None:
    book.commit(A, failed={"read_error": 3})
    book.night([A])
    assert find_arrivals(Base.read(book.directory), [A], retry_failed=False).units == []
    again = find_arrivals(Base.read(book.directory), [A], retry_failed=True)
    assert (again.again, again.fresh, again.units) == (1, 0, [Unit(A)])
    version = book.night([A], retry=True)
    assert (version.number, version.commits) == (2, [f"commits/{A.id}.decided.002.json"])


def test_what_another_night_wrote_meanwhile_stands(book: Ledger) -> None:
    book.night([A])
    stale = Base.read(book.directory)  # a night that began here ...
    book.night([shard("a", "22"), B])  # ... while this one came and went
    book.night([A, C], base=stale)
    assert book.held() == {"a:61": "22", "b:62": "1", "c:63": "1"}
    assert book.night([shard("a", "22"), B, C]).number == 3, "nothing is left to do"
    # The same work done twice is one commit and one version.
    before = Base.read(book.directory)
    book.night([shard("a", "22"), B, C, shard("d", "1")])
    assert book.night([shard("a", "22"), B, C, shard("d", "1")], base=before).number == 4


def test_different_thresholds_never_meet_in_one_version(book: Ledger) -> None:
    book.night([A], thresholds={"r": 0.5})
    stale = Base.read(book.directory)
    book.night([A, B], thresholds={"r": 0.7})
    with pytest.raises(ClipfilterError, match="run again"):
        book.night([A, C], thresholds={"r": 0.5}, base=stale)
    assert len(book.held()) == 2


def test_the_way_back_is_a_new_version_and_lasts(book: Ledger) -> None:
    book.night([A, B])
    book.night([A, shard("b", "22"), C])
    made = roll_back(book.directory.url, "1")
    assert (made.name, made.rolled_back_to, book.held()) == ("000003", 1, {"a:61": "1", "b:62": "1"})
    listing = [A, shard("b", "22"), C, shard("d", "1")]
    book.night(listing)
    assert book.held() == {"a:61": "1", "b:62": "1", "d:64": "1"}, "what was taken back stays out"
    book.night([A, shard("b", "333"), C, shard("d", "1")])
    assert book.held() == {"a:61": "1", "b:62": "333", "d:64": "1"}, "until the file changes"
    roll_back(book.directory.url, "2")
    assert book.held() == {"a:61": "1", "b:62": "22", "c:63": "1"}, "and the way forward is the same"
    for wrong, sentence in (("9", "has no version"), ("6", "newest one already")):
        with pytest.raises(RefusedError, match=sentence):
            roll_back(book.directory.url, wrong)


def test_a_version_whose_files_are_gone_does_not_come_back(book: Ledger) -> None:
    book.night([A])
    book.night([A, B])
    gone = next(name for name in book.directory.names("commits"))
    Path(book.directory.path(f"commits/{gone}")).unlink()
    with pytest.raises(RefusedError, match="are gone"):
        roll_back(book.directory.url, "1")
    assert history(book.directory.url)["nights"] == []


def test_a_killed_night_is_told_once(book: Ledger) -> None:
    script = (
        "import sys, os, signal; from clipfilter.nightly import record; from clipfilter.storage import Directory\n"
        "record.begin(Directory(sys.argv[1]), 0.0); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, book.directory.url], check=False, timeout=60)
    mine = record.begin(book.directory, 1.0)
    assert mine == 2
    assert record.close_killed(book.directory, mine) == [1]
    assert record.close_killed(book.directory, mine) == []
    nights = list(record.nights(book.directory))
    assert [night["outcome"] for night in nights] == ["unfinished", "running"]
    begun = {"night": 9, "started": "2026-01-01T00:00:00+00:00", "host": "elsewhere", "pid": 1, "born": "1"}
    assert record.gave_up(begun)
    assert not record.gave_up({**begun, "started": record.stamp(time.time())})


def test_only_a_finished_night_can_be_accepted(book: Ledger) -> None:
    with pytest.raises(RefusedError, match="no finished night 3"):
        accept_night(book.directory.url, 3)
    number = record.begin(book.directory, 0.0)
    record.finish(book.directory, {"night": number, "outcome": "done", "scores": {}, "alerts": []})
    accept_night(book.directory.url, number)
    accept_night(book.directory.url, number)
    assert record.accepted(book.directory) == number
    assert json.loads(json.dumps(history(book.directory.url)))["nights"][0]["night"] == number
