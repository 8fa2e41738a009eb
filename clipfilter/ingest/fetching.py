"""One download: only where its owner allows it, within the limits of `egress`.

Runs inside img2dataset's download threads in place of its own `download_image`, which reads local files for `file:` URLs,
follows redirects into private networks, and waits and reads without limit.
"""

from __future__ import annotations

import http.client
import io
from typing import Any

from clipfilter import egress
from clipfilter.errors import hide

#: X-Robots-Tag directives that forbid it, as img2dataset has them.
OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex")
REFUSED, OPTED_OUT = "refused: ", "opted out: "


class Fetch:
    """Stands in for `img2dataset.downloader.download_image`: (key, stream or None, error or None)."""

    def __init__(self, limits: egress.Limits) -> None:
        self._limits = limits

    def __call__(
        self, row: tuple[Any, str], timeout: float, user_agent_token: str | None, disallowed_header_directives: Any
    ) -> tuple[Any, io.BytesIO | None, str | None]:
        key, url = row
        token = f"{user_agent_token}; " if user_agent_token else "img2dataset; "
        agent = f"Mozilla/5.0 (compatible; {token}+https://github.com/rom1504/img2dataset)"

        def accept(headers: Any) -> None:
            from img2dataset.downloader import is_disallowed

            robots = http.client.HTTPMessage()
            for value in headers.getall("X-Robots-Tag", ()):
                robots["X-Robots-Tag"] = value
            if is_disallowed(robots, user_agent_token, disallowed_header_directives or OPT_OUTS):
                raise _OptedOut("; ".join(robots.get_all("X-Robots-Tag", [])))

        try:
            return key, io.BytesIO(egress.get(url, self._limits, {"User-Agent": agent}, accept)), None
        except _OptedOut as error:
            return key, None, f"{OPTED_OUT}{error}"
        except egress.RefusedAddressError as error:
            return key, None, f"{REFUSED}{error}"
        except Exception as error:
            said = str(error) if isinstance(error, egress.FetchError) else f"{type(error).__name__}: {error}"
            return key, None, hide(said)[:300]


class _OptedOut(Exception):
    pass
