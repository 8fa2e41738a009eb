"""What a night has to tell people: alerts, and the webhook that carries them."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from clipfilter.errors import RefusedError
from clipfilter.retry import retry

_SECONDS = 10
_WAIT_SECONDS = 1.0  # before the second attempt; three times as long before the third


@dataclass(frozen=True)
class Alert:
    """One reason to look: `message` for people, `details` for machines."""

    kind: Literal["drift", "failure", "silence"]
    message: str
    details: dict[str, Any] = field(default_factory=dict)


def check_webhook(url: str | None) -> None:
    """Raises RefusedError for an address that is not HTTP(S)."""
    if url is not None and not url.startswith(("http://", "https://")):
        raise RefusedError("the webhook must be an http:// or https:// address.")


def send(url: str, run: str, night: int | None, alerts: list[Alert], facts: dict[str, Any]) -> str | None:
    """POST the alerts as JSON; None when the server took them, else what went wrong.

    `text` is what chat services show; `run`, `night`, `alerts` and `facts` are for programs. The address is never part of
    the error: it usually is a secret.
    """
    text = f"clipfilter nightly {run}: " + "; ".join(alert.message for alert in alerts)
    body = {"text": text, "run": run, "night": night, "alerts": [asdict(alert) for alert in alerts], **facts}

    def post() -> None:
        request = urllib.request.Request(  # noqa: S310 (check_webhook lets only HTTP pass)
            url, json.dumps(body).encode(), {"Content-Type": "application/json", "User-Agent": "clipfilter"}
        )
        urllib.request.urlopen(request, timeout=_SECONDS).close()  # noqa: S310

    try:
        retry(post, (_WAIT_SECONDS, 3 * _WAIT_SECONDS), _may_pass)
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", None) or error or type(error).__name__)
    except (ValueError, http.client.HTTPException) as error:  # an address that cannot be one
        return type(error).__name__
    return None


def _may_pass(error: Exception, attempt: int) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code == 429
    return isinstance(error, OSError)
