"""One job from request to version: `run`, `embed`, `score` and `filter` are this function with different plans."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clipfilter import defaults
from clipfilter.engine.driver import Display, StageResult, StageRun, Unit, fix_thresholds, run_units, source_units
from clipfilter.engine.executors.interface import Executor
from clipfilter.engine.hardware import gpu_count
from clipfilter.engine.worker import JobSpec, compile_for
from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, attachments, load_policy
from clipfilter.runs import (
    PLAN_FILE,
    Job,
    Plan,
    is_run,
    ledger,
    of_run,
    open_run,
    read_plan,
    refuse_if_different,
    settle_plan,
)
from clipfilter.sources import Shard, Source, SourceOptions, open_source
from clipfilter.storage import Directory, normalise

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
    totals: dict[str, Any]
    failed_shards: list[dict[str, Any]]
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

    def scored(self, policy: Policy, scored: StageResult) -> tuple[dict[str, float | None], Iterator[Unit]]:
        """The numbers of dataset-level rules, and the shards to decide with them."""

    def version(self, content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Write the version that these shards lead to; its name and content."""


@dataclass
class Preparation:
    """A request checked against its source, policy and output directory, before anything is started."""

    request: JobRequest
    directory: Directory
    source: Source | None
    base: tuple[Directory, str, dict[str, Any], Plan] | None
    policy: Policy | None
    existing: Plan | None
    source_plan: dict[str, Any]
    text: bool
    model: str
    growth: Growth | None = None


def prepare(request: JobRequest) -> Preparation:
    """Check everything that can be checked without a model. Raises RefusedError; writes nothing."""
    if request.sample is not None and not 0 < request.sample <= 1:
        raise RefusedError(f"--sample is a share of the rows, above 0 and at most 1, not {request.sample}.")
    if request.limit is not None and request.limit < 1:
        raise RefusedError(f"--limit is a number of rows, 1 or more, not {request.limit}.")
    policy = load_policy(request.policy) if isinstance(request.policy, str) else request.policy
    directory = Directory(request.out)
    if request.job == "filter" or (request.job == "score" and is_run(request.source)):
        base = open_run(request.source)
        if request.limit is not None or request.sample is not None:
            raise RefusedError(f"{request.source} is a run, which is used whole; leave out --limit and --sample.")
        if directory.url == base[0].url:
            raise RefusedError(
                f"--out is the run itself ({directory.url}); name another directory for the new decision."
            )
        existing = read_plan(directory)
        plan = {"run": base[0].url, "version": base[1], "plan_sha256": base[3].sha256, "source": base[3].source}
        model = _with_absolute_path(request.model) if request.model else stored_model(base[3])
        return Preparation(request, directory, None, base, policy, existing, plan, base[3].text_column, model)
    if normalise(request.source) == directory.url:
        raise RefusedError(f"--out is the source itself ({directory.url}); name another directory.")
    if directory.url.startswith(normalise(request.source) + "/"):
        raise RefusedError(
            f"--out {directory.url} lies inside the source, where its files would be read as data; name a directory outside it."
        )
    if is_run(request.source):
        raise RefusedError(
            f"{request.source} is a run directory; decide it again with `clipfilter filter`, or export it and use the export."
        )
    existing = read_plan(directory)
    source = _open_source(request, existing)
    text = request.captions != "none" and source.has_captions is not False
    model = _with_absolute_path(request.model or defaults.MODEL)
    return Preparation(request, directory, source, None, policy, existing, source.to_plan(), text, model)


def stored_model(plan: Plan) -> str:
    """The name that loads the model of a run again; RefusedError where only its user knows the path."""
    name = str(plan.model["model"])
    if _local_checkpoint(name) is None:
        return name
    raise RefusedError(
        f"the run was embedded with the local model {name}, and a run records no paths; say where it is with --model."
    )


def _refuse_foreign_directory(directory: Directory) -> None:
    """OUT must be new, empty, or a run; and writable. Raises RefusedError."""
    try:
        if directory.local:
            Path(directory.root).mkdir(parents=True, exist_ok=True)
            directory.scratch()
        harmless = ("run.log", "nights", attachments.ATTACHMENTS_FOLDER)
        found = [] if directory.exists(PLAN_FILE) else [n for n in directory.names("") if n not in harmless]
    except (OSError, ImportError) as error:
        raise RefusedError(f"--out {directory.url} cannot be written ({error}); choose another place.") from error
    if found:
        raise RefusedError(
            f"--out {directory.url} holds other files ({', '.join(found[:3])}) and no run; choose a new or empty directory."
        )


def _open_source(request: JobRequest, existing: Plan | None) -> Source:
    """The source; with the schema that the plan froze when this is a rerun of the same job."""
    if existing is not None and not of_run(existing.source):
        source = Source.from_plan(existing.source)
        if source.url == normalise(request.source) and source.options == request.source_options:
            return source
    return open_source(request.source, request.source_options)


def choose_executor(request: JobRequest) -> Executor:
    """`auto` takes Ray when there is an address or more than one GPU, else worker processes on this machine."""
    engine = request.engine
    if engine == "auto":
        engine = "ray" if request.address or (request.device != "cpu" and gpu_count() > 1) else "local"
    if engine == "local":
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
    return run_prepared(prepare(request), display, executor)


def run_prepared(prepared: Preparation, display: Display | None = None, executor: Executor | None = None) -> JobResult:
    """`run_job` for a request that `prepare` has checked."""
    began = time.monotonic()
    refuse_other_work(prepared)
    executor = executor or choose_executor(prepared.request)
    try:
        return _run(prepared, executor, display, began)
    finally:
        executor.close()
        prepared.directory.clean_scratch(stale_only=False)
        prepared.directory.clean_scratch(stale_only=True)


def _options(prepared: Preparation, device: str) -> tuple[dict[str, Any], defaults.Dtype]:
    """The plan's options and the dtype: what was asked for, else what the plan says, else the device's default."""
    request, existing = prepared.request, prepared.existing
    old = existing.options if existing else {}
    columns: dict[str, Any] = {} if request.labels is None else {"labels": request.labels.to_json()}
    if request.job == "score" and prepared.policy is not None:
        columns["scores"] = prepared.policy.canonical()
    if prepared.base:
        base = prepared.base[3]
        return {"copy": False, "decode": base.options["decode"], **columns}, base.model.get("dtype", "fp32")
    options = {
        "decode": request.decode,
        "batch_size": request.batch_size or old.get("batch_size") or DEFAULT_BATCH_SIZE[device],
        "captions": request.captions,
        "max_pixels": request.max_pixels,
        "limit": request.limit,
        "sample": request.sample,
        "copy": request.copy and request.job == "run",
        **columns,
    }
    dtype = request.dtype or (existing.model.get("dtype") if existing else None) or DEFAULT_DTYPE[device]
    return options, dtype


def refuse_other_work(prepared: Preparation) -> None:
    """Raise RefusedError where OUT holds another plan or no run, as far as that goes without loading the model."""
    _refuse_other_plan(prepared)
    _refuse_foreign_directory(prepared.directory)


def _refuse_other_plan(prepared: Preparation) -> None:
    """Compare with the plan in OUT as far as that goes without loading the model."""
    existing = prepared.existing
    if existing is None:
        return
    old = existing.identity()
    options, _ = _options(prepared, "cpu")
    wanted = old | {
        "job": prepared.request.job,
        "source": prepared.source_plan,
        "policy_sha256": prepared.policy.sha256 if prepared.policy and prepared.policy.decides else None,
        "options": options | ({} if prepared.request.batch_size else {"batch_size": old["options"].get("batch_size")})
        if not prepared.base
        else options,
        "text_column": prepared.text,
    }
    # "nano" and "nano@1" may be the same weights, and so may a checkpoint that has moved; only loading tells, and the
    # plan that follows compares them.
    moved = _local_checkpoint(prepared.model) is not None
    if not moved and old["model"]["model"].split("@")[0] != prepared.model.split("@")[0]:
        wanted["model"] = old["model"] | {"model": prepared.model}
    refuse_if_different(prepared.directory.url, old, wanted)


def _run(prepared: Preparation, executor: Executor, display: Display | None, began: float) -> JobResult:
    request, directory = prepared.request, prepared.directory
    resources = executor.resources()
    options, dtype = _options(prepared, resources.device)
    policy = prepared.policy
    if policy is not None:
        attachments.keep_copies(directory, policy.attachments)  # where every worker finds them
    spec = JobSpec(
        job=request.job,
        out=directory.url,
        source=prepared.source_plan,
        policy=policy.canonical() if policy else None,
        model=prepared.model,
        device=resources.device,
        dtype=dtype,
        compile_model=request.compile_model,
        threads=resources.threads,
        options=options,
        text=prepared.text,
    )
    with _log_file(directory):
        log.info("%s %s -> %s with %s on %s", request.job, request.source, directory.url, spec.model, executor.name)
        description = executor.start(spec)
        plan = Plan(
            job=request.job,
            source=prepared.source_plan,
            policy=policy.canonical() if policy and policy.decides else None,
            policy_sha256=policy.sha256 if policy and policy.decides else None,
            model={name: value for name, value in description["fingerprint"].items() if name != "backend"},
            options=options,
            text_column=prepared.text,
        )
        if prepared.base:
            refuse_other_weights(prepared.base[3], plan.model)
        try:
            plan = settle_plan(directory, plan)
        except OSError as error:
            raise RefusedError(f"--out {directory.url} cannot be written ({error}); choose another place.") from error
        directory.abort_stale_uploads()
        startup = time.monotonic() - began
        final, thresholds, processed = _stages(prepared, plan, executor, display)
        version, totals, failed_shards = _write_version(prepared, plan, final, thresholds)
        log.info("version %s: %s", version, json.dumps(totals))
        # The failures of a filter are those of the run it decides, which were judged there.
        exit_code, messages = _judge(totals, failed_shards, 1.0 if prepared.base else request.max_failures)
        result = JobResult(
            out=directory.url,
            version=version,
            plan=plan,
            totals=totals,
            failed_shards=failed_shards,
            seconds=time.monotonic() - began,
            startup_seconds=startup,
            rows_processed=processed,
            engine=executor.name,
            exit_code=exit_code,
            messages=messages + description["warnings"],
        )
        summary = {key: value for key, value in asdict(result).items() if key != "plan"}
        directory.replace("run.json", (json.dumps(summary, indent=1) + "\n").encode())
    return result


def _stages(
    prepared: Preparation, plan: Plan, executor: Executor, display: Display | None
) -> tuple[StageResult, dict[str, float | None], int]:
    """One stage, or two with dataset-level rules; the final stage's result, thresholds, rows worked on."""
    request, directory = prepared.request, prepared.directory

    def units() -> Iterator[Unit]:
        if prepared.source is not None:
            return prepared.growth.units(prepared.source) if prepared.growth else source_units(prepared.source)
        assert prepared.base is not None
        run, _, version, _ = prepared.base
        return run_units(run, version["commits"], ledger.read_commits(run, version["commits"]))

    def stage(op: str, name: str, items: Iterator[Unit], **more: Any) -> tuple[StageResult, int]:
        runner = StageRun(directory, plan, executor, op=op, stage=name, display=display, **more)
        found = runner.run(items)
        done = sum(c["counts"]["rows"] for c in found.commits) - runner.progress.rows_reused
        return found, done

    final = ledger.FINAL_STAGE[request.job]
    retry = {"retry_failed": request.retry_failed, "limit": request.limit}
    first_op = "embed" if prepared.source is not None else "decide"
    policy = prepared.policy
    if policy is None or not policy.dataset_thresholds:
        result, done = stage(first_op, final, units(), **retry)
        return result, {}, done
    first_op = "embed" if prepared.source is not None else "score"
    scored, done = stage(first_op, "scored", units(), **retry)
    if prepared.growth is not None:
        thresholds, again = prepared.growth.scored(policy, scored)
    else:
        thresholds = fix_thresholds(directory, policy, scored.commits)
        again = units() if prepared.source is None else run_units(directory, scored.names, scored.commits)
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


def _write_version(
    prepared: Preparation, plan: Plan, final: StageResult, thresholds: dict[str, float | None]
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Make the final stage's commits a version of the dataset: its name, totals and failed shards."""
    failed_shards = final.failed
    if prepared.base:
        failed_shards = prepared.base[2]["failed_shards"] + failed_shards
    totals = ledger.totals_of(final.commits, failed_shards)
    content = {
        "plan": plan.sha256,
        "stage": ledger.FINAL_STAGE[prepared.request.job],
        "commits": final.names,
        "failed_shards": failed_shards,
        "thresholds": thresholds,
        "totals": totals,
    }
    if prepared.growth is not None:
        name, grown = prepared.growth.version(content)
        return name, grown["totals"], grown["failed_shards"]
    name, _ = ledger.write_version(prepared.directory, content)
    return name, totals, failed_shards


def _judge(totals: dict[str, Any], failed_shards: list[dict[str, Any]], max_failures: float) -> tuple[int, list[str]]:
    """Exit code and sentences for the person: failures above the limit, failed or damaged shards."""
    messages, exit_code = [], EXIT_DONE
    if failed_shards:
        first = failed_shards[0]
        messages.append(
            f"{len(failed_shards)} shard(s) failed and are not in the result, their row count is unknown; the first is "
            f"{first['shard']['path']}: {first['error']}. Repeat the command to try them again."
        )
        exit_code = EXIT_FAILURES
    if totals["rows"] and totals["failed"] > max_failures * totals["rows"]:
        messages.append(
            f"{totals['failed']:,} of {totals['rows']:,} rows failed, more than the limit of {max_failures:.1%} "
            "(--max-failures); see failed/ for the reasons."
        )
        exit_code = EXIT_FAILURES
    if totals["damaged_shards"]:
        messages.append(
            f"{totals['damaged_shards']} shard(s) are damaged: {totals['bytes_unread']:,} bytes could not be read, the rows "
            "before the damage were decided. Replace the files and repeat the command."
        )
        exit_code = EXIT_FAILURES
    if totals["captions_truncated"]:
        messages.append(f"{totals['captions_truncated']:,} captions are longer than the model reads and were cut.")
    return exit_code, messages


@contextlib.contextmanager
def _log_file(directory: Directory) -> Iterator[None]:
    """Collect this package's log in OUT/run.log (appended on disks, replaced on object stores)."""
    logger = logging.getLogger("clipfilter")
    if directory.local:
        path = Path(directory.path("run.log"))
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        path = Path(tempfile.mkstemp(prefix="clipfilter-", suffix=".log")[1])
    handler = logging.FileHandler(path, encoding="utf-8")
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
        handler.close()
        if not directory.local:
            with contextlib.suppress(Exception):
                directory.replace("run.log", path.read_bytes())
            path.unlink(missing_ok=True)


def plan_overview(request: JobRequest) -> dict[str, Any]:
    """What `--dry-run` shows: the request checked, the model loaded, the shards listed; nothing started or written."""
    from clipfilter.models import load_encoder

    prepared = prepare(request)
    _refuse_other_plan(prepared)
    if prepared.source is not None:
        source, decode = prepared.source, request.decode
        shards = list(source.iter_shards())
        kind = source.kind
    else:
        assert prepared.base is not None
        run, _, version, base = prepared.base
        source, decode = Source.from_plan(base.source), base.options["decode"]
        shards = [Shard.from_json(c["shard"]) for c in ledger.read_commits(run, version["commits"])]
        kind = "run"
    encoder = load_encoder(prepared.model, device="cpu" if request.device == "auto" else request.device)
    warnings: list[str] = []
    if prepared.policy is not None:
        warnings = list(compile_for(source, prepared.policy, encoder, decode).warnings)
    sizes = {shard.path: shard.size for shard in shards}
    return {
        "job": request.job,
        "source": request.source,
        "kind": kind,
        "shards": len(shards),
        "bytes": sum(sizes.values()),
        "out": prepared.directory.url,
        "resumes": prepared.existing is not None,
        "policy": f"{prepared.policy.name} version {prepared.policy.version}" if prepared.policy else None,
        "rules": [rule.id for rule in prepared.policy.rules] if prepared.policy else [],
        "model": prepared.model,
        "weights": encoder.fingerprint["weights_sha256"],
        "captions": prepared.text,
        "warnings": warnings,
    }
