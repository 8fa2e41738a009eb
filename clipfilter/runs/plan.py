"""The plan of a run: everything that decides its result, written first and create-only (`OUT/plan.json`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from clipfilter.errors import RefusedError
from clipfilter.runs.records import check_keys
from clipfilter.storage import Directory, same_place
from clipfilter.version import __version__

PLAN_FILE = "plan.json"
FORMAT = 1

Job = Literal["run", "embed", "score", "filter", "import", "curate"]


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: the same value always gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Plan:
    """What is to be done, in JSON terms. Two plans with the same `sha256` give the same result.

    source     : `Source.to_plan()`; of a job on a run (`of_run`), `{"run": URL, "version": NAME, "source": ...}`.
    policy     : the resolved policy (`Policy.canonical()`), None for `embed` and `score`.
    model      : the encoder's fingerprint.
    options    : decode mode, batch size, captions, pixel limit, limit, sample, and the columns of a `score` (labels,
                 scores): all that can change a number.
    text_column: whether caption embeddings are stored.
    """

    job: Job
    source: dict[str, Any]
    policy: dict[str, Any] | None
    policy_sha256: str | None
    model: dict[str, Any]
    options: dict[str, Any]
    text_column: bool
    format: int = FORMAT
    created_by: str = field(default=f"clipfilter {__version__}", compare=False)

    def identity(self) -> dict[str, Any]:
        """The plan without who wrote it."""
        value = asdict(self)
        del value["created_by"]
        return value

    @property
    def sha256(self) -> str:
        return hashlib.sha256(canonical_json(self.identity())).hexdigest()

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self) | {"sha256": self.sha256}, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_json(value: Any, where: str) -> Plan:
        """Raises RefusedError for keys that a plan has not; `where` names its file."""
        known = [item.name for item in fields(Plan)]
        found = check_keys(value, where, [*known, "sha256"])
        return Plan(**{name: found[name] for name in known})

    @property
    def dataset(self) -> dict[str, Any]:
        """The plan of the dataset of images behind the run (`Source.from_plan` opens it), whatever was decided since."""
        source = self.source
        while of_run(source):
            source = source["source"]
        return source


def of_run(source: dict[str, Any]) -> bool:
    """Whether a plan's source is a run whose stored embeddings are used again, rather than a dataset of images."""
    return "run" in source


def read_plan(directory: Directory) -> Plan | None:
    """The plan of a run directory, None where there is none yet.

    Raises RefusedError for a directory written by another format of clipfilter.
    """
    if not directory.exists(PLAN_FILE):
        return None
    value = directory.read_json(PLAN_FILE)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RefusedError(
            f"{directory.url} was written by {value.get('created_by', 'another program')} in a format this version does "
            "not read; use that version, or another --out."
        )
    return Plan.from_json(value, f"{directory.url}/{PLAN_FILE}")


def settle_plan(directory: Directory, plan: Plan) -> Plan:
    """Write the plan, or accept an equal one that is already there.

    Raises RefusedError naming what differs when the directory belongs to another plan.
    """
    if directory.create(PLAN_FILE, plan.to_bytes()):
        return plan
    existing = read_plan(directory)
    assert existing is not None
    refuse_if_different(directory.url, existing.identity(), plan.identity())
    return existing


def refuse_if_different(url: str, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise RefusedError when two plans (or the same parts of two plans) are not equal."""
    different = list(_differences(existing, wanted))
    if different:
        shown = "; ".join(different[:3]) + (f"; and {len(different) - 3} more" if len(different) > 3 else "")
        raise RefusedError(
            f"{url} already holds a run with another plan ({shown}); choose another --out, or repeat the first command."
        )


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(set(old) | set(new)):
            found += _differences(old.get(name), new.get(name), f"{where}.{name}" if where else name)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [difference for at, pair in pairs for difference in _differences(*pair, f"{where}.{at}")]
    if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True) or _same_place(where, old, new):
        return []
    return [f"{where} was {_short(old)}, now {_short(new)}"]


def _same_place(where: str, old: Any, new: Any) -> bool:
    """Whether two values of a plan are one place, spelled differently. A source's `url` is as it was given (perhaps relative
    to a folder that was left since), and `root` and `pattern` beside it say what it meant."""
    name = where.rpartition(".")[2]
    if not where.startswith(("source.", "options.curation.")):
        return False
    if name == "url":
        return True
    return name in ("root", "run") and isinstance(old, str) and isinstance(new, str) and same_place(old, new)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
