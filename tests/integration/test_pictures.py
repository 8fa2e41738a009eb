"""Pictures of runs that were made of runs: scored, decided, given columns, labelled; all lead to one dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.models import load_encoder
from clipfilter.operations.import_run import ImportOptions, import_embeddings
from clipfilter.policies import LabelSet
from clipfilter.report import contact_sheet, write_report
from clipfilter.runs import Pictures, Run, derive, read_plan
from clipfilter.search import Searcher
from clipfilter.storage import Directory
from tests.integration.test_import_forget import clip_retrieval

pytestmark = pytest.mark.integration


def score(run: str, out: str, policy: str) -> None:
    run_job(JobRequest("score", run, out, policy=policy, engine="local"))


def decide(run: str, out: str, policy: str) -> None:
    run_job(JobRequest("filter", run, out, policy=policy, engine="local", max_failures=1.0))


def label(run: str, out: str, policy: str) -> None:
    labels = LabelSet(("a cat", "a dog"), ("a photo of {}",))
    run_job(JobRequest("score", run, out, labels=labels, captions="none", engine="local"))


def add_column(run: str, out: str, policy: str) -> None:
    schema = pa.schema([("place", pa.int64())])
    derive(Run(run).origin(), out, schema, {}, lambda shard: {"place": pa.array(range(shard.rows.num_rows))})


def add_column_and_decide(run: str, out: str, policy: str) -> None:
    add_column(run, out + "-first", policy)
    decide(out + "-first", out, policy)


@pytest.mark.parametrize("make", [score, decide, label, add_column, add_column_and_decide])
def test_a_run_made_of_a_run_shows_the_pictures_of_its_dataset(
    make: Any, embedded: Any, policy: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    make(embedded.out, out, policy)
    with Searcher(embedded.out) as first, Searcher(out) as second:
        found = second.search(["a cat"], k=8)
        png, problem = contact_sheet(second.vectors, found, "show")
        assert problem is None
        if found.hits["cf_decision"].null_count == len(found.hits):  # else decisions stand below the pictures
            assert png == contact_sheet(first.vectors, first.search(["a cat"], k=8), "show")[0]
    assert "data:image/jpeg;base64," in Path(write_report(out, "show")).read_text()


def test_an_imported_run_has_no_pictures_and_says_so(policy: str, tmp_path: Path) -> None:
    clip_retrieval(tmp_path / "in", load_encoder("nano", device="cpu").dim)
    run = str(tmp_path / "run")
    import_embeddings(str(tmp_path / "in"), run, ImportOptions("nano"))
    decide(run, str(tmp_path / "filtered"), policy)
    for url in (run, str(tmp_path / "filtered")):
        with Searcher(url) as searcher:
            _, problem = contact_sheet(searcher.vectors, searcher.search(["a cat"], k=3), "show")
        assert problem is not None
        assert "no images" in problem
        assert "no images" in Path(write_report(url, "show")).read_text()


def test_only_pictures_that_are_still_what_was_decided_are_read(finished: Any) -> None:
    plan = read_plan(Directory(finished.out))
    assert plan is not None
    with Searcher(finished.out) as searcher:
        shard = searcher.vectors.shards[1]
        rows = searcher.vectors.rows_at(np.arange(shard.start, shard.start + 4), ["cf_row", "cf_sha256"]).to_pylist()
    first, second, third, fourth = (row["cf_row"] for row in rows)
    wanted = {first: rows[0]["cf_sha256"], second: "0" * 64, fourth: None}
    found = dict(Pictures(plan.dataset).read(shard.shard, wanted))
    assert list(found) == [first, fourth]
    assert all(data.startswith(b"\xff\xd8") for data in found.values())
    assert third not in found
