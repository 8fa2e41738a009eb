"""Known pictures and human decisions: exact lookups, Hamming distance, escalation above everything, overrides above rules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, compile_policy, load_policy, parse_policy
from clipfilter.policies.deciding import Decisions, escalated
from clipfilter.policies.hashes import DigestTable, PerceptualIndex, name_digests, sha256_digests
from clipfilter.policies.parts.attachments import Attachments, keep_copies
from clipfilter.storage import Directory
from tests.support.policies import FakeEncoder, embeddings

SHA = [hashlib.sha256(bytes([n])).hexdigest() for n in range(20)]


def decide(text: str, table: pa.Table, files: Attachments | None = None) -> Decisions:
    compiled = compile_policy(parse_policy(text), FakeEncoder(), files=files)
    compiled.check_columns(table.schema)
    return compiled.decide(compiled.score(embeddings(table.num_rows), None, None, table))


def rows(**columns: Any) -> pa.Table:
    count = len(next(iter(columns.values())))
    return pa.table({"cf_uid": [f"uid-{n}" for n in range(count)], **columns})


def policy(*rules: dict[str, Any], **more: Any) -> str:
    return json.dumps({"policy": "p", "version": 1, "rules": list(rules), **more})


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_digests_are_found_where_they_are(listed: list[bytes], data: st.DataObject) -> None:
    """Also where many share their first half, which no hash does by chance."""
    listed = [digest[:1] * 8 + digest[8:] for digest in listed]
    asked = data.draw(st.lists(st.one_of(st.sampled_from(listed), st.binary(min_size=16, max_size=16)), max_size=40))
    array = np.frombuffer(b"".join(listed), np.uint8).reshape(-1, 16)
    found = DigestTable.of(array).find(np.frombuffer(b"".join(asked), np.uint8).reshape(-1, 16))
    for digest, place in zip(asked, found.tolist(), strict=True):
        assert (place >= 0) == (digest in listed)
        assert place < 0 or listed[place] == digest


@pytest.mark.parametrize("listed", [3, 512, 513, 5000])
@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 11, 16])
def test_the_nearest_perceptual_hash_is_that_of_brute_force(listed: int, distance: int) -> None:
    rng = np.random.default_rng(listed * 100 + distance)
    known = rng.integers(0, 2**64, listed, dtype=np.uint64)
    asked = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = rng.integers(0, distance + 3, 250)
    for row, count in enumerate(flips):  # near copies, some just beyond the distance
        bits = rng.choice(64, count, replace=False).astype(np.uint64)
        asked[row] = known[row % listed] ^ np.bitwise_or.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    exact = np.bitwise_count(asked[:, None] ^ known[None]).min(axis=1).astype(np.int64)
    expected = np.where(exact <= distance, exact, 64)
    assert 0 < (expected < 64).sum() < len(asked)
    np.testing.assert_array_equal(PerceptualIndex.of(known, distance).nearest(asked), expected)


def test_known_files_are_escalated_rejected_or_sent_to_review() -> None:
    table = rows(cf_sha256=[SHA[0], SHA[1], SHA[2], SHA[9], None])
    decided = decide(
        policy(
            {"id": "worst", "known": {"sha256": [SHA[0]]}, "action": "escalate"},
            {"id": "banned", "known": {"sha256": [SHA[0], SHA[1].upper()]}, "action": "reject"},
            {"id": "seen", "known": {"sha256": [SHA[2]]}, "action": "review", "on_missing": "keep"},
        ),
        table,
    )
    assert decided.decision.to_pylist() == ["reject", "reject", "review", "keep", "review"]
    reasons = [[(r["rule"], r["band"], r["score"], r["threshold"]) for r in row] for row in decided.reasons.to_pylist()]
    assert reasons[0] == [("worst", "escalate", 1.0, 0.0), ("banned", "reject", 1.0, 0.0)]
    assert reasons[4] == [("worst", "missing", None, None), ("banned", "missing", None, None)]
    assert escalated(decided.reasons).tolist() == [True, False, False, False, False]
    assert decided.counts["worst"]["escalate"] == 1
    assert decided.action is not None
    assert decided.action.to_pylist() == ["escalate", None, None, None, None]


def test_perceptual_hashes_score_the_bits_that_agree() -> None:
    table = rows(cf_phash=pa.array([0xFF, 0xFE, 0xF0, 2**64 - 1, None], pa.uint64()))
    rule = {"id": "near", "known": {"phash": ["00000000000000ff"], "distance": 4}, "action": "escalate"}
    compiled = compile_policy(parse_policy(policy(rule)), FakeEncoder())
    scores = compiled.score(embeddings(5), None, None, table)
    np.testing.assert_array_equal(scores.values["near"], np.float32([1, 1 - 1 / 64, 1 - 4 / 64, 0, np.nan]))
    assert compiled.decide(scores).decision.to_pylist() == ["reject", "reject", "reject", "keep", "review"]


def test_lists_in_files_are_bound_by_their_hash(tmp_path: Path) -> None:
    listed = tmp_path / "known.txt"
    listed.write_text(f"# from the hotline\n{SHA[3]}  a.jpg\n\n{SHA[4].upper()},b.jpg\n")
    written = tmp_path / "policy.yaml"
    written.write_text(policy({"id": "k", "known": {"sha256": "known.txt"}, "action": "escalate"}))
    loaded = load_policy(written)
    digest = hashlib.sha256(listed.read_bytes()).hexdigest()
    canonical = loaded.canonical()
    assert canonical["rules"][0]["known"] == {"sha256": {"sha256": digest}}
    assert Policy.from_canonical(json.loads(json.dumps(canonical))).canonical() == canonical
    run = Directory(str(tmp_path / "run"))
    keep_copies(run, loaded.attachments)
    moved = tmp_path / "elsewhere.txt"
    listed.rename(moved)
    table = rows(cf_sha256=[SHA[3], SHA[4], SHA[5]])
    compiled = compile_policy(Policy.from_canonical(canonical), FakeEncoder(), files=Attachments(run))
    assert compiled.decide(compiled.score(embeddings(3), None, None, table)).totals()["reject"] == 2
    written.write_text(written.read_text().replace("known.txt", "elsewhere.txt"))
    assert load_policy(written).sha256 == loaded.sha256  # where the file lies is no part of the policy
    moved.write_text(SHA[3])
    assert load_policy(written).sha256 != loaded.sha256
    (tmp_path / "run" / "policy" / digest).write_text("something else")
    with pytest.raises(RefusedError, match="cannot be found"):
        compile_policy(Policy.from_canonical(canonical), FakeEncoder(), files=Attachments(run))


@pytest.mark.parametrize(
    ("known", "action", "words"),
    [
        ({"sha256": ["abc"]}, "escalate", "is not a sha256"),
        ({"sha256": []}, "escalate", "empty"),
        ({"phash": ["00000000000000ff"]}, "escalate", "needs a distance"),
        ({"phash": ["00000000000000ff"], "distance": 17}, "escalate", "unrelated pictures match"),
        ({"sha256": [SHA[0]], "distance": 3}, "escalate", "distance belongs to phash"),
        ({"sha256": [SHA[0]], "phash": ["00000000000000ff"], "distance": 1}, "reject", "exactly one list"),
        ({"sha256": "no-such-file.txt"}, "escalate", "does not exist"),
        ({"sha256": [SHA[0]]}, "delete", "one of escalate, reject, review"),
        ({"sha256": [SHA[0]]}, None, "needs an action"),
    ],
)
def test_known_rules_that_make_no_sense(known: dict[str, Any], action: str | None, words: str) -> None:
    rule = {"id": "k", "known": known} | ({"action": action} if action else {})
    with pytest.raises(RefusedError, match=words) as caught:
        parse_policy(policy(rule))
    assert str(caught.value).startswith("policy:1:")


def test_only_hash_lists_escalate_and_they_take_no_bands() -> None:
    with pytest.raises(RefusedError, match="only a picture on a list of hashes is escalated"):
        parse_policy(policy({"id": "c", "concept": {"any_of": ["x"]}, "reject": {"above": 0.5}, "action": "escalate"}))
    with pytest.raises(RefusedError, match="a known rule has no bands"):
        parse_policy(policy({"id": "k", "known": {"sha256": [SHA[0]]}, "action": "reject", "reject": {"above": 0.5}}))


# ------------------------------------------------------------------ overrides

SMALL = {"id": "small", "metadata": "width", "review": {"below": 300}, "reject": {"below": 200}, "on_missing": "review"}
WORST = {"id": "worst", "known": {"sha256": [SHA[0]]}, "action": "escalate"}


def test_a_person_wins_over_rules_and_escalation_over_a_person() -> None:
    listed = [
        {"cf_uid": "uid-0", "decision": "keep"},
        {"cf_uid": "uid-1", "decision": "keep", "by": "Ada", "date": "2026-03-01", "note": "a toy"},
        {"cf_uid": "uid-2", "decision": "reject"},
        {"cf_uid": "nobody", "decision": "review"},
    ]
    table = rows(cf_sha256=SHA[:4], cf_width=[100, 100, 900, 250], cf_height=[900] * 4)
    decided = decide(policy(WORST, SMALL, overrides=listed), table)
    assert decided.decision.to_pylist() == ["reject", "keep", "reject", "review"]
    reasons = [[(r["rule"], r["band"]) for r in row] for row in decided.reasons.to_pylist()]
    assert reasons == [
        [("worst", "escalate"), ("override", "keep"), ("small", "reject")],
        [("override", "keep"), ("small", "reject")],
        [("override", "reject")],
        [("small", "review")],
    ]
    assert decided.counts["override"] == {"keep": 2, "review": 0, "reject": 1}


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_overrides_in_a_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"reviewed.{form}"
    if form == "csv":
        path.write_text(
            'note,cf_uid,decision,extra\n"said ""no"",\nfirmly",uid-1,reject,7\n,uid-0,keep,8\n,NA,review,\n'
        )
    else:
        path.write_text(
            '{"cf_uid": "uid-1", "decision": "reject", "note": "said no"}\n{"cf_uid": "uid-0", "decision": "keep"}\n'
        )
    written = tmp_path / "policy.yaml"
    written.write_text(policy(SMALL, overrides=path.name))
    loaded = load_policy(written)
    assert loaded.canonical()["overrides"] == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    table = rows(cf_width=[100, 900, 900], cf_height=[900] * 3)
    compiled = compile_policy(loaded, FakeEncoder())
    assert compiled.decide(compiled.score(embeddings(3), None, None, table)).decision.to_pylist() == [
        "keep", "reject", "keep",
    ]  # fmt: skip
    assert loaded.overrides is not None
    found = loaded.overrides.find("uid-1", Attachments())
    assert found is not None
    assert found["note"].startswith("said")
    assert loaded.overrides.find("uid-9", Attachments()) is None
    path.write_text(path.read_text() + "\n")
    assert load_policy(written).sha256 != loaded.sha256


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cf_uid,decision\na,keep\na,review\n", "'a' 2 times"),
        ("cf_uid,decision\na,maybe\n", "'maybe' in row 1"),
        ("cf_uid,decision\na,kep\n", "did you mean 'keep'"),
        ("cf_uid,decision\n,keep\n", "no cf_uid in row 1"),
        ("uid,decision\na,keep\n", "no column 'cf_uid'"),
        ("cf_uid,decision\na\n", "cannot be read"),
        ('{"cf_uid": 3, "decision": "keep"}\n', "cannot be read"),
        ('{"cf_uid": "a"}\n', "which must be one of"),
        ("\xff\xfe\x00", "cannot be read|no column"),
    ],
)
def test_files_of_overrides_that_make_no_sense(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_bytes(content.encode("latin-1"))
    written = tmp_path / "policy.yaml"
    written.write_text(policy(SMALL, overrides="o.csv"))
    with pytest.raises(RefusedError, match=words) as caught:
        load_policy(written)
    assert "\n" not in str(caught.value)


def test_a_million_overrides_are_looked_up_in_a_table() -> None:
    uids = [f"{n:032x}" for n in range(200_000)]
    table = DigestTable.of(name_digests(uids))
    assert table.high.nbytes + table.low.nbytes + table.place.nbytes == 24 * len(uids)
    asked = ["x", *uids[::20_000], "y"]
    assert table.find(name_digests(asked)).tolist() == [-1, *range(0, 200_000, 20_000), -1]
    assert table.find(sha256_digests([None, SHA[0]])).tolist() == [-1, -1]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_decisions_are_the_worst_outcome_and_overrides_win(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30))
    width = data.draw(st.lists(st.one_of(st.none(), st.integers(0, 400)), min_size=count, max_size=count))
    sha = data.draw(st.lists(st.sampled_from(SHA[:4]), min_size=count, max_size=count))
    said = data.draw(st.dictionaries(st.integers(0, count - 1), st.sampled_from(["keep", "review", "reject"])))
    listed = [{"cf_uid": f"uid-{row}", "decision": decision} for row, decision in said.items()]
    table = rows(cf_sha256=sha, w=pa.array(width, pa.int32()))
    own = {"id": "small", "metadata": "w", "review": {"below": 300}, "reject": {"below": 200}, "on_missing": "reject"}
    decided = decide(policy(WORST, own, **({"overrides": listed} if listed else {})), table)
    ranks = {"keep": 0, "review": 1, "missing": 2, "reject": 2, "escalate": 2}
    for row, (decision, reasons) in enumerate(
        zip(decided.decision.to_pylist(), decided.reasons.to_pylist(), strict=True)
    ):
        of_rules = [reason["band"] for reason in reasons if reason["rule"] != "override"]
        worst = ["keep", "review", "reject"][max((ranks[band] for band in of_rules), default=0)]
        expected = said.get(row, worst) if sha[row] != SHA[0] else "reject"
        assert decision == expected
        assert ("escalate" in of_rules) == (sha[row] == SHA[0])
