"""A newcomer's walk through docs/guide/look.md: classify, embed, search, serve, label, calibrate, filter."""

from __future__ import annotations

import csv
import json
import re
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.docs.pages import REPO, blocks, prepare
from tests.docs.test_docs import execute
from tests.support.serve import Served, served

pytestmark = pytest.mark.integration

PAGE = REPO / "docs" / "guide" / "look.md"
#: What the calibration guide's own script calls no animal.
OTHER = re.search(r'OTHER = """(.*?)"""', (REPO / "docs/guide/calibrate.md").read_text(encoding="utf-8"), re.DOTALL)


def post(server: Served, path: str, data: dict[str, Any]) -> Any:
    """What the page asks of its server."""
    port = server.base.rsplit(":", 1)[1]
    headers = {"Cookie": f"clipfilter-{port}={server.token}", "Origin": server.base}
    request = urllib.request.Request(f"{server.base}/api/{path}", json.dumps(data).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def label(run: str, labels: Path, policy: str) -> None:
    """What the page's text tells to do there: draw 90 rows for the rule, label them one by one, end the server."""
    assert OTHER is not None
    other = tuple(OTHER[1].split())
    with served(run, labels, "--policy", policy) as server:
        assert post(server, "sample", {"rule": "animal", "n": 90})["sample"] == 90
        rows = post(server, "rows", {"labels": "sample", "label_rule": "animal", "limit": 200})["rows"]
        for row in rows:
            answer = {"position": row["position"], "rule": "animal", "label": int(not row["key"].startswith(other))}
            state = post(server, "label", answer)
        assert (state["labelled"], state["sample_done"]) == (90, 90)
        effect = post(server, "effect", {"changes": {"animal": {"reject": 0.6}}, "exact": True})
        assert effect["flipped"] > 0
        changed = post(server, "export", {"changes": {"animal": {"reject": 0.6}}})["text"]
        assert changed == Path(policy).read_text().replace("reject: {above: 0.95}", "reject: {above: 0.6}")
        assert server.stop() == (0, "stopped\n")


def test_a_newcomer_walks_through_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    seen = Counter[str]()
    for block in blocks(PAGE):
        seen.update(re.findall(r"^\$ clipfilter (\w+)", block.text, re.MULTILINE))
        if "clipfilter serve" in block.text:
            label("first", tmp_path / "labels.csv", "animals.yaml")
        else:
            execute(block, tmp_path)
    assert set(seen) == {"classify", "embed", "search", "filter", "serve", "policy"}
    with open("labels.csv", newline="") as file:
        assert Counter(row["label"] for row in csv.DictReader(file))["1"] == 45

    def decided(out: str) -> Counter[str]:
        tables = [pq.read_table(path, columns=["cf_decision"]) for path in Path(out).glob("annotated/*.parquet")]
        return Counter(value for table in tables for value in table["cf_decision"].to_pylist())

    assert decided("first") != decided("second")
    assert sum(decided("first").values()) == sum(decided("second").values()) == 94
