"""The report: one self-contained HTML page about a finished run, to look at and to send on."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from clipfilter import defaults
from clipfilter.faces import lazily

if TYPE_CHECKING:
    from clipfilter.report.audit import export_decisions
    from clipfilter.report.data import RuleData, floats, rules_of
    from clipfilter.report.diff import diff_page
    from clipfilter.report.explain import Explanation, explain_row, sentence, verdict
    from clipfilter.report.reproduce import policy_yaml
    from clipfilter.report.sheet import contact_sheet
    from clipfilter.report.thumbnails import jpeg_of


def write_report(run_url: str, thumbnails: str = defaults.THUMBNAILS) -> str:
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
    from clipfilter.runs import Run
    from clipfilter.storage import join

    if thumbnails not in get_args(defaults.Thumbnails):
        raise RefusedError(f"thumbnails are none, blur or show, not {thumbnails!r}.")
    run = Run.open(run_url)
    with run.directory:
        data = gather(run)
        examples = choose_examples(data)
        problem = None if thumbnails == "none" else add_thumbnails(examples, data.plan.dataset, thumbnails)
        run.directory.replace("report.html", render(data, examples, thumbnails, problem).encode())
    return join(run.url, "report.html")


__all__ = [
    "Explanation",
    "RuleData",
    "contact_sheet",
    "diff_page",
    "explain_row",
    "export_decisions",
    "floats",
    "jpeg_of",
    "policy_yaml",
    "rules_of",
    "sentence",
    "verdict",
    "write_report",
]

__getattr__ = lazily(
    __name__,
    {
        "Explanation": "explain",
        "RuleData": "data",
        "contact_sheet": "sheet",
        "diff_page": "diff",
        "explain_row": "explain",
        "export_decisions": "audit",
        "floats": "data",
        "jpeg_of": "thumbnails",
        "policy_yaml": "reproduce",
        "rules_of": "data",
        "sentence": "explain",
        "verdict": "explain",
    },
)
