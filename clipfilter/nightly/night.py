"""One night: process what is new, append it to the dataset, compare it with the nights before, alert, remember."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clipfilter.engine import (
    EXIT_DONE,
    EXIT_FAILURES,
    Display,
    JobPlan,
    JobRequest,
    plan_overview,
    refuse_foreign_directory,
    resolve,
    run_plan,
)
from clipfilter.errors import RefusedError
from clipfilter.nightly import record
from clipfilter.nightly.alerts import Alert, check_webhook, send
from clipfilter.nightly.arrivals import Appending, Arrivals, Base, Missing, find_arrivals, refuse_refit, state_of
from clipfilter.nightly.drift import Drift, compare_nights, distributions
from clipfilter.runs import COUNTS, Totals, ledger
from clipfilter.storage import Directory

log = logging.getLogger("clipfilter.nightly")

#: The order of keys in a version that only drops rows.
_DROPPED = ("version", "plan", "stage", "thresholds")
_NAMED = 3  # how many rules, files or nights a message names


@dataclass(frozen=True)
class NightRequest:
    """What a night is told.

    job: a `run` (with a policy) or a `score`. missing: what becomes of rows whose file is gone from the source. refit:
    compute the numbers of dataset-level rules anew and decide all rows again. silence_nights: so many nights without
    anything new are an alert. window: how many earlier nights with rows tonight is compared with. webhook: where alerts go.
    """

    job: JobRequest
    missing: Missing = "keep"
    refit: bool = False
    silence_nights: int = 2
    window: int = 14
    webhook: str | None = None


@dataclass
class NightResult:
    """What a night did. outcome: "done", or "unchanged" when nothing was new. counts: rows of tonight's arrivals.

    version, totals: the dataset as it is now. exit_code: 3 when there is an alert.
    """

    out: str
    night: int
    outcome: str
    version: str
    shards: dict[str, int]
    counts: dict[str, Any]
    totals: Totals
    drift: list[Drift]
    alerts: list[Alert]
    seconds: float
    exit_code: int
    messages: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "drift": [asdict(item) | {"alarm": item.alarm} for item in self.drift]}


def run_night(request: NightRequest, display: Display | None = None) -> NightResult:
    """Run one night to its end. Repeating it after a crash resumes; two at once share the work.

    Raises RefusedError before any work when the request cannot be done. Whatever else goes wrong is recorded and alerted,
    then raised again.
    """
    _check(request)
    began = time.time()
    try:
        job = _resolve(request)
        refuse_foreign_directory(job.directory)
    except Exception as error:
        _tell_of_failure(request, request.job.out, None, error)
        raise
    directory = job.directory
    number = record.begin(directory, began)
    killed = record.close_killed(directory, number)
    try:
        return _night(request, job, number, killed, began, display)
    except BaseException as error:
        _tell_of_failure(request, directory.url, number, error)
        failure = {"kind": "failure", "message": _reason(error), "details": {}}
        times = {"started": record.stamp(began), "seconds": round(time.time() - began, 3)}
        record.finish(
            directory, {"night": number, **times, "outcome": "failed", "error": _reason(error), "alerts": [failure]}
        )
        raise
    finally:
        directory.clean_scratch(stale_only=False)


def _check(request: NightRequest) -> None:
    check_webhook(request.webhook)
    if request.silence_nights < 1 or request.window < 1:
        raise RefusedError("silence and window are numbers of nights, 1 or more.")


def _tell_of_failure(request: NightRequest, run: str, number: int | None, error: BaseException) -> None:
    if request.webhook is not None:
        send(request.webhook, run, number, [Alert("failure", f"the night failed: {_reason(error)}")], {})


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")[:500]


def _resolve(request: NightRequest) -> JobPlan:
    """The job of the night. Raises RefusedError where it cannot be done, or does not read a dataset."""
    job = resolve(request.job)
    if job.source is None:
        raise RefusedError(f"{request.job.source} is a run directory; a night needs the dataset that grows.")
    return job


def find_tonight(request: NightRequest, job: JobPlan) -> tuple[Base, Arrivals]:
    """The newest version, and how the source differs from it. Raises RefusedError where a refit is not possible."""
    base = Base.read(job.directory)
    arrivals = find_arrivals(base, job.dataset.iter_shards(), retry_failed=request.job.retry_failed)
    if request.refit:
        refuse_refit(base, arrivals, job.policy, copies=request.job.copy, missing=request.missing)
    return base, arrivals


def night_overview(request: NightRequest) -> dict[str, Any]:
    """What `--dry-run` shows: the request checked, the model loaded, what is new; nothing started or written."""
    return {**plan_overview(request.job), **arrivals_overview(request)[0]}


def arrivals_overview(request: NightRequest) -> tuple[dict[str, Any], Arrivals]:
    """How the source differs from the newest version: shards by kind, and the version they would be added to."""
    _check(request)
    base, arrivals = find_tonight(request, _resolve(request))
    shown = {name: getattr(arrivals, name) for name in ("new", "changed", "again", "set_aside")}
    shown["vanished"] = len(arrivals.vanished)
    return {"version": base.version.name if base.version else None, **shown}, arrivals


def _night(
    request: NightRequest,
    job: JobPlan,
    number: int,
    killed: list[int],
    began: float,
    display: Display | None,
) -> NightResult:
    directory = job.directory
    base, arrivals = find_tonight(request, job)
    growth = Appending(directory, base, arrivals, request.missing, request.refit)
    version, messages = _append(request, job, base, growth, display)
    totals = ledger.read_version(directory, version).totals

    shards = {name: getattr(arrivals, name) for name in ("new", "changed", "again", "set_aside")}
    shards |= {"vanished": len(arrivals.vanished), "failed": len(growth.failed)}
    counts, files = _tonight(directory, growth.added)
    mine = {"counts": counts, "scores": distributions(directory, files)}
    alerts = _oddities(request, killed, arrivals) + _failures(request, base, growth, counts)
    if not totals.rows:
        alerts.append(Alert("failure", totals.without_rows))
    drift = compare_nights(_reference(directory, number, request.window), mine)
    alerts += _drifted(drift)
    alerts += _silence(directory, request, number, arrivals)
    seconds = time.time() - began
    outcome = "unchanged" if base.version and version == base.version.name else "done"
    told = _tell(request, directory, number, version, counts, alerts)
    record.finish(
        directory,
        {
            "night": number,
            "started": record.stamp(began),
            "seconds": round(seconds, 3),
            "outcome": outcome,
            "version": version,
            "refit": request.refit,
            "shards": shards,
            **mine,
            "totals": totals,
            "drift": [asdict(item) for item in drift],
            "alerts": [asdict(alert) for alert in alerts],
            "told": told,
        },
    )
    if alerts and request.webhook and not told:
        messages.append("the webhook did not take the alerts; see run.log")
    code = EXIT_FAILURES if alerts else EXIT_DONE
    return NightResult(
        directory.url, number, outcome, version, shards, counts, totals, drift, alerts, seconds, code, messages
    )


def _append(
    request: NightRequest, job: JobPlan, base: Base, growth: Appending, display: Display | None
) -> tuple[str, list[str]]:
    """Process what is new, or drop what is gone: the name of the newest version, and sentences for the person."""
    arrivals = growth.arrivals
    if arrivals.units or request.refit or base.version is None:
        result = run_plan(job, display, growth=growth)
        return result.version, result.messages
    if request.missing == "drop" and arrivals.vanished and arrivals.listed:
        return growth.version(replace(base.version, commits=[], rolled_back_to=None, order=_DROPPED)).name, []
    return base.version.name, []


def _tonight(directory: Directory, added: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Sums over the commits of tonight's arrivals, and their annotated files."""
    counts: Counter[str] = Counter()
    classes: Counter[str] = Counter()
    files = []
    damaged = []
    for commit in ledger.commits(directory, added):
        counts.update({name: commit.counts.get(name, 0) for name in COUNTS})
        classes.update(commit.failed_by_class)
        if commit.damaged:
            damaged.append(commit.shard.path)
        if commit.files.annotated is not None:
            files.append(commit.files.annotated.name)
    return {**counts, "failed_by_class": dict(sorted(classes.items())), "damaged": damaged}, files


def _oddities(request: NightRequest, killed: list[int], arrivals: Arrivals) -> list[Alert]:
    """What was odd before any row was looked at: nights that were killed, a source without anything."""
    alerts = []
    if killed:
        nights = ", ".join(map(str, killed[-_NAMED:]))
        alerts.append(Alert("failure", f"night {nights} never finished; this one took over", {"nights": killed}))
    if request.missing == "drop" and arrivals.vanished and not arrivals.listed:
        alerts.append(Alert("failure", "the source lists nothing at all; no rows were dropped from the dataset"))
    return alerts


def _failures(request: NightRequest, base: Base, growth: Appending, counts: dict[str, Any]) -> list[Alert]:
    """New trouble only: a shard that failed last night in the same state has been told already."""
    alerts = []
    known = {state_of(item.shard) for item in base.version.failed_shards} if base.version else set()
    broken = [item for item in growth.failed if state_of(item.shard) not in known]
    if broken:
        first = broken[0]
        alerts.append(
            Alert(
                "failure",
                f"{len(broken)} shard(s) could not be processed; the first is {first.shard.path}: {first.error}",
                {"shards": [item.shard.path for item in broken]},
            )
        )
    if counts["damaged"]:
        named = ", ".join(counts["damaged"][:_NAMED])
        alerts.append(
            Alert("failure", f"{len(counts['damaged'])} file(s) are damaged: {named}", {"shards": counts["damaged"]})
        )
    rows, failed = counts.get("rows", 0), counts.get("failed", 0)
    if rows and failed > request.job.max_failures * rows:
        classes = counts["failed_by_class"]
        alerts.append(
            Alert(
                "failure",
                f"{failed:,} of tonight's {rows:,} rows failed, more than {request.job.max_failures:.1%}",
                {"failed": failed, "rows": rows, "failed_by_class": classes},
            )
        )
    return alerts


def _reference(directory: Directory, number: int, window: int) -> list[dict[str, Any]]:
    """The nights to compare with: the last ones with rows, without those that drifted (unless accepted, which starts the
    series anew) and those that a rollback took back."""
    chosen: list[dict[str, Any]] = []
    oldest_ok = record.accepted(directory)
    taken_back: set[int] = set()
    for night in record.backwards(directory, number):
        if night["night"] < oldest_ok or len(chosen) == window:
            break
        if night["outcome"] == "rollback":
            taken_back |= set(range(night["to"] + 1, night["from"] + 1))
        if night["outcome"] != "done" or not night["counts"].get("rows") or int(night["version"]) in taken_back:
            continue
        drifted = any(alert["kind"] == "drift" for alert in night["alerts"])
        if not drifted or night["night"] == oldest_ok:
            chosen.append(night)
    return chosen


def _drifted(drift: list[Drift]) -> list[Alert]:
    moved = sorted((item for item in drift if item.alarm), key=lambda item: item.limit - item.psi)
    if not moved:
        return []
    named = ", ".join(f"{item.of} (PSI {item.psi:.2f}, limit {item.limit:.2f})" for item in moved[:_NAMED])
    more = f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else ""
    return [
        Alert(
            "drift",
            f"tonight's {moved[0].m:,} rows are unlike those of the nights before: {named}{more}",
            {"drift": [asdict(item) for item in moved]},
        )
    ]


def _silence(directory: Directory, request: NightRequest, number: int, arrivals: Arrivals) -> list[Alert]:
    if arrivals.fresh:
        return []
    silent = 1
    for night in record.backwards(directory, number):
        if night["outcome"] not in record.LOOKED:
            continue
        if night["shards"]["new"] + night["shards"]["changed"] or silent >= request.silence_nights:
            break
        silent += 1
    if silent < request.silence_nights:
        return []
    return [Alert("silence", f"nothing new in the source for {silent} night(s)", {"nights": silent})]


def _tell(
    request: NightRequest, directory: Directory, number: int, version: str, counts: dict[str, Any], alerts: list[Alert]
) -> bool:
    """Send the alerts; whether they were taken. Without a webhook the exit code has to do."""
    if not alerts or request.webhook is None:
        return False
    problem = send(request.webhook, directory.url, number, alerts, {"version": version, "counts": counts})
    if problem is not None:
        log.warning("the webhook did not take the alerts: %s", problem)
    return problem is None
