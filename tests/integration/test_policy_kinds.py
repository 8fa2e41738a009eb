"""Every kind of rule on real photographs: `run` and `embed` with `filter` decide alike; escalated pictures stay unseen."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.images.decode import decode
from clipfilter.images.facts import image_facts
from clipfilter.models import load_encoder
from clipfilter.operations.compare import compare_policies
from clipfilter.operations.verify import verify_run
from clipfilter.policies import load_policy
from clipfilter.report import write_report
from clipfilter.report.diff import diff_page
from clipfilter.report.explain import explain_row, sentence
from clipfilter.report.thumbnails import thumbnail
from tests.support.engine import PHOTOS, cli

pytestmark = pytest.mark.integration

NAMES = [
    "astronaut", "astronaut_copy", "blurred", "camera", "chelsea", "coffee", "dark", "farm_cat", "farm_dog", "kitten",
    "kitten_crop", "mountains", "swans", "two_dogs", "watermark_crab", "wine",
]  # fmt: skip
SECRET, COPY = "two_dogs", "kitten"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder with captions in a table, of which one is hostile."""
    folder = tmp_path_factory.mktemp("source")
    lines = (PHOTOS / "captions.jsonl").read_text().splitlines()
    captions = {Path(row["file_name"]).stem: row["caption"] for row in map(json.loads, lines)}
    captions["wine"] = "BUY now!!! \u0000 ein Glas Wein auf dem Tisch, \u202e 50 % Rabatt " + "x" * 5000
    for name in NAMES:
        (folder / f"{name}.jpg").write_bytes((PHOTOS / f"{name}.jpg").read_bytes())
        (folder / f"{name}.txt").write_text(captions.get(name) or "a photograph", encoding="utf-8")
    return folder


def rows_of(out: str) -> dict[str, dict[str, Any]]:
    found = [row for path in Path(out).glob("annotated/*.parquet") for row in pq.read_table(path).to_pylist()]
    return {Path(row["cf_key"]).stem: row for row in found}


@pytest.fixture(scope="module")
def embedded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("embedded") / "out")
    run_job(JobRequest("embed", str(source), out, engine="local"))
    return out


@pytest.fixture(scope="module")
def policy(source: Path, embedded: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with every kind of rule; its lists and vectors lie beside it."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "known.txt").write_text(hashlib.sha256((source / f"{SECRET}.jpg").read_bytes()).hexdigest() + "\n")
    phash = image_facts(decode((source / f"{COPY}.jpg").read_bytes()).rgb).phash
    stored = rows_of(embedded)
    (folder / "reviewed.csv").write_text(
        "cf_uid,decision,by,note\n"
        + "".join(f"{stored[name]['cf_uid']},keep,Ada,fine\n" for name in ("dark", SECRET))
        + f"{stored['mountains']['cf_uid']},reject,Bob,not ours\n"
    )
    encoder = load_encoder("nano")
    vectors = np.asarray(encoder.encode_texts(["a photo of a cat", "a photo of a kitten"]))
    metadata = {"weights_sha256": encoder.fingerprint["weights_sha256"], "model": encoder.name}
    save_file({"positives": vectors}, folder / "cats.safetensors", metadata)
    rules: list[dict[str, Any]] = [
        {"id": "secret", "known": {"sha256": "known.txt"}, "action": "escalate"},
        {"id": "copies", "known": {"phash": [f"{phash:016x}"], "distance": 8}, "action": "review"},
        {"id": "cats", "concept": {"vectors": "cats.safetensors", "but_not": ["a dog"]}, "review": {"above": 0.9}, "severity": 2},
        {
            "id": "dogs",
            "concept": {"any_of": [{"text": "a dog", "weight": 2}, "a puppy"], "all_of": ["an animal"], "but_not": ["a cat"]},
            "when": {"not": {"column": "caption_words", "below": 2}},
            "reject": {"above": 0.97},
            "severity": 4,
            "action": "call-the-vet",
        },
        {"id": "light", "pixels": "dark"},
        {"id": "blurry", "pixels": "blurry", "review": {"below": 10}},
        {"id": "grey", "pixels": "grayscale", "tighten": {"below": 2, "by": 0.2, "rules": ["unsafe"]}},
        {
            "id": "unsafe",
            "safety": {
                "concepts": [{"text": "a person", "threshold": 0.1}],
                "special_care": [{"text": "a face", "threshold": 0.1}],
            },
            "review": {"above": 0.15},
        },
        {"id": "words", "text": {"block_list": ["Rabatt", "buy now"]}, "reject": {"above": 1}},
        {"id": "numbers", "text": {"matches": ["[0-9]+ ?%"]}, "review": {"above": 0}},
        {"id": "sum", "combine": {"weighted": {"cats": 1.0, "unsafe": 0.5}}, "review": {"above": 1.05}},
        {"id": "best", "fraction": {"of": "cats"}, "review": {"outside_bottom": 0.8}},
    ]  # fmt: skip
    content = {"policy": "all-kinds", "version": 1, "rules": rules, "overrides": "reviewed.csv"}
    (folder / "policy.yaml").write_text(json.dumps(content))
    return folder / "policy.yaml"


@pytest.fixture(scope="module")
def ran(source: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("ran") / "out")
    result = run_job(JobRequest("run", str(source), out, policy=str(policy), engine="local"))
    assert result.totals["escalated"] == 1
    assert result.totals["rules"]["override"] == {"keep": 2, "reject": 1}
    return out


def test_run_decides_as_embed_and_filter(ran: str, embedded: str, policy: Path, tmp_path: Path) -> None:
    filtered = run_job(JobRequest("filter", embedded, str(tmp_path / "out"), policy=str(policy), engine="local"))
    first, second = rows_of(ran), rows_of(filtered.out)
    assert len(first) == len(NAMES)
    for name, row in first.items():
        ours = {
            key: value
            for key, value in row.items()
            if key.startswith(("cf_score.", "cf_de", "cf_reasons", "cf_sev", "cf_act"))
        }
        assert ours == {key: second[name][key] for key in ours}
    assert not verify_run(ran).problems
    decisions = {name: row["cf_decision"] for name, row in first.items()}
    assert decisions[SECRET] == "reject"
    assert decisions["dark"] == "keep"  # a person said so
    assert decisions["mountains"] == "reject"
    assert decisions["wine"] == "reject"
    assert decisions[COPY] in ("review", "reject")
    assert [r["nearest"] for r in first["wine"]["cf_reasons"] if r["rule"] == "words"] == ["buy now"]
    # The same command again changes nothing, wherever the lists lie now.
    run_job(JobRequest("filter", embedded, filtered.out, policy=str(policy), engine="local"))
    for row in policy.parent.glob("*.csv"):
        row.rename(policy.parent / "moved.csv")
    try:
        again = JobRequest("filter", embedded, str(tmp_path / "again"), policy=str(policy), engine="local")
        policy.write_text(policy.read_text().replace("reviewed.csv", "moved.csv"))
        assert run_job(again).plan.policy_sha256 == filtered.plan.policy_sha256
    finally:
        policy.write_text(policy.read_text().replace("moved.csv", "reviewed.csv"))
        (policy.parent / "moved.csv").rename(policy.parent / "reviewed.csv")


def picture(source: Path, name: str, blurred: bool) -> str:
    """The thumbnail as pages hold it."""
    rgb = decode((source / f"{name}.jpg").read_bytes(), mode="fast", min_side=224).rgb
    return base64.b64encode(thumbnail(rgb, blurred=blurred)).decode()


def test_an_escalated_picture_is_copied_nowhere_and_shown_nowhere(
    ran: str, policy: Path, source: Path, tmp_path: Path
) -> None:
    copied = [path.name for folder in ("kept", "review") for path in Path(ran, folder).rglob("*.jpg")]
    assert copied
    assert not any(SECRET in name for name in copied)
    page = Path(write_report(ran, thumbnails="show")).read_text()
    assert "1 image escalated" in page
    assert f"{SECRET}.jpg" not in page
    shown = {(name, blurred): picture(source, name, blurred) in page for name in NAMES for blurred in (False, True)}
    assert sum(shown[name, False] for name in NAMES) > 5
    assert not shown[SECRET, False]
    assert not shown[SECRET, True]
    lenient = json.loads(policy.read_text())
    lenient["rules"] = [rule for rule in lenient["rules"] if rule["id"] in ("cats", "light")]
    del lenient["overrides"]
    (policy.parent / "lenient.yaml").write_text(json.dumps(lenient))
    found = compare_policies(load_policy(policy), load_policy(policy.parent / "lenient.yaml"), ran, examples=50)
    hidden = [flip for flip in found.flips if SECRET in flip.key]
    assert [flip.hidden for flip in hidden] == [True]
    page = diff_page(found, "show")
    card = next(part for part in page.split("<li>") if f"{SECRET}." in part)
    assert "<img" not in card
    assert "escalated by secret" in card
    assert page.count("<img") == len(found.flips) - 1
    # Nor when neither policy knows the list: the run itself does.
    other = compare_policies(load_policy(policy.parent / "lenient.yaml"), load_policy("demo"), ran, examples=50)
    assert all(flip.hidden == (SECRET in flip.key) for flip in other.flips)


def test_every_kind_is_explained_in_plain_words(ran: str) -> None:
    stored = rows_of(ran)

    def said(name: str) -> dict[str, str]:
        return {rule.id: sentence(rule) for rule in explain_row(ran, stored[name]["cf_uid"]).rules}

    assert said(SECRET)["secret"] == "is on the list of known pictures (the very file), so it is escalated"
    assert said("coffee")["secret"] == "is on no list of this rule"
    assert said(COPY)["copies"].endswith("of 64 bits differ), so it goes to review")
    assert said("dark")["light"].startswith("brightness 11")
    assert said("wine")["words"].startswith("number of listed words in the caption: 2 is above 1")
    assert "“buy now”" in said("wine")["words"]
    assert "the sum of 1 cats + 0.5 unsafe" in said("coffee")["sum"]
    shown = cli("policy", "explain", ran, stored["mountains"]["cf_uid"]).stdout
    assert "reject  by a person (Bob): not ours" in shown
    assert "wins over the rules" in shown
    secret = explain_row(ran, stored[SECRET]["cf_uid"])
    assert secret.override is not None
    assert any("never shown" in note for note in secret.notes)
    two = said("two_dogs") | said("farm_dog")
    assert any("severity 4; action call-the-vet" in sentence for sentence in two.values()) == any(
        r["rule"] == "dogs" for name in ("two_dogs", "farm_dog") for r in stored[name]["cf_reasons"]
    )
