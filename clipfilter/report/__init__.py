"""The report: one self-contained HTML page about a finished run, to look at and to send on."""

from __future__ import annotations

from typing import Literal

Thumbnails = Literal["none", "blur", "show"]


def write_report(run_url: str, thumbnails: str = "blur") -> str:
    """Write OUT/report.html for the newest version of a run; returns its path or URL.

    thumbnails: "none" shows no picture and does not touch the source; "blur" shows kept rows clearly and blurs all
    others in their pixels; "show" shows everything clearly. Memory does not grow with the number of rows.
    Raises RefusedError when there is no finished run.
    """
    from clipfilter.errors import RefusedError
    from clipfilter.report.data import gather
    from clipfilter.report.examples import choose_examples
    from clipfilter.report.page import render
    from clipfilter.report.thumbnails import add_thumbnails
    from clipfilter.storage import Directory, join

    if thumbnails not in ("none", "blur", "show"):
        raise RefusedError(f"thumbnails are none, blur or show, not {thumbnails!r}.")
    directory = Directory(run_url)
    try:
        data = gather(directory)
        examples = choose_examples(directory, data)
        problem = None if thumbnails == "none" else add_thumbnails(examples, data.source, thumbnails)
        directory.replace("report.html", render(data, examples, thumbnails, problem).encode())
    finally:
        directory.clean_scratch(stale_only=False)
    return join(directory.url, "report.html")


__all__ = ["Thumbnails", "write_report"]
