"""`verify`: prove the promises of a run from its files alone, trusting nothing that is derived."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter import text
from clipfilter.decisions import DECISIONS
from clipfilter.errors import reason
from clipfilter.operations.receipt import RECEIPTS, check_receipt
from clipfilter.runs import FILE_KINDS, PLAN_FILE, Commit, DataFile, Run, Totals, Version, as_matrix, ledger
from clipfilter.sources import IMPORTED_KIND, Source
from clipfilter.storage import Directory, read_chunks

_THREADS = 8


@dataclass
class Proof:
    """What was proved, what is worth knowing, and what is wrong; each a sentence."""

    proved: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def verify_run(url: str) -> Proof:
    """Check the newest version of a run: plan, commits, hashes, row accounting, identities, totals.

    Raises RefusedError when there is no finished run at `url`.
    """
    run = Run.open(url)
    directory, plan, version = run.directory, run.plan, run.version
    proof = Proof()
    _check_plan(run, proof)
    missing = [name for name in version.commits if not directory.exists(name)]
    proof.problems += [f"{name} is named by version {version.name} but is not there" for name in missing]
    commits = list(ledger.commits(directory, [name for name in version.commits if name not in missing]))
    for commit in commits:
        if commit.plan != plan.sha256:
            proof.problems.append(f"the commit of {commit.shard.path} belongs to another plan")
    _check_files(directory, commits, proof)
    with ThreadPoolExecutor(_THREADS) as pool:
        for problems in pool.map(lambda commit: list(_check_shard(run, commit)), commits):
            proof.problems += problems
    _check_totals(version, commits, proof)
    _check_listing(run, commits, proof)
    _note_strangers(directory, proof)
    _check_receipts(run, proof)
    if not proof.problems:
        _say_what_holds(version, commits, proof)
    return proof


def _check_plan(run: Run, proof: Proof) -> None:
    if run.directory.read_json(PLAN_FILE)["sha256"] != run.plan.sha256:
        proof.problems.append("plan.json does not match its own hash: it was edited")
    if run.version.plan != run.plan.sha256:
        proof.problems.append("the version belongs to another plan")


def _check_files(directory: Directory, commits: list[Commit], proof: Proof) -> None:
    """Every data file is there, has the size and the sha256 that its commit says."""
    entries = {file.name: file for commit in commits for file in commit.files.values()}

    def check(file: DataFile) -> str | None:
        try:
            digest, size = _hash(directory, file.name)
        except FileNotFoundError:
            return f"{file.name} is missing"
        if digest != file.sha256 or size != file.bytes:
            return f"{file.name} was changed: its content is not what its commit says"
        return None

    with ThreadPoolExecutor(_THREADS) as pool:
        problems = [problem for problem in pool.map(check, entries.values()) if problem]
    proof.problems += problems
    if not problems:
        total = sum(file.bytes for file in entries.values())
        proof.proved.append(f"{len(entries):,} data files ({total:,} bytes) have the size and sha256 their commits say")


def _hash(directory: Directory, name: str) -> tuple[str, int]:
    """sha256 and size of a file, or of a folder as `storage.file_sha256` defines it."""
    if directory.fs.isdir(directory.path(name)):
        digest, size = hashlib.sha256(), 0
        files: list[str] = directory.walk(name)
        # pathlib sorts by path components, which differs from sorting the joined names.
        for file in sorted(files, key=lambda file: file[len(name) + 1 :].split("/")):
            inner, length = _hash(directory, file)
            digest.update(f"{file[len(name) + 1 :]}\0{inner}\n".encode("utf-8", "surrogateescape"))
            size += length
        return digest.hexdigest(), size
    digest, size = hashlib.sha256(), 0
    with directory.open(name) as handle:
        for chunk in read_chunks(handle):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def _check_shard(run: Run, commit: Commit) -> Iterator[str]:
    """Row accounting of one shard: rows in = decided + failed, no row twice, kept files hold the kept rows."""
    path, counts, files = commit.shard.path, commit.counts, commit.files
    try:
        annotated = _table(run, files.annotated, [cf.SHARD, cf.ROW, cf.DECISION])
        failed = _table(run, files.failed, [cf.SHARD, cf.ROW, cf.ERROR_CLASS])
    except (OSError, pa.ArrowException, KeyError) as error:
        yield f"{path}: a table cannot be read ({error})"
        return
    rows = annotated.num_rows + failed.num_rows
    if rows != counts.rows or failed.num_rows != counts.failed:
        yield (
            f"{path}: the commit counts {counts.rows} rows and {counts.failed} failed, "
            f"the files hold {rows} and {failed.num_rows}"
        )
    if commit.seen is not None and commit.seen.rows != counts.rows:
        yield f"{path}: {commit.seen.rows} rows were seen, but {counts.rows} judged"
    numbers = np.concatenate([np.asarray(annotated[cf.ROW]), np.asarray(failed[cf.ROW])])
    if len(np.unique(numbers)) != len(numbers):
        yield f"{path}: a row is in the result twice"
    shards = set(annotated[cf.SHARD].unique().to_pylist()) | set(failed[cf.SHARD].unique().to_pylist())
    if shards - {commit.shard.id}:
        yield f"{path}: rows of another shard are among its own"
    decisions = annotated[cf.DECISION].value_counts().to_pylist()
    found = {item["values"]: item["counts"] for item in decisions}
    if commit.stage == "decided":
        if found.pop(None, 0) or set(found) - set(DECISIONS):
            yield f"{path}: a row has no valid decision"
        said = {"keep": counts.keep, "review": counts.review, "reject": counts.reject}
        for name, count in said.items():
            if found.get(name, 0) != count:
                yield f"{path}: the commit counts {count} {name}, the rows say {found.get(name, 0)}"
        if not sum(said.values()) == counts.decided == counts.rows - counts.failed:
            yield f"{path}: decided is not kept + review + rejected"
    elif set(found) - {None}:
        yield f"{path}: rows have decisions, but nothing was to be decided"
    yield from _check_copies(run.directory, commit)
    if files.embeddings is not None:
        yield from _check_embeddings(run, files.embeddings, np.asarray(annotated[cf.ROW]), path)


def _check_copies(directory: Directory, commit: Commit) -> Iterator[str]:
    """Kept and review files hold as many rows as were decided so, in the source's own format."""
    decided = {"keep": (commit.files.kept, commit.counts.keep), "review": (commit.files.review, commit.counts.review)}
    for decision, (file, count) in decided.items():
        if file is None:
            continue
        if file.name.endswith(".tar"):
            with directory.open(file.name) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                if len({_tar_key(member.name) for member in tar}) != file.rows:
                    yield f"{file.name} does not hold {file.rows} samples"
        elif file.name.endswith(".parquet"):
            with directory.open(file.name) as handle:
                if pq.ParquetFile(handle).metadata.num_rows != file.rows:
                    yield f"{file.name} does not hold {file.rows} rows"
        if file.rows != count:
            folder = file.name.split("/")[0]
            yield f"{commit.shard.path}: {count} rows were decided {decision}, {file.rows} are in {folder}/"


def _tar_key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _check_embeddings(run: Run, file: DataFile, rows: np.ndarray, path: str) -> Iterator[str]:
    table = run.table(file)
    if not np.array_equal(np.asarray(table[cf.ROW]), rows):
        yield f"{path}: the embeddings are not those of the annotated rows, in their order"
        return
    dim = table.schema.field("image_emb").type.list_size
    norms = np.linalg.norm(as_matrix(table["image_emb"], dim).astype(np.float32), axis=1)
    if len(norms) and np.abs(norms - 1).max() > 0.01:
        yield f"{path}: an image embedding does not have unit norm"


def _table(run: Run, file: DataFile | None, columns: list[str]) -> pa.Table:
    if file is None:
        types = {cf.ROW: pa.int64()}
        return pa.schema([(name, types.get(name, pa.string())) for name in columns]).empty_table()
    return run.table(file, columns)


def _check_totals(version: Version, commits: list[Commit], proof: Proof) -> None:
    if Totals.of(commits, version.failed_shards, version.listing) != version.totals:
        proof.problems.append("the totals of the version are not the sums of its commits")
    shards = [commit.shard.id for commit in commits]
    if len(set(shards)) != len(shards):
        proof.problems.append("a shard is in the version twice")


def _check_listing(run: Run, commits: list[Commit], proof: Proof) -> None:
    """The account is that of what the source lists, as far as it can still be listed and is what it was."""
    then, seen = run.version.listing, run.version.totals.seen
    if then is None or seen is None or run.dataset["kind"] == IMPORTED_KIND:
        return
    source = Source.from_plan(run.dataset)
    processed = [*(commit.shard for commit in commits), *(item.shard for item in run.version.failed_shards)]
    missing = {(shard.id, shard.size, shard.etag) for shard in processed}
    new = pictures = 0
    try:
        for shard in source.iter_shards():
            pictures += len(shard.members)
            key = (shard.id, shard.size, shard.etag)
            new += key not in missing
            missing.discard(key)
        found = source.count_files()
    except Exception as error:  # every filesystem has exceptions of its own
        proof.notes.append(f"the source cannot be listed now, so the account was not compared with it: {reason(error)}")
        return
    now = source.listing
    assert now is not None
    if found is not None and found != now.things + pictures:
        proof.problems.append(f"the source has {found:,} files, but {now.things + pictures:,} are accounted for")
    elif new or missing or now.counts() != then.counts():
        proof.notes.append("the source is not what it was when it was read; the account is of what was there then")
    else:
        row, part, container = (
            text.plural(count, name)
            for count, name in ((seen.rows, "row"), (seen.parts, "part"), (seen.containers, "container"))
        )
        proof.proved.append(
            f"{seen.things:,} things seen = {row} + {part} + {container} + {seen.passed.total():,} passed over, and the source "
            f"lists the same {text.plural(now.things + pictures, 'file')} today"
        )


def _note_strangers(directory: Directory, proof: Proof) -> None:
    """Data files no commit names: attempts that were killed or came late. Harmless, since readers trust commits."""
    named = {file.name for commit in ledger.commits(directory) for file in commit.files.values()}
    strangers = [
        f"{folder}/{file}"
        for folder in FILE_KINDS
        for file in directory.names(folder)
        if f"{folder}/{file}" not in named
    ]
    if strangers:
        shown = ", ".join(strangers[:3]) + (" ..." if len(strangers) > 3 else "")
        proof.notes.append(f"{len(strangers)} data files belong to no commit (left by a killed attempt): {shown}")


def _check_receipts(run: Run, proof: Proof) -> None:
    """What `forget` removed has not come back, and what it left is unchanged."""
    receipts = [f"{RECEIPTS}/{name}" for name in run.directory.names(RECEIPTS)]
    problems = [problem for name in receipts for problem in check_receipt(run, run.directory.read_json(name), name)]
    proof.problems += problems
    if receipts and not problems:
        proof.proved.append(f"nothing has come back of what {text.plural(len(receipts), 'receipt')} of `forget` name")


def _say_what_holds(version: Version, commits: list[Commit], proof: Proof) -> None:
    totals = version.totals
    if version.stage == "decided":
        proof.proved.append(
            f"{totals.rows:,} rows in = {totals.decided:,} decided + {totals.failed:,} failed, and "
            f"{totals.decided:,} decided = {totals.keep:,} keep + {totals.review:,} review + {totals.reject:,} reject"
        )
    else:
        proof.proved.append(f"{totals.rows:,} rows in = {totals.embedded:,} embedded + {totals.failed:,} failed")
    proof.proved.append(
        f"no row is there twice, in {text.plural(len(commits), 'shard')}; totals are the sums of the commits"
    )
    if totals.failed_shards:
        proof.notes.append(f"{totals.failed_shards} shard(s) failed as a whole; their row count is unknown")
    if totals.damaged_shards:
        proof.notes.append(f"{totals.damaged_shards} shard(s) are damaged; {totals.bytes_unread:,} bytes were not read")
    if totals.not_downloaded:
        proof.notes.append(f"{totals.not_downloaded:,} rows of the source were never downloaded; they are not rows in")
