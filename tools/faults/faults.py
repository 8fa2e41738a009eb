"""The faults that plant.py plants: each a slip that somebody could make, in the place where it would do harm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old` stands once in `file` and becomes `new`. tests: arguments of pytest, all of them part of `make test`."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "`>=` for `>` at a threshold",
        "clipfilter/policies/deciding.py",
        "values > limit if direction",
        "values >= limit if direction",
        ("tests/unit/test_policies_evaluate.py", "tests/unit/test_policies_kinds.py"),
    ),
    Fault(
        "ties at a fraction's threshold go, not stay",
        "clipfilter/policies/deciding.py",
        "else values < limit",
        "else values <= limit",
        ("tests/unit/test_policies_evaluate.py", "tests/unit/test_fraction.py"),
    ),
    Fault(
        "a fraction keeps one row short",
        "clipfilter/policies/fraction.py",
        "from_the_end = min(int(ranked * fraction), ranked - 1)",
        "from_the_end = max(min(int(ranked * fraction), ranked) - 1, 0)",
        ("tests/unit/test_fraction.py",),
    ),
    Fault(
        "a rule without a score lets the row pass",
        "clipfilter/policies/deciding.py",
        'if rule.on_missing != "keep":',
        'if rule.on_missing == "reject":',
        ("tests/unit/test_policies_evaluate.py", "tests/unit/test_policies_kinds.py"),
    ),
    Fault(
        "failed rows are dropped",
        "clipfilter/engine/shard.py",
        "sink.failed(embedded.failed)",
        "sink.failed(embedded.failed.slice(0, 0))",
        ("tests/unit/test_engine_shard.py", "tests/golden"),
    ),
    Fault(
        "captions in the wrong order",
        "clipfilter/engine/shard.py",
        "lists = [_usable(own) for own in batch.rows[cf.CAPTIONS].to_pylist()]",
        "lists = [_usable(own) for own in batch.rows[cf.CAPTIONS].to_pylist()][::-1]",
        ("tests/unit/test_engine_shard.py", "tests/golden"),
    ),
    Fault(
        "an embedding that is not finite is stored",
        "clipfilter/engine/shard.py",
        "np.isfinite(image_emb).all(axis=1)",
        "np.isfinite(image_emb).any(axis=1)",
        ("tests/unit/test_engine_shard.py",),
    ),
    Fault(
        "a mean of captions is no unit vector",
        "clipfilter/engine/shard.py",
        "result /= np.where(norms == 0, 1, norms)",
        "result /= 1",
        ("tests/unit/test_engine_shard.py", "tests/integration/test_job.py"),
    ),
    Fault(
        "rejected pictures are copied to review/",
        "clipfilter/engine/shard.py",
        '("review", "review")',
        '("review", "reject")',
        ("tests/unit/test_engine_shard.py", "tests/golden"),
    ),
    Fault(
        "a commit is written before its data",
        "clipfilter/runs/writer.py",
        "        self._directory.publish(path, name)\n",
        "        late = path.rename(self._folder.parent / digest)\n"
        "        threading.Timer(0.5, self._directory.publish, (late, name)).start()\n",
        ("tests/unit/test_engine_shard.py", "tests/unit/test_runs.py", "tests/golden"),
    ),
    Fault(
        "a retried shard counts twice",
        "clipfilter/engine/driver.py",
        "        self._queue.insert(0, item)\n",
        "        self._queue[:0] = [item, _Pending(item.unit, item.order + 1_000_000, item.generation + 1)]\n",
        ("tests/integration/test_job.py", "tests/unit/test_engine_ledger.py", "tests/chaos"),
    ),
    Fault(
        "a file that changed is not read again",
        "clipfilter/engine/driver.py",
        "changed = (commit.shard.size, commit.shard.etag) != (shard.size, shard.etag)",
        "changed = commit.shard.size != shard.size and commit.shard.etag != shard.etag and False",
        ("tests/integration/test_job.py",),
    ),
    Fault(
        "a second writer overwrites a commit",
        "clipfilter/storage.py",
        "            os.link(temporary, target)\n",
        "            os.replace(temporary, target)\n",
        ("tests/unit/test_engine_ledger.py",),
    ),
    Fault(
        "a uid is hashed over another path",
        "clipfilter/sources/model.py",
        'text = f"{path}\\0{key}" if occurrence == 1',
        'text = f"./{path}\\0{key}" if occurrence == 1',
        ("tests/unit/test_sources_webdataset.py", "tests/unit/test_sources_folder.py", "tests/golden"),
    ),
    Fault(
        "two rows with one key share a uid",
        "clipfilter/sources/model.py",
        'else f"{path}\\0{key}\\0{occurrence}"',
        'else f"{path}\\0{key}"',
        ("tests/unit/test_sources_webdataset.py", "tests/unit/test_sources_parquet.py"),
    ),
    Fault(
        "transparent pixels come out black",
        "clipfilter/images/decode.py",
        "_WHITE = (255, 255, 255)",
        "_WHITE = (0, 0, 0)",
        ("tests/unit/test_images.py",),
    ),
    Fault(
        "one EXIF orientation is turned the wrong way",
        "clipfilter/images/decode.py",
        "if orientation in (2, 3, 6, 7):",
        "if orientation in (2, 3, 6, 8):",
        ("tests/unit/test_images.py",),
    ),
    Fault(
        "a picture of exactly the pixel limit is refused",
        "clipfilter/images/header.py",
        "if header.width * header.height > max_pixels:",
        "if header.width * header.height >= max_pixels:",
        ("tests/unit/test_images.py", "tests/unit/test_images_load.py"),
    ),
    Fault(
        "an escape is forgotten in a page",
        "clipfilter/report/html.py",
        "        autoescape=True,\n",
        "        autoescape=False,\n",
        ("tests/unit/test_report.py", "tests/unit/test_search.py"),
    ),
    Fault(
        "the page answers without its token",
        "clipfilter/serve/guard.py",
        "if not hmac.compare_digest(given.encode(), self.token.encode()):",
        "if given and not hmac.compare_digest(given.encode(), self.token.encode()):",
        ("tests/unit/test_serve.py",),
    ),
    Fault(
        "equal cosines come in any order",
        "clipfilter/search/exact.py",
        "np.lexsort((positions, -cosines))",
        "np.lexsort((-positions, -cosines))",
        ("tests/unit/test_search.py",),
    ),
    Fault(
        "near duplicates at exactly the distance stay",
        "clipfilter/curation/duplicates.py",
        "np.bitwise_count(values[a] ^ values[b]) <= distance",
        "np.bitwise_count(values[a] ^ values[b]) < distance",
        ("tests/unit/test_curation_duplicates.py",),
    ),
    Fault(
        "a guarantee is computed for the other tail",
        "clipfilter/calibration/guarantees.py",
        "np.where(some, m - k + 1.0, 1.0), 1.0 - confidence)",
        "np.where(some, m - k + 1.0, 1.0), 1.0 - confidence / 2)",
        ("tests/unit/test_calibration_guarantees.py",),
    ),
    Fault(
        "class vectors average prompts that are no unit vectors",
        "clipfilter/policies/texts.py",
        "texts /= np.maximum(np.linalg.norm(texts, axis=2, keepdims=True), 1e-12)",
        "texts *= np.arange(1.0, 1.0 + texts.shape[1])[None, :, None]",
        ("tests/unit/test_evaluation_measures.py", "tests/unit/test_evaluation.py"),
    ),
    Fault(
        "a sample differs from attempt to attempt",
        "clipfilter/engine/worker.py",
        'hashlib.sha256(b"sample\\0" + uid.encode()).digest()',
        "hashlib.sha256(os.urandom(1) + uid.encode()).digest()",
        ("tests/unit/test_engine_shard.py", "tests/integration/test_job.py"),
    ),
    Fault(
        "verify looks at sizes only",
        "clipfilter/operations/verify.py",
        "if digest != file.sha256 or size != file.bytes:",
        "if size != file.bytes:",
        ("tests/unit/test_engine_ledger.py", "tests/integration/test_job.py"),
    ),
    Fault(
        "forgetting leaves the row in the new files",
        "clipfilter/operations/forget.py",
        "pc.invert(pc.is_in(table[cf.ROW], value_set=drop))",
        "pc.invert(pc.is_in(table[cf.ROW], value_set=drop.slice(1)))",
        ("tests/integration/test_import_forget.py",),
    ),
    Fault(
        "drift is compared with half the false alarms in mind",
        "clipfilter/nightly/drift.py",
        "float(chdtri(bins - 1, FALSE_ALARM))",
        "float(chdtri(bins, FALSE_ALARM * 50))",
        ("tests/unit/test_nightly_drift.py",),
    ),
)
