"""A worker: one encoder, one compiled policy, and the tasks it is given. Both executors run this same class."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import defaults
from clipfilter.decisions import DECISIONS
from clipfilter.engine.decoding import DecodeSettings, StageTimes, ThreadDecoder, decode_batches, prefetch
from clipfilter.engine.isolation import IsolatedDecoder
from clipfilter.engine.shard import ShardReport, decide_shard, process_shard
from clipfilter.runs import (
    FAILED,
    FINAL_STAGE,
    CommitName,
    ShardWriter,
    decision_inputs,
    local_files,
    machine,
    of_run,
    read_stored,
    write_commit,
)
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory

if TYPE_CHECKING:
    from clipfilter.models import Encoder
    from clipfilter.policies import CompiledPolicy, Policy


@dataclass(frozen=True)
class JobSpec:
    """What every worker of a job is told at its start; JSON, so that it travels to any executor.

    options holds the plan's options (decode mode, batch size, captions, limits); `text` says whether captions are
    embedded.
    """

    job: str
    out: str
    source: dict[str, Any]
    policy: dict[str, Any] | None
    model: str
    device: str
    dtype: defaults.Dtype
    compile_model: bool
    threads: int
    options: dict[str, Any]
    text: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """One shard to process, or to decide again.

    op: "embed" (images in), "score" or "decide" (stored embeddings in). inputs: for the latter, the run directory and
    the commit that hold rows and embeddings. isolated: decode in a child process, after the shard killed a worker.
    """

    op: str
    shard: dict[str, Any]
    generation: int
    plan_sha256: str
    isolated: bool = False
    row_cap: int | None = None
    inputs: dict[str, Any] | None = None
    thresholds: dict[str, float | None] | None = None
    attempt: int = 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Worker:
    """Loads everything once, then answers tasks with commits. `process` may be called from two threads: one shard
    is decided and written while the encoder works on the next."""

    def __init__(self, spec: JobSpec) -> None:
        from clipfilter.models import load_encoder
        from clipfilter.policies import Policy, ScorePolicy

        self.spec = spec
        self.directory = Directory(spec.out)
        # Arrow's own pool would compete with the encoder for the same cores.
        pa.set_cpu_count(max(1, spec.threads))
        # libgomp stops spinning between parallel regions once a process has more OpenMP threads than cores, and every
        # Python thread that computes gets a team of its own: a second one makes the forward pass a quarter slower.
        self._torch_thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self.encoder = self._on_torch_thread(
            self._torch_thread.submit(
                load_encoder,
                spec.model,
                device=spec.device,
                dtype=spec.dtype,
                threads=spec.threads,
                compile=spec.compile_model,
            ).result(),
            "encode_images",
            "encode_texts",
        )
        stored = of_run(spec.source)
        source = Source.from_plan(spec.source["source"] if stored else spec.source)
        self.source = None if stored else source
        self.policy = None
        if spec.policy is not None:
            policy = (ScorePolicy if spec.job == "score" else Policy).from_canonical(spec.policy)
            compiled = compile_for(source, policy, self.encoder, spec.options["decode"], self.directory)
            self.policy = self._on_torch_thread(compiled, "score")
        self.labels = None
        if "labels" in spec.options:
            from clipfilter.policies import LabelScorer, LabelSet

            scorer = LabelScorer(LabelSet.from_json(spec.options["labels"]), self.encoder)
            self.labels = self._on_torch_thread(scorer, "columns")
        self.rows_done = 0
        self._encoder_turn = threading.Lock()
        self._progress = threading.Lock()
        if self.source is not None:
            self._settings = DecodeSettings(self.encoder.preprocess, spec.options["decode"], spec.options["max_pixels"])
            self._threads = ThreadDecoder(self._settings, spec.threads)

    def describe(self) -> dict[str, Any]:
        """What the driver needs to know of the model and the policy before it writes the plan."""
        warnings = list(self.policy.warnings) if self.policy else []
        if self.labels is not None and self.labels.truncated:
            warnings.append(f"{self.labels.truncated} prompts are longer than {self.encoder.name} reads and were cut")
        return {"fingerprint": self.encoder.fingerprint, "warnings": warnings}

    def process(self, task: Task) -> dict[str, Any]:
        """Do the task and commit it; the commit of an earlier attempt wins and is returned in its place."""
        shard = Shard.from_json(task.shard)
        started = time.time()
        copies = self.source if self.spec.options["copy"] else None
        writer = ShardWriter(self.directory, shard, copies, score_columns_only=self.source is None)
        try:
            report, extra = (
                self._embed(task, shard, writer) if task.op == "embed" else self._decide(task, shard, writer)
            )
            stage = self._stage(task)
            commit = {
                "shard": task.shard,
                "stage": stage,
                "generation": task.generation,
                "plan": task.plan_sha256,
                "counts": report.counts | extra.pop("counts"),
                "failed_by_class": report.failed_by_class,
                "rules": report.rules,
                "captions_truncated": report.captions_truncated,
                **extra,
                "files": {**extra.get("files", {}), **writer.files},
                "work": {
                    "seconds": {name: round(value, 4) for name, value in report.seconds.items()},
                    "started": round(started, 3),
                    "finished": round(time.time(), 3),
                    "attempt": task.attempt,
                    "isolated": task.isolated,
                    "batch_halvings": report.batch_halvings,
                    "encoder_waited": round(report.encoder_waited, 4),
                    "machine": machine(),
                    "backend": self.encoder.fingerprint.get("backend"),
                },
            }
            commit, created = write_commit(self.directory, CommitName(shard.id, stage, task.generation), commit)
        finally:
            writer.close()
        return {"commit": commit, "created": created}

    def close(self) -> None:
        self.directory.clean_scratch(stale_only=False)

    def _on_torch_thread(self, target: Any, *methods: str) -> Any:
        return _OnThread(target, methods, self._torch_thread)

    def _stage(self, task: Task) -> str:
        if task.op == "score" or (task.op == "embed" and self.policy and self.policy.dataset_rules):
            return "scored"
        return FINAL_STAGE[self.spec.job]

    def _embed(self, task: Task, shard: Shard, writer: ShardWriter) -> tuple[ShardReport, dict[str, Any]]:
        assert self.source is not None
        options = self.spec.options
        times = StageTimes()
        reader = self.source.read(shard)
        with contextlib.ExitStack() as stack:
            decoder: Any = self._threads
            if task.isolated:
                decoder = IsolatedDecoder(self._settings)
                stack.callback(decoder.close)
            on_gpu = self.spec.device.startswith("cuda")
            # On a GPU decoding runs two batches ahead, and begins while an earlier shard still has the encoder. On a
            # CPU the cores are the encoder's too, and taking turns is faster than competing (docs/decisions/0003): only
            # reading runs ahead.
            batches = decode_batches(
                stack.enter_context(contextlib.closing(prefetch(reader, 1))),
                decoder,
                self.encoder.preprocess.size,
                options["batch_size"],
                times,
                _sampler(options["sample"]),
                task.row_cap,
            )
            if on_gpu:
                batches = stack.enter_context(contextlib.closing(prefetch(batches, 2)))
            report = process_shard(
                batches,
                self.encoder,
                self.policy,
                writer,
                shard=shard.id,
                source_schema=self.source.schema,
                text=self.spec.text,
                captions=options["captions"],
                turn=self._encoder_turn,
                times=times,
                on_batch=self._count,
                labels=self.labels,
            )
        stats = reader.stats
        extra = {
            "counts": {
                "not_downloaded": stats.not_downloaded,
                "duplicate_keys": stats.duplicate_keys,
                "clashes": stats.clashes,
                "misfits": stats.misfits,
            },
            "damaged": stats.damaged,
            "bytes_unread": stats.bytes_unread,
            "files": {},
        }
        return report, extra

    def _decide(self, task: Task, shard: Shard, writer: ShardWriter) -> tuple[ShardReport, dict[str, Any]]:
        assert task.inputs is not None
        origin = Directory(task.inputs["run"])
        commit = task.inputs["commit"]
        files = commit["files"]
        same_run = origin.url == self.directory.url
        with local_files(origin, files, self.directory.scratch()) as local:
            rows_file = local.get("scored") if same_run else local.get("annotated")
            failed = pq.read_table(local["failed"]) if "failed" in local else FAILED.empty_table()
            if rows_file is None:
                report = ShardReport({"rows": failed.num_rows, "failed": failed.num_rows, "embedded": 0}, {})
                report.counts |= dict.fromkeys(("decided", *DECISIONS), 0)
                report.failed_by_class = commit["failed_by_class"]
            else:
                rows, embeddings = read_stored(rows_file, local["embeddings"])
                scored_only = task.op == "score" or self.spec.job == "score"
                thresholds = None if scored_only else task.thresholds or {}
                report = decide_shard(
                    rows, embeddings, failed, self.encoder, self.policy, thresholds, writer,
                    copy=same_run and self.spec.options["copy"], final=task.op == "decide", labels=self.labels,
                )  # fmt: skip
            if not same_run and task.op == "decide":
                writer.failed(failed)
        self._count(report.counts["rows"])
        carried = {name: files[name] for name in ("embeddings", "failed") if same_run and name in files}
        extra: dict[str, Any] = {
            "counts": {
                n: commit["counts"].get(n, 0) for n in ("not_downloaded", "duplicate_keys", "clashes", "misfits")
            },
            "damaged": commit.get("damaged", False),
            "bytes_unread": commit.get("bytes_unread", 0),
            "captions_truncated": commit.get("captions_truncated", 0),
            "files": carried,
            "base_generation": task.inputs["generation"],
        }
        if task.thresholds:
            extra["thresholds"] = task.thresholds
        if not same_run:
            extra["base"] = {"run": origin.url, "commit": task.inputs["name"]}
        return report, extra

    def _count(self, rows: int) -> None:
        with self._progress:
            self.rows_done += rows


def compile_for(
    source: Source, policy: Policy, encoder: Encoder, decode: str, run: Directory | None = None
) -> CompiledPolicy:
    """The policy compiled for a model and for the columns of a source; RefusedError where it fits neither.

    run: the run directory that keeps copies of the policy's files.
    """
    from clipfilter.policies import Attachments, compile_policy

    compiled = compile_policy(policy, encoder, decode="exact" if decode == "exact" else "fast", files=Attachments(run))
    compiled.check_columns(pa.schema([*source.schema, *decision_inputs()]))
    return compiled


class _OnThread:
    """An object some of whose methods run on one thread of their own; all else is the object's."""

    def __init__(self, target: Any, methods: tuple[str, ...], thread: ThreadPoolExecutor) -> None:
        self._target = target
        for name in methods:
            method = getattr(target, name)
            setattr(self, name, lambda *given, method=method: thread.submit(method, *given).result())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _sampler(sample: float | None) -> Any:
    """Keeps a row when a hash of its uid falls below the sample's share: the same rows in every attempt."""
    if sample is None:
        return None
    limit = int(sample * 2**64)
    return lambda uid: int.from_bytes(hashlib.sha256(b"sample\0" + uid.encode()).digest()[:8], "big") < limit
