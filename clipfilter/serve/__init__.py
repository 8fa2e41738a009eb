"""A local web page over a run: look, search, move thresholds, label; only the browser with the token sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipfilter import defaults
from clipfilter.faces import lazily

if TYPE_CHECKING:
    from clipfilter.serve.guard import is_loopback


from collections.abc import Callable


def serve(
    run: str,
    *,
    host: str = defaults.LOOPBACK,
    port: int = 0,
    labels: str | None = None,
    policy: str | None = None,
    model: str | None = None,
    ready: Callable[[str, str], None],
) -> None:
    """Serve a run until SIGINT or SIGTERM.

    port: 0 takes a free one. labels: the CSV file to write [default: RUN-labels.csv in the working directory]. policy: the
    file the run's policy came from, whose text the changed policy keeps. model: where the run's own model is, if it was a
    local one. ready: told the address with the token, and the labels file, once the page can be opened.

    Raises RefusedError where the run, the labels file, the policy or the port cannot be used.
    """
    import asyncio

    from clipfilter.serve.app import Server
    from clipfilter.serve.export import find_text
    from clipfilter.serve.labels import LabelFile
    from clipfilter.serve.run import ServedRun

    opened = ServedRun(run, model)
    try:
        text = find_text(opened.plan, policy) if opened.plan.policy is not None else None
        name = opened.url.rstrip("/").rsplit("/", 1)[-1] or "run"
        file = LabelFile(labels or f"{name}-labels.csv")
        try:

            async def main() -> None:
                await Server(opened, file, text, host).run(port, lambda address: ready(address, str(file.path)))

            asyncio.run(main())
        finally:
            file.close()
    finally:
        opened.close()


__all__ = [
    "is_loopback",
    "serve",
]


__getattr__ = lazily(__name__, {"is_loopback": "guard"})
