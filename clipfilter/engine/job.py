"""One job from request to version: `run`, `embed`, `score` and `filter` are this function with different plans."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from clipfilter import defaults
from clipfilter.engine.driver import Display, StageResult, StageRun, Unit, fix_thresholds, run_units, source_units
from clipfilter.engine.executors.interface import Executor, Resources
from clipfilter.engine.hardware import gpu_count
from clipfilter.engine.worker import JobSpec
from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, attachments, load_policy
from clipfilter.runs import (
    FINAL_STAGE,
    PLAN_FILE,
    FailedShard,
    Job,
    Plan,
    Run,
    Thresholds,
    Totals,
    Version,
    is_run,
    ledger,
    of_run,
    read_plan,
    refuse_if_different,
    settle_plan,
)
from clipfilter.sources import Source, SourceOptions, holds, open_source
from clipfilter.storage import Directory, is_within, normalise, same_place

if TYPE_CHECKING:
    from clipfilter.policies import LabelSet

log = logging.getLogger("clipfilter.engine")

#: Enough for any camera, far below a decompression bomb (Pillow's own limit).
DEFAULT_BATCH_SIZE = {"cpu": 64, "cuda": 256}
DEFAULT_DTYPE: dict[str, Any] = {"cpu": "fp32", "cuda": "bf16"}


EXIT_DONE, EXIT_CRASH, EXIT_REFUSED, EXIT_FAILURES = 0, 1, 2, 3


@dataclass(frozen=True)
class JobRequest:
    """Everything a person can ask of a job; None means "the default, or what the plan already says".

    source: dataset to read (run, embed, score) or the run directory to use again (filter, score).
    policy: file, pack or policy; of a score the columns to add.
    labels: adds the columns of zero-shot labels (score).
    model: None is nano; for a filter, the model that the run recorded.
    max_failures: share of rows that may fail before the exit code says so.
    """

    job: Job
    source: str
    out: str
    policy: str | Policy | None = None
    labels: LabelSet | None = None
    model: str | None = None
    engine: str = defaults.ENGINE
    address: str | None = None
    workers: int | None = None
    threads: int | None = None
    device: str = defaults.DEVICE
    dtype: defaults.Dtype | None = None
    compile_model: bool = False
    batch_size: int | None = None
    decode: str = defaults.DECODE
    color: str = defaults.COLOR
    decode_in: defaults.DecodeIn = defaults.DECODE_IN
    decode_timeout: float = defaults.DECODE_TIMEOUT
    max_pixels: int = defaults.MAX_PIXELS
    captions: str = defaults.CAPTIONS
    source_options: SourceOptions = field(default_factory=SourceOptions)
    limit: int | None = None
    sample: float | None = None
    copy: bool = True
    retry_failed: bool = False
    max_failures: float = defaults.MAX_FAILURES


@dataclass(frozen=True)
class JobResult:
    """What a finished job reports; `totals` are those of its version."""

    out: str
    version: str
    plan: Plan
    totals: Totals
    failed_shards: list[FailedShard]
    seconds: float
    startup_seconds: float
    rows_processed: int
    engine: str
    exit_code: int
    messages: list[str]


class Growth(Protocol):
    """How a job adds to the dataset in its directory instead of making it anew (clipfilter/nightly)."""

    def units(self, source: Source) -> Iterator[Unit]:
        """The shards to embed."""

    def scored(self, policy: Policy, scored: StageResult) -> tuple[Thresholds, Iterator[Unit]]:
        """The numbers of dataset-level rules, and the shards to decide with them."""

    def version(self, made: Version) -> Version:
        """Write the version that the one made of these shards alone leads to."""


@dataclass(frozen=True)
class JobPlan:
    """A request resolved, once, against its source, policy and output directory, before anything is started.

    source, base: the dataset to read, or the run whose embeddings are used again; one of them is None. existing: the plan
    that the directory has. text: whether captions are embedded. What depends on the device is asked for with it.
    """

    request: JobRequest
    directory: Directory
    source: Source | None
    base: Run | None
    policy: Policy | None
    existing: Plan | None
    model: str
    text: bool

    @property
    def dataset(self) -> Source:
        """The images, those behind a run too."""
        if self.base is not None:
            return Source.from_plan(self.base.dataset)
        assert self.source is not None
        return self.source

    @property
    def input(self) -> dict[str, Any]:
        """What the run's plan says of its source."""
        base = self.base
        if base is None:
            return self.dataset.to_plan()
        plan = base.plan
        return {"run": base.url, "version": base.version.name, "plan_sha256": plan.sha256, "source": plan.source}

    @property
    def decode(self) -> str:
        """How the images are (or were) decoded."""
        return self.request.decode if self.base is None else str(self.base.plan.options["decode"])

    def options(self, device: str) -> dict[str, Any]:
        """The run's options: what was asked for, else what its plan says, else the device's default."""
        request = self.request
        columns: dict[str, Any] = {} if request.labels is None else {"labels": request.labels.to_json()}
        if request.job == "score" and self.policy is not None:
            columns["scores"] = self.policy.canonical()
        if self.base is not None:
            return {"copy": False, "decode": self.decode, **columns}
        old = self.existing.options if self.existing else {}
        return {
            "decode": request.decode,
            # Plans of before this choice have no such key, and mean the same.
            **({"color": request.color} if request.color != "ignore" else {}),
            "batch_size": request.batch_size or old.get("batch_size") or DEFAULT_BATCH_SIZE[device],
            "captions": request.captions,
            "max_pixels": request.max_pixels,
            "limit": request.limit,
            "sample": request.sample,
            "copy": request.copy and request.job == "run",
            **columns,
        }

    def dtype(self, device: str) -> defaults.Dtype:
        """What the model computes in, by the same rule; of a run that is used again its own."""
        if self.base is not None:
            return cast(defaults.Dtype, self.base.plan.model.get("dtype", "fp32"))
        recorded = self.existing.model.get("dtype") if self.existing else None
        return cast(defaults.Dtype, self.request.dtype or recorded or DEFAULT_DTYPE[device])

    def spec(self, resources: Resources) -> JobSpec:
        """What every worker is told."""
        return JobSpec(
            job=self.request.job,
            out=self.directory.url,
            source=self.input,
            policy=self.policy.canonical() if self.policy else None,
            model=self.model,
            device=resources.device,
            dtype=self.dtype(resources.device),
            compile_model=self.request.compile_model,
            threads=resources.threads,
            options=self.options(resources.device),
            text=self.text,
            decode_in=self.request.decode_in,
            decode_timeout=self.request.decode_timeout,
        )

    def settled(self, device: str, fingerprint: dict[str, Any]) -> Plan:
        """The run's plan, once the model that was loaded has told its fingerprint."""
        deciding = self.policy if self.policy and self.policy.decides else None
        return Plan(
            job=self.request.job,
            source=self.input,
            policy=deciding.canonical() if deciding else None,
            policy_sha256=deciding.sha256 if deciding else None,
            model={name: value for name, value in fingerprint.items() if name != "backend"},
            options=self.options(device),
            text_column=self.text,
        )

    def checked(self, device: str, fingerprint: dict[str, Any]) -> Plan:
        """The same. Raises RefusedError where the model is not the one that embedded the images, or OUT holds another plan."""
        plan = self.settled(device, fingerprint)
        if self.base is not None:
            refuse_other_weights(self.base.plan, plan.model)
        if self.existing is not None:
            refuse_if_different(self.directory.url, self.existing.identity(), plan.identity())
        return plan

    def refuse_other(self) -> None:
        """Raise RefusedError where OUT holds another plan, as far as that can be told without loading the model."""
        existing = self.existing
        if existing is None:
            return
        old = existing.identity()
        # "nano" and "nano@1" may be the same weights, and so may a checkpoint that has moved; only loading tells, and
        # the plan that follows compares them.
        moved = _local_checkpoint(self.model) is not None
        same = moved or existing.model["model"].split("@")[0] == self.model.split("@")[0]
        wanted = self.settled("cpu", existing.model if same else existing.model | {"model": self.model}).identity()
        wanted |= {"policy": old["policy"], "format": old["format"]}
        if self.base is None and not self.request.batch_size:
            wanted["options"]["batch_size"] = old["options"].get("batch_size")
        refuse_if_different(self.directory.url, old, wanted)


def resolve(request: JobRequest) -> JobPlan:
    """Check all of a request that can be checked without a model. Raises RefusedError; writes nothing."""
    if request.sample is not None and not 0 < request.sample <= 1:
        raise RefusedError(f"--sample is a share of the rows, above 0 and at most 1, not {request.sample}.")
    if request.limit is not None and request.limit < 1:
        raise RefusedError(f"--limit is a number of rows, 1 or more, not {request.limit}.")
    policy = load_policy(request.policy) if isinstance(request.policy, str) else request.policy
    directory = Directory(request.out)
    if request.job == "filter" or (request.job == "score" and is_run(request.source)):
        base = _open_base(request, directory)
        model = _with_absolute_path(request.model) if request.model else stored_model(base.plan)
        plan = JobPlan(request, directory, None, base, policy, read_plan(directory), model, base.plan.text_column)
    else:
        _refuse_source(request, directory)
        existing = read_plan(directory)
        source = _open_source(request, existing)
        text = request.captions != "none" and source.has_captions is not False
        model = _with_absolute_path(request.model or defaults.MODEL)
        plan = JobPlan(request, directory, source, None, policy, existing, model, text)
    plan.refuse_other()
    return plan


def _open_base(request: JobRequest, directory: Directory) -> Run:
    """The run whose embeddings are used again. Raises RefusedError."""
    base = Run(request.source).origin()
    if request.limit is not None or request.sample is not None:
        raise RefusedError(f"{request.source} is a run, which is used whole; leave out --limit and --sample.")
    if same_place(directory.url, base.url):
        raise RefusedError(f"--out is the run itself ({directory.url}); name another directory for the new decision.")
    return base


def _refuse_source(request: JobRequest, directory: Directory) -> None:
    """Raise RefusedError where the source is, holds or lies in the output, or is a run."""
    if same_place(request.source, directory.url):
        raise RefusedError(f"--out is the source itself ({directory.url}); name another directory.")
    if holds(request.source, directory.url):
        raise RefusedError(
            f"--out {directory.url} lies inside the source, where its files would be read as data; name a directory outside it."
        )
    if is_within(request.source, directory.url):
        raise RefusedError(
            f"the source {request.source} lies inside --out {directory.url}, which is to hold nothing but the run; name "
            "another directory."
        )
    if is_run(request.source):
        raise RefusedError(
            f"{request.source} is a run directory; decide it again with `clipfilter filter`, or export it and use the export."
        )


def stored_model(plan: Plan) -> str:
    """The name that loads the model of a run again; RefusedError where only its user knows the path."""
    name = str(plan.model["model"])
    if _local_checkpoint(name) is None:
        return name
    raise RefusedError(
        f"the run was embedded with the local model {name}, and a run records no paths; say where it is with --model."
    )


def refuse_foreign_directory(directory: Directory, *, make: bool = True) -> None:
    """OUT must be new, empty, or a run; and writable. Raises RefusedError. make: or only look whether it could be made."""
    try:
        if directory.local and not make:
            _look_for_a_place(Path(directory.root))
        elif directory.local:
            Path(directory.root).mkdir(parents=True, exist_ok=True)
            directory.scratch()
        harmless = ("run.log", "nights", attachments.ATTACHMENTS_FOLDER)
        found = [n for n in directory.names("") if n not in harmless]
        if directory.exists(PLAN_FILE):  # asked last: another process may have begun the same run meanwhile
            found = []
    except (OSError, ImportError) as error:
        raise RefusedError(f"--out {directory.url} cannot be written ({error}); choose another place.") from error
    if found:
        raise RefusedError(
            f"--out {directory.url} holds other files ({', '.join(found[:3])}) and no run; choose a new or empty directory."
        )


def _look_for_a_place(folder: Path) -> None:
    """Raise OSError where a folder cannot be made, or not be written into."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} may not be written")


def _open_source(request: JobRequest, existing: Plan | None) -> Source:
    """The source; with the schema that the plan froze when this is a rerun of the same job."""
    if existing is not None and not of_run(existing.source):
        source = Source.from_plan(existing.source)
        if source.is_at(request.source) and source.options == request.source_options:
            return source
    return open_source(request.source, request.source_options)


def engine_of(request: JobRequest) -> str:
    """`auto` takes Ray when there is an address or more than one GPU, else worker processes on this machine."""
    if request.engine != "auto":
        return request.engine
    return "ray" if request.address or (request.device != "cpu" and gpu_count() > 1) else "local"


def choose_executor(request: JobRequest) -> Executor:
    """The executor of the request's engine (`engine_of`). Raises RefusedError where it cannot be had."""
    if engine_of(request) == "local":
        if request.address:
            raise RefusedError("--address needs a Ray cluster; leave out --engine local.")
        from clipfilter.engine.executors.local import LocalExecutor

        return LocalExecutor(request.workers, request.threads, request.device)
    from clipfilter.engine.executors.ray import RayExecutor

    executor = RayExecutor(request.address, request.workers, request.threads, request.device)
    executor.refuse_unshared(request.out, "--out")
    executor.refuse_unshared(request.source, "the source")
    checkpoint = _local_checkpoint(request.model or defaults.MODEL)
    if checkpoint is not None:
        executor.refuse_unshared(checkpoint, "the checkpoint")
    return executor


def _local_checkpoint(model: str) -> str | None:
    """The path in a model's name that each machine would have to have: after `=`, `onnx:`, `hf:` and `hf-hub:`."""
    if "=" in model:
        return model.split("=", 1)[1]
    kind, _, rest = model.partition(":")
    if kind == "onnx" or (kind in ("hf", "hf-hub") and Path(rest).exists()):
        return rest
    return None


def _with_absolute_path(model: str) -> str:
    """The name with its local path absolute: workers may have another working directory."""
    path = _local_checkpoint(model)
    return model if path is None else model.removesuffix(path) + normalise(path)


def run_job(request: JobRequest, display: Display | None = None, executor: Executor | None = None) -> JobResult:
    """Run a job to its end, or resume it; docs/reference/run-directory.md says what is written.

    executor: where the work runs, instead of what the request's `engine` says. Raises RefusedError before any work when
    the request cannot be done.
    """
    return run_plan(resolve(request), display, executor)


def run_plan(
    plan: JobPlan, display: Display | None = None, executor: Executor | None = None, growth: Growth | None = None
) -> JobResult:
    """`run_job` for a request that is resolved. growth: adds to the dataset in the directory."""
    began = time.monotonic()
    refuse_foreign_directory(plan.directory)
    executor = executor or choose_executor(plan.request)
    try:
        if plan.policy is not None:
            attachments.keep_copies(plan.directory, plan.policy.attachments)  # where every worker finds them
        with _log_file(plan.directory):
            return _run(plan, executor, display, growth, began)
    finally:
        executor.close()
        plan.directory.clean_scratch(stale_only=False)
        plan.directory.clean_scratch(stale_only=True)


def _run(job: JobPlan, executor: Executor, display: Display | None, growth: Growth | None, began: float) -> JobResult:
    request, directory = job.request, job.directory
    plan, warnings = _begin(job, executor)
    startup = time.monotonic() - began
    final, thresholds, processed = _stages(job, plan, executor, display, growth)
    # The failures of a filter are those of the run it decides, which were judged there.
    failed = (job.base.version.failed_shards if job.base else []) + final.failed
    listing = job.base.version.listing if job.base else job.dataset.listing
    made = Version.of(plan.sha256, FINAL_STAGE[request.job], final.commits, failed, thresholds, listing)
    version = growth.version(made) if growth else ledger.write_version(directory, made)
    log.info("version %s: %s", version.name, json.dumps(version.totals))
    exit_code, messages = _judge(version, 1.0 if job.base else request.max_failures)
    result = JobResult(
        out=directory.url,
        version=version.name,
        plan=plan,
        totals=version.totals,
        failed_shards=version.failed_shards,
        seconds=time.monotonic() - began,
        startup_seconds=startup,
        rows_processed=processed,
        engine=executor.name,
        exit_code=exit_code,
        messages=messages + warnings,
    )
    summary = {key: value for key, value in asdict(result).items() if key != "plan"}
    directory.replace("run.json", (json.dumps(summary, indent=1) + "\n").encode())
    return result


def _begin(job: JobPlan, executor: Executor) -> tuple[Plan, list[str]]:
    """Start the workers and write the plan: the plan, and what the workers warn of. Raises RefusedError."""
    directory, resources = job.directory, executor.resources()
    log.info("%s %s -> %s with %s on %s", job.request.job, job.request.source, directory.url, job.model, executor.name)
    description = executor.start(job.spec(resources))
    plan = job.checked(resources.device, description["fingerprint"])
    try:
        plan = settle_plan(directory, plan)
        if job.base is not None:
            job.base.record(directory.url)
    except OSError as error:
        raise RefusedError(f"--out {directory.url} cannot be written ({error}); choose another place.") from error
    directory.abort_stale_uploads()
    return plan, description["warnings"]


def _stages(
    job: JobPlan, plan: Plan, executor: Executor, display: Display | None, growth: Growth | None
) -> tuple[StageResult, Thresholds, int]:
    """One stage, or two with dataset-level rules; the final stage's result, thresholds, rows worked on."""
    request, directory, policy = job.request, job.directory, job.policy

    def units() -> Iterator[Unit]:
        if job.source is not None:
            return growth.units(job.source) if growth else source_units(job.source)
        assert job.base is not None
        return run_units(job.base.url, job.base.commits())

    def stage(op: str, name: str, items: Iterator[Unit], **more: Any) -> tuple[StageResult, int]:
        runner = StageRun(directory, plan, executor, op=op, stage=name, display=display, **more)
        found = runner.run(items)
        return found, sum(commit.counts.rows for commit in found.commits) - runner.progress.rows_reused

    final = FINAL_STAGE[request.job]
    retry = {"retry_failed": request.retry_failed, "limit": request.limit}
    if policy is None or not policy.dataset_thresholds:
        result, done = stage("embed" if job.source is not None else "decide", final, units(), **retry)
        return result, {}, done
    scored, done = stage("embed" if job.source is not None else "score", "scored", units(), **retry)
    if growth is not None:
        thresholds, again = growth.scored(policy, scored)
    else:
        thresholds = fix_thresholds(directory, policy, scored.commits)
        again = units() if job.source is None else run_units(directory.url, scored.commits)
    decided, done_again = stage("decide", final, again, thresholds=thresholds)
    decided.failed = scored.failed + decided.failed
    return decided, thresholds, max(done, done_again)


def refuse_other_weights(base: Plan, model: dict[str, Any]) -> None:
    """Texts must be encoded by the very model that embedded the images. model: a fingerprint."""
    for name in ("weights_sha256", "architecture"):
        if base.model.get(name) != model.get(name):
            raise RefusedError(
                f"the run was embedded with {base.model['model']} ({name} {str(base.model.get(name))[:12]}), but that name "
                f"now loads {str(model.get(name))[:12]}; embed again, or restore the weights."
            )


def _judge(version: Version, max_failures: float) -> tuple[int, list[str]]:
    """Exit code and sentences for the person: failures above the limit, failed or damaged shards."""
    totals, failed_shards = version.totals, version.failed_shards
    messages, exit_code = [], EXIT_DONE
    if not totals.rows and not failed_shards:
        messages.append(totals.without_rows)
        exit_code = EXIT_FAILURES
    if failed_shards:
        first = failed_shards[0]
        messages.append(
            f"{len(failed_shards)} shard(s) failed and are not in the result, their row count is unknown; the first is "
            f"{first.shard.path}: {first.error}. Repeat the command to try them again."
        )
        exit_code = EXIT_FAILURES
    if totals.rows and totals.failed > max_failures * totals.rows:
        messages.append(
            f"{totals.failed:,} of {totals.rows:,} rows failed, more than the limit of {max_failures:.1%} "
            "(--max-failures); see failed/ for the reasons."
        )
        exit_code = EXIT_FAILURES
    if totals.damaged_shards:
        messages.append(
            f"{totals.damaged_shards} shard(s) are damaged: {totals.bytes_unread:,} bytes could not be read, the rows "
            "before the damage were decided. Replace the files and repeat the command."
        )
        exit_code = EXIT_FAILURES
    if totals.profiles_ignored:
        messages.append(
            f"{totals.profiles_ignored:,} images have a colour profile that cannot be used; it was ignored."
        )
    if totals.captions_truncated:
        messages.append(f"{totals.captions_truncated:,} captions are longer than the model reads and were cut.")
    return exit_code, messages


class _LogFile(logging.FileHandler):
    """A log on a disk that may be full: a line that cannot be written is lost, and is no error of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextlib.contextmanager
def _log_file(directory: Directory) -> Iterator[None]:
    """Collect this package's log in OUT/run.log (appended on disks, replaced on object stores)."""
    logger = logging.getLogger("clipfilter")
    if directory.local:
        path = Path(directory.path("run.log"))
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path = Path(tempfile.mkstemp(prefix="clipfilter-", suffix=".log")[1])
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        logger.error("stopped: %s: %s", type(error).__name__, error)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with contextlib.suppress(OSError):
            handler.close()
        if not directory.local:
            with contextlib.suppress(Exception):
                directory.replace("run.log", path.read_bytes())
            path.unlink(missing_ok=True)
