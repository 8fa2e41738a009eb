"""`clipfilter policy test`: run the tests that a policy brings along."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter import defaults
from clipfilter.cli.options import Json, Model, Policy
from clipfilter.cli.printing import new_table, print_json, say, stdout

if TYPE_CHECKING:
    from clipfilter.operations import TestReport

#: As for jobs: everything was done, and too much of it failed.
FAILED = 3
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check(
    policy: Policy,
    model: Model = defaults.MODEL,
    images: Annotated[
        str | None, typer.Option(help="Folder that the tests' image paths start from [default: the policy's own].")
    ] = None,
    decode: Annotated[defaults.Decode, typer.Option(help="How images are decoded, as in `run`.")] = defaults.DECODE,
    junit: Annotated[str | None, typer.Option(help="Write the results as JUnit XML to this file, for CI.")] = None,
    as_json: Json = False,
) -> None:
    """Run a policy's own tests on their images and captions; exit code 3 when one fails."""
    from pathlib import Path

    from clipfilter.errors import RefusedError
    from clipfilter.models import load_encoder
    from clipfilter.operations import run_tests
    from clipfilter.policies import load_policy, policy_file

    loaded = load_policy(policy)
    folder = Path(images) if images is not None else policy_file(policy).parent
    if not folder.is_dir():
        raise RefusedError(f"--images {images} is no folder.")
    if junit is not None and not Path(junit).absolute().parent.is_dir():
        raise RefusedError(f"there is no folder for --junit {junit}.")
    report = run_tests(loaded, folder, load_encoder(model), decode=decode)
    if junit is not None:
        Path(junit).write_bytes(junit_xml(report))
    if as_json:
        print_json(report.to_json(), ascii_only=False)
    else:
        _print(report)
    if report.failed:
        raise typer.Exit(FAILED)


def _print(report: TestReport) -> None:
    from rich.text import Text

    from clipfilter import text

    console = stdout()
    tests = new_table("", "test", "expected", "decision", "", fold=True, pad_edge=False)
    for result in report.results:
        mark = Text("ok", "green") if result.passed else Text("FAILED", "bold red")
        name = text.clean(result.name, 60)
        caption = f" “{text.clean(result.caption, 60)}”" if result.caption and result.caption != result.name else ""
        problems = Text("; ".join(text.clean(problem, 300) for problem in result.problems), "red")
        tests.add_row(mark, Text.assemble(name, (caption, "dim")), result.expected, result.decision, problems)
    console.print(tests)
    console.print()
    total = len(report.results)
    say(
        console,
        f"{report.policy} version {report.version} with {report.model}: {total - report.failed} of {total} tests pass",
        style="red" if report.failed else "green",
    )
    for note in report.notes:
        say(console, note, style="dim")


def junit_xml(report: TestReport) -> bytes:
    """The report as JUnit XML, one <testcase> for each test; UTF-8."""
    from xml.etree import ElementTree as ET

    def clean(value: str) -> str:
        return _NOT_XML.sub("�", value)

    suite = ET.Element(
        "testsuite",
        name=clean(f"{report.policy} version {report.version}"),
        tests=str(len(report.results)),
        failures=str(report.failed),
        errors="0",
    )
    properties = ET.SubElement(suite, "properties")
    for name, value in (("model", report.model), ("policy_sha256", report.sha256)):
        ET.SubElement(properties, "property", name=name, value=clean(value))
    for place, result in enumerate(report.results, 1):
        case = ET.SubElement(suite, "testcase", classname=clean(report.policy), name=clean(f"{place} {result.name}"))
        if not result.passed:
            problems = "; ".join(result.problems)
            failure = ET.SubElement(case, "failure", message=clean(problems))
            scores = [
                f"{rule}: {outcome.band}" + (f" {outcome.score:.6f}" if outcome.score is not None else "")
                for rule, outcome in result.rules.items()
            ]
            failure.text = clean("\n".join([f"expected {result.expected}", problems, *scores]))
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True))
