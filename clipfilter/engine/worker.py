"""A worker: one encoder, one compiled policy, and the tasks it is given. Both executors run this same class."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from clipfilter import defaults
from clipfilter.decisions import DECISIONS
from clipfilter.engine.decoding import Decoder, StageTimes, ThreadDecoder, decoded_ahead
from clipfilter.engine.isolation import ProcessDecoder
from clipfilter.engine.reading import PatientReader
from clipfilter.engine.shard import ShardReport, decide_shard, process_shard
from clipfilter.images import DecodeSettings, apart
from clipfilter.runs import (
    FAILED,
    FINAL_STAGE,
    Base,
    Commit,
    Counts,
    ShardWriter,
    Thresholds,
    WorkerDetails,
    decision_inputs,
    embeddings_of,
    of_run,
    read_table,
    read_tables,
)
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory, is_local

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
    decode_in: defaults.DecodeIn = defaults.DECODE_IN
    decode_timeout: float = defaults.DECODE_TIMEOUT

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Inputs:
    """The commit whose rows and embeddings are decided (again), and the URL of its run."""

    run: str
    commit: Commit


@dataclass(frozen=True)
class Task:
    """One shard to process, or to decide again.

    op: "embed" (images in), "score" or "decide" (stored embeddings in). inputs: for the latter. isolated: decode in a
    child process, after the shard killed a worker.
    """

    op: str
    shard: Shard
    generation: int
    plan_sha256: str
    isolated: bool = False
    row_cap: int | None = None
    inputs: Inputs | None = None
    thresholds: Thresholds | None = None
    attempt: int = 1

    def to_json(self) -> dict[str, Any]:
        """As it travels to workers."""
        inputs = self.inputs and {"run": self.inputs.run, "commit": self.inputs.commit.to_json()}
        return {**vars(self), "shard": self.shard.to_json(), "inputs": inputs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Task:
        given = value["inputs"]
        inputs = given and Inputs(given["run"], Commit.from_json(given["commit"], "a task"))
        return cls(**{**value, "shard": Shard.from_json(value["shard"]), "inputs": inputs})


@dataclass(frozen=True)
class Done:
    """The commit that a task came to. created: by this attempt; else an earlier one was first, and its commit stands."""

    commit: Commit
    created: bool

    def to_json(self) -> dict[str, Any]:
        """As it travels to the driver."""
        return {"commit": self.commit.to_json(), "created": self.created}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Done:
        return cls(Commit.from_json(value["commit"], "a worker's answer"), value["created"])


class Step(NamedTuple):
    """What a worker does for a shard, from which key on, and for how many seconds already."""

    shard: str
    name: str
    key: str
    seconds: float


@dataclass(frozen=True)
class Heartbeat:
    """Sent by a worker twice a second. rows: processed so far."""

    rows: int
    steps: list[Step]

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "steps": [list(step) for step in self.steps]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Heartbeat:
        return cls(value["rows"], [Step(*step) for step in value["steps"]])


class Worker:
    """Loads everything once, then answers tasks with commits. `process` may be called from two threads: one shard
    is decided and written while the encoder works on the next."""

    def __init__(self, spec: JobSpec) -> None:
        from clipfilter.models import load_encoder
        from clipfilter.policies import Policy, ScorePolicy

        self.spec = spec
        self.directory = Directory(spec.out)
        if not of_run(spec.source) and spec.decode_in == "processes":
            apart.prepare()  # it imports while the model is loaded
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
        self._under_way: dict[int, tuple[str, StageTimes]] = {}
        self._decoders: dict[defaults.DecodeIn, Decoder] = {}
        if self.source is not None:
            self._decoder(spec.decode_in)

    def describe(self) -> dict[str, Any]:
        """What the driver needs to know of the model and the policy before it writes the plan."""
        warnings = list(self.policy.warnings) if self.policy else []
        if self.labels is not None and self.labels.truncated:
            warnings.append(f"{self.labels.truncated} prompts are longer than {self.encoder.name} reads and were cut")
        return {"fingerprint": self.encoder.fingerprint, "warnings": warnings}

    def heartbeat(self) -> Heartbeat:
        """What this worker does at the moment."""
        now = time.monotonic()
        steps = [
            Step(path, name, key, round(now - since, 1))
            for path, times in list(self._under_way.values())
            for name, (since, key) in list(times.under_way.items())
        ]
        return Heartbeat(self.rows_done, steps)

    def process(self, task: Task) -> Done:
        """Do the task and commit it; the commit of an earlier attempt wins and is returned in its place."""
        times = StageTimes()
        self._under_way[id(times)] = task.shard.path, times
        try:
            return self._process(task, times)
        finally:
            del self._under_way[id(times)]

    def _process(self, task: Task, times: StageTimes) -> Done:
        copies = self.source if self.spec.options["copy"] else None
        with ShardWriter(self.directory, task.shard, copies, score_columns_only=self.source is None) as writer:
            if task.op == "embed":
                report, more = self._embed(task, writer, times)
            else:
                with times.step("decide", counted=False):
                    report, more = self._decide(task, writer)
            of_worker = WorkerDetails(
                seconds={name: round(value, 4) for name, value in report.seconds.items()},
                attempt=task.attempt,
                isolated=task.isolated,
                batch_halvings=report.batch_halvings,
                encoder_waited=round(report.encoder_waited, 4),
                backend=self.encoder.fingerprint.get("backend"),
            )
            stage, generation = self._stage(task), task.generation
            commit, created = writer.commit(
                report, stage=stage, plan=task.plan_sha256, generation=generation, of_worker=of_worker, **more
            )
        return Done(commit, created)

    def close(self) -> None:
        for decoder in self._decoders.values():
            decoder.close()
        self.directory.clean_scratch(stale_only=False)

    def _decoder(self, how: defaults.DecodeIn) -> Decoder:
        """One for all tasks, made when it is first needed."""
        with self._progress:
            if how not in self._decoders:
                options = self.spec.options
                settings = DecodeSettings(
                    self.encoder.preprocess, options["decode"], options["max_pixels"], options.get("color", "ignore")
                )
                kind = ThreadDecoder if how == "threads" else ProcessDecoder
                self._decoders[how] = kind(settings, self.spec.threads, self.spec.decode_timeout)
            return self._decoders[how]

    def _on_torch_thread(self, target: Any, *methods: str) -> Any:
        return _OnThread(target, methods, self._torch_thread)

    def _stage(self, task: Task) -> str:
        if task.op == "score" or (task.op == "embed" and self.policy and self.policy.dataset_rules):
            return "scored"
        return FINAL_STAGE[self.spec.job]

    def _embed(self, task: Task, writer: ShardWriter, times: StageTimes) -> tuple[ShardReport, dict[str, Any]]:
        """The report, and what else the commit says: nothing."""
        assert self.source is not None
        options = self.spec.options
        # What a server or a network raises may pass: only a second failure is a row's.
        patient = task.attempt > 1 or is_local(self.source.url)
        reader = PatientReader(self.source, task.shard) if patient else self.source.read(task.shard)
        with contextlib.ExitStack() as stack:
            decoder = self._decoder("processes" if task.isolated else self.spec.decode_in)
            # On a GPU decoding runs two batches ahead, and begins while an earlier shard still has the encoder. On a
            # CPU the cores are the encoder's too, and taking turns is faster than competing (docs/decisions/0003): only
            # reading runs ahead.
            ahead = 2 if self.spec.device.startswith("cuda") else 0
            size, keep_row = self.encoder.preprocess.size, _sampler(options["sample"])
            batches = stack.enter_context(
                decoded_ahead(reader, decoder, size, options["batch_size"], times, ahead, keep_row, task.row_cap)
            )
            report = process_shard(
                batches,
                self.encoder,
                self.policy,
                writer,
                shard=task.shard.id,
                source_schema=self.source.schema,
                text=self.spec.text,
                captions=options["captions"],
                turn=self._encoder_turn,
                times=times,
                on_batch=self._count,
                labels=self.labels,
            )
        stats = reader.stats
        stats.seen.judged(report.counts.rows)
        counts = Counts(
            **report.counts,
            not_downloaded=stats.not_downloaded,
            duplicate_keys=stats.duplicate_keys,
            clashes=stats.clashes,
            misfits=stats.misfits,
        )
        report = replace(report, damaged=stats.damaged, bytes_unread=stats.bytes_unread)
        return replace(report, counts=counts, seen=stats.seen), {}

    def _decide(self, task: Task, writer: ShardWriter) -> tuple[ShardReport, dict[str, Any]]:
        """The report, and what else the commit says: what was decided with which thresholds, and files it names again."""
        assert task.inputs is not None
        origin, commit = Directory(task.inputs.run), task.inputs.commit
        same_run = origin.url == self.directory.url
        failed_file, rows_file = commit.files.failed, commit.files.scored if same_run else commit.files.annotated
        with origin:
            failed = read_table(origin, failed_file) if failed_file else FAILED.empty_table()
            if rows_file is None:
                none = dict.fromkeys(("embedded", "decided", *DECISIONS), 0)
                counts = Counts(rows=failed.num_rows, failed=failed.num_rows, **none)
                report = ShardReport(counts, commit.failed_by_class)
            else:
                rows, embeddings = read_tables((origin, rows_file), (origin, embeddings_of(commit, origin.url)))
                scored_only = task.op == "score" or self.spec.job == "score"
                report = decide_shard(
                    rows, embeddings, failed, self.encoder, self.policy, None if scored_only else task.thresholds or {},
                    writer, copy=same_run and self.spec.options["copy"], final=task.op == "decide", labels=self.labels,
                )  # fmt: skip
        if not same_run and task.op == "decide":
            writer.failed(failed)
        self._count(report.counts.rows)
        report = replace(
            report,
            counts=Counts(report.counts | commit.counts.of_source()),
            captions_truncated=commit.captions_truncated,
            damaged=commit.damaged,
            bytes_unread=commit.bytes_unread,
            seen=commit.seen,
        )
        return report, {
            "carried": commit.files.only("embeddings", "failed") if same_run else None,
            "base_generation": commit.generation,
            "thresholds": task.thresholds or None,
            "base": None if same_run else Base(origin.url, commit.name),
        }

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
