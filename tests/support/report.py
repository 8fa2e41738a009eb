"""A small finished run built by hand, without a model: an image folder with hostile names, and all kinds of trouble."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipfilter.policies import REASONS
from clipfilter.runs import Commit, FailedShard, Version, Work, WorkerDetails, ledger
from clipfilter.runs.columns import FAILED
from clipfilter.runs.plan import Plan, settle_plan
from clipfilter.sources import Shard, SourceOptions, open_source
from clipfilter.storage import Directory, file_sha256
from tests.support.runs import commit_of

SCRIPT = "<script>alert(1)</script>"
IMG = "\"><img src=x onerror=alert(1)>'"
RTL = "safe\u202egpj.exe\u2066\u200f\x07\x1b[31m end"
CAPTIONS = [
    SCRIPT,
    IMG,
    RTL,
    "a quiet street & a <b>bold</b> sign",
    "</bdi></p></style>{{7*7}}",
    "\u2028line\u2029\x00break",
]
NAMES = ["a<script>alert(1)", "b\"><img src=x onerror=alert(1)>'", "c\u202egpj", "d&amp;", "e"]

POLICY: dict[str, Any] = {
    "policy": "trial",
    "version": 3,
    "rules": [
        {
            "id": "weapons",
            "concept": {
                "any_of": ["a handgun", SCRIPT],
                "but_not": [IMG, "a toy \u202e gun"],
                "generic": 1,
                "score": "probability",
            },
            "review": {"above": 0.5},
            "reject": {"above": 0.85},
            "on_missing": "review",
            "templates": ["{}", "a photo of {}"],
        },
        {"id": "off-caption", "alignment": {}, "reject": {"below": 0.1}, "on_missing": "review"},
        {"id": "small", "metadata": "min_side", "review": {"below": 100.0}, "on_missing": "reject"},
        {"id": "best", "fraction": {"of": "off-caption"}, "reject": {"outside_top": 0.5}, "on_missing": "keep"},
    ],
    "calibrations": [
        {
            "model": "nano@1",
            "weights_sha256": "ab" * 32,
            "prompts_sha256": "cd" * 32,
            "rules": {"weapons": {"reject": {"above": 0.8, "n": 400, "target": "precision>=0.95"}}},
        }
    ],
}
MODEL = {
    "model": "nano@1",
    "architecture": f"tower {SCRIPT}",
    "weights_sha256": "ab" * 32,
    "preprocess": {"size": 240, "interpolation": "bicubic", "resize_mode": "shortest"},
    "dtype": "fp32",
}
#: The thresholds that decide: weapons' reject band is the calibrated one, best's was fixed over the dataset.
WEAPONS_REVIEW, WEAPONS_REJECT, OFF_CAPTION, SMALL, BEST = 0.5, 0.8, 0.1, 100.0, 0.3
FAILED_ROWS = {
    4: ("decode_error", f"not an image: {SCRIPT}"),
    9: ("read_error", f"https://user:secret@host/x?token=abc {RTL}"),
}


@dataclass
class Built:
    """The run and what is in it: the decided rows as dictionaries, in order."""

    url: str
    source: Path
    rows: list[dict[str, Any]]
    failed: int


def photograph(seed: int, width: int = 320, height: int = 240) -> np.ndarray:
    """A picture full of fine detail: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    base = rng.integers(30, 220, 3)
    lines = (np.indices((height, width)).sum(axis=0) // (2 + seed % 3) % 2)[:, :, None] * 110 - 55
    return np.clip(base + lines + rng.normal(0, 10, (height, width, 3)), 0, 255).astype(np.uint8)


def build_run(
    folder: Path, *, count: int = 48, job: str = "run", failed_shards: int = 0, damaged: bool = False
) -> Built:
    """Write a source of `count` images in chunks of 16 and a finished run over it.

    job: run, embed or score. Every fifth row has no caption.
    """
    rng = np.random.default_rng(7)
    source_folder = folder / "photos & <things>"
    source_folder.mkdir(parents=True)
    for index in range(count):
        name = f"{index:03d}{NAMES[index % len(NAMES)]}"
        Image.fromarray(photograph(index, *((320, 240) if index % 7 else (90, 120)))).save(
            source_folder / f"{name}.jpg", quality=90
        )
        if index % 5 != 3:
            (source_folder / f"{name}.txt").write_text(CAPTIONS[index % len(CAPTIONS)], encoding="utf-8")
    source = open_source(str(source_folder), SourceOptions(rows_per_shard=16)) if count else None
    policy = POLICY if job == "run" else None
    plan = Plan(
        job=job,  # type: ignore[arg-type]
        source=source.to_plan() if source else {"url": str(source_folder), "kind": "folder", "options": {}},
        policy=policy,
        policy_sha256="ef" * 32 if policy else None,
        model=MODEL,
        options={"decode": "fast", "batch_size": 64, "limit": None, "sample": None},
        text_column=True,
    )
    directory = Directory(str(folder / "out"))
    settle_plan(directory, plan)
    stage = "decided" if policy else "embedded"
    everything: list[dict[str, Any]] = []
    commits = []
    for shard in source.iter_shards() if source else ():
        rows, failed = [], []
        for batch in source.read(shard):  # type: ignore[union-attr]
            for row in batch.to_pylist():
                row["cf_shard"] = shard.id
                (failed if row["cf_row"] in FAILED_ROWS else rows).append(row)
        decided = [_decide(row, rng, policy) for row in rows]
        everything += decided
        files = _write(folder / "out", shard.id, decided, failed, policy)
        commit = _commit(shard, stage, plan, decided, failed, files, damaged)
        ledger.write_commit(directory, commit)
        commits.append(commit)
    broken = [
        FailedShard(Shard(f"{i:016x}", f"part{i}{IMG}.tar", "tar"), f"no footer {SCRIPT}", 3)
        for i in range(failed_shards)
    ]
    thresholds = {"best.reject": BEST} if policy else {}
    version = Version.of(plan.sha256, stage, commits, broken, thresholds)
    ledger.write_version(directory, version)
    totals = version.totals
    done = {"seconds": 12.0, "startup_seconds": 2.0, "rows_processed": totals["rows"], "engine": "local"}
    directory.replace("run.json", json.dumps(done).encode())
    directory.clean_scratch(stale_only=False)
    return Built(directory.url, source_folder, everything, totals["failed"])


def _decide(row: dict[str, Any], rng: np.random.Generator, policy: dict[str, Any] | None) -> dict[str, Any]:
    import hashlib
    import io

    width, height = Image.open(io.BytesIO(row["cf_image"])).size
    caption = (row["cf_captions"] or [None])[0]
    similarity = float(np.float32(rng.uniform(-0.1, 0.7))) if caption is not None else None
    out = {
        "cf_shard": row["cf_shard"],
        "cf_row": row["cf_row"],
        "cf_key": row["cf_key"],
        "cf_uid": row["cf_uid"],
        "cf_sha256": hashlib.sha256(row["cf_image"]).hexdigest(),
        "cf_caption": caption,
        "cf_similarity": similarity,
        "cf_decision": None,
        "cf_reasons": None,
    }
    if policy is None:
        return out
    weapons, small = float(np.float32(rng.beta(0.6, 0.6))), float(min(width, height))
    out |= {"cf_score.weapons": weapons, "cf_score.off-caption": similarity, "cf_score.small": small}
    out["cf_score.best"] = similarity
    reasons: list[tuple[int, dict[str, Any]]] = []

    def fire(rule: str, band: str, score: float | None, limit: float | None, severity: int) -> None:
        words = {"nearest": SCRIPT, "contrast": IMG} if rule == "weapons" else {"nearest": None, "contrast": None}
        reasons.append((severity, {"rule": rule, "band": band, "score": score, "threshold": limit, **words}))

    if weapons > np.float32(WEAPONS_REJECT):
        fire("weapons", "reject", weapons, WEAPONS_REJECT, 2)
    elif weapons > np.float32(WEAPONS_REVIEW):
        fire("weapons", "review", weapons, WEAPONS_REVIEW, 1)
    if similarity is None:
        fire("off-caption", "missing", None, None, 1)
    elif similarity < np.float32(OFF_CAPTION):
        fire("off-caption", "reject", similarity, OFF_CAPTION, 2)
    if small < SMALL:
        fire("small", "review", small, SMALL, 1)
    if similarity is not None and similarity < np.float32(BEST):
        fire("best", "reject", similarity, BEST, 2)
    reasons.sort(key=lambda item: -item[0])
    out["cf_reasons"] = [reason for _, reason in reasons]
    out["cf_decision"] = ("keep", "review", "reject")[max((severity for severity, _ in reasons), default=0)]
    return out


def _write(
    out: Path, shard: str, rows: list[dict[str, Any]], failed: list[dict[str, Any]], policy: dict[str, Any] | None
) -> dict[str, Any]:
    fields: list[tuple[str, pa.DataType]] = [("cf_shard", pa.string()), ("cf_row", pa.int64()), ("cf_key", pa.string())]
    fields += [
        ("cf_uid", pa.string()),
        ("cf_sha256", pa.string()),
        ("cf_caption", pa.string()),
        ("cf_similarity", pa.float32()),
    ]
    fields += [(f"cf_score.{rule['id']}", pa.float32()) for rule in (policy or {"rules": []})["rules"]]
    fields += [("cf_decision", pa.string()), ("cf_reasons", REASONS)]
    tables = {"annotated": pa.Table.from_pylist(rows, schema=pa.schema(fields))}
    if failed:
        bad = [
            {
                "cf_shard": shard,
                "cf_row": row["cf_row"],
                "cf_key": row["cf_key"],
                "cf_uid": row["cf_uid"],
                "cf_error_class": FAILED_ROWS[row["cf_row"]][0],
                "cf_error": FAILED_ROWS[row["cf_row"]][1],
            }
            for row in failed
        ]
        tables["failed"] = pa.Table.from_pylist(bad, schema=FAILED)
    files = {}
    for kind, table in tables.items():
        (out / kind).mkdir(exist_ok=True)
        name = f"{kind}/{shard}-0000.parquet"
        pq.write_table(table, out / name, row_group_size=7)  # several batches per file
        size = (out / name).stat().st_size
        files[kind] = {"name": name, "rows": table.num_rows, "bytes": size, "sha256": file_sha256(out / name)}
    return files


def _commit(
    shard: Shard,
    stage: str,
    plan: Plan,
    rows: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    files: dict[str, Any],
    damaged: bool,
) -> Commit:
    decisions = [row["cf_decision"] for row in rows]
    counts = {name: decisions.count(name) for name in ("keep", "review", "reject")}
    counts |= {"rows": len(rows) + len(failed), "failed": len(failed), "embedded": len(rows)}
    counts |= {"decided": sum(item is not None for item in decisions), "not_downloaded": 5, "duplicate_keys": 1}
    rules: dict[str, dict[str, int]] = {}
    for row in rows:
        for reason in row["cf_reasons"] or []:
            bands = rules.setdefault(reason["rule"], {})
            bands[reason["band"]] = bands.get(reason["band"], 0) + 1
    classes = [FAILED_ROWS[row["cf_row"]][0] for row in failed]
    seconds = {"decode": 1.0, "encode_images": 2.5, "encode_texts": 0.5, "decide_and_write": 0.25}
    of_worker = WorkerDetails(seconds, 1, False, 0, 0.0, f"cpu {IMG}")
    return commit_of(
        shard,
        stage,
        plan=plan.sha256,
        counts=counts,
        failed_by_class={name: classes.count(name) for name in sorted(set(classes))},
        rules=rules,
        damaged=damaged,
        bytes_unread=1500 if damaged else 0,
        files=files,
        work=Work(1_800_000_000.0, 1_800_000_010.0, {"host": "h", "cores": 2}, of_worker),
    )
