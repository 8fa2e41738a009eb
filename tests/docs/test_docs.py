"""The documentation is true: its commands print what it shows, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter import errors
from clipfilter.policies import load_policy
from clipfilter.runs import Plan, records
from clipfilter.runs.columns import DECISION_COLUMNS, FACTS, FAILED, IDENTITY
from tests.docs import cli_reference
from tests.docs.pages import REPO, WALKED, Block, anchors, blocks, links, pages, prepare, run, runs, shows, without


def identify(value: object) -> str:
    return str(value.relative_to(REPO)) if isinstance(value, Path) else repr(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path)
    return tmp_path


def execute(block: Block, folder: Path) -> None:
    done = run(block, folder)
    wanted = [0] * (len(done) - 1) + [int(block.markers.get("exit", 0))]
    for (command, code, output), expected in zip(done, wanted, strict=False):
        assert code == expected, f"{block.where}: `{command.text}` ended with {code}\n{output}"
        column = block.markers.get("varies", "")
        shown, printed = (
            without(column, lines) if column else lines for lines in (command.output, output.splitlines())
        )
        rest = iter(printed)
        for line in shown:
            known = line.strip() in ("", "...") or any(shows(line, one) for one in rest)  # goes on where it stopped
            assert known, f"{block.where}: `{command.text}` did not print (there)\n{line}\nbut\n{output}"


@pytest.mark.integration
@pytest.mark.parametrize("page", [page for page in pages() if runs(page) and page not in WALKED], ids=identify)
def test_what_a_page_shows_can_be_done(page: Path, folder: Path) -> None:
    """Every command of a page, top to bottom in one folder: its exit code, and its output with its numbers."""
    for block in runs(page):
        execute(block, folder)
    if page.name == "run-directory.md":
        everything_in_a_run_is_described(page.read_text(encoding="utf-8"), folder)


def everything_in_a_run_is_described(text: str, folder: Path) -> None:
    """Each file, column and JSON field of the runs that the page made has its place on the page, in backquotes."""
    described = set(re.findall(r"`([^`\n]+)`", text))
    found = [path.parent for path in folder.glob("*/plan.json")]
    assert found, "the page makes no run"
    for out in found:
        for path in out.iterdir():
            assert {path.name, path.name + "/"} & described, f"{path.name} is not described"
        names: set[str] = set()
        for path in [*out.glob("annotated/*"), *out.glob("failed/*"), *out.glob("scored/*")]:
            names |= set(pq.read_schema(path).names)
        for path in out.glob("embeddings/*"):
            names |= set(pa.ipc.open_file(pa.memory_map(str(path))).schema.names)
        ours = {"cf_score.<rule>" if name.startswith("cf_score.") else name for name in names if name.startswith("cf_")}
        assert ours <= described, f"columns not described: {ours - described}"
        for path in [out / "plan.json", *out.glob("commits/*"), *out.glob("versions/*"), out / "run.json"]:
            content = json.loads(path.read_text())
            fields = set(content) | set(content.get("counts", {})) | set(content.get("totals", {}))
            fields |= set(content.get("work", {})) | set(content.get("options", {}))
            assert fields <= described, f"{path.name}: not described: {fields - described}"


def test_few_blocks_are_exempt_and_each_says_why() -> None:
    exempt = [block for page in pages() for block in blocks(page) if "no-run" in block.markers]
    assert all(len(block.markers["no-run"]) > 5 for block in exempt)
    count = sum(len(runs(page)) for page in pages())
    assert len(exempt) < count / 4, f"{len(exempt)} blocks are exempt, {count} are run"


@pytest.mark.parametrize("page", WALKED, ids=identify)
def test_a_walked_page_is_walked(page: Path) -> None:
    walk = (REPO / WALKED[page]).read_text(encoding="utf-8")
    assert page.name in walk
    assert "execute(block, " in walk


def test_numbers_that_are_not_what_was_printed_are_seen() -> None:
    """Words and spacing of a line, its whole numbers, and its others to the last digit; not what depends on the machine."""
    assert shows("keep  47  48.5%  ██  0.412", "keep   47   48.6% ███  0.411")
    assert not shows("keep  47  48.5%", "keep  48  48.5%")
    assert not shows("keep  47  48.5%", "keep  47  48.7%")
    assert not shows("keep  47", "kept  47")
    assert shows("94 rows, 61 images/s, 1.5 s, 12.3 MB", "94 rows, 7 images/s, 22.0 s, 9 MB")
    assert not shows("94 rows, 61 images/s", "95 rows, 61 images/s")
    assert not shows("0.42", "0.4")
    assert shows("1 - cosine: 9e-08", "1 - cosine: 4e-08")
    assert not shows("1 - cosine: 9e-08", "1 - cosine: 9e-04")
    assert not shows("nano@2", "nano@3")
    table = ["night  seconds  rows", "1           52    81", "2                  6"]
    assert without("seconds", table) == ["night  seconds  rows", "1                 81", "2                  6"]


@pytest.mark.parametrize("page", pages(), ids=identify)
def test_every_link_leads_somewhere(page: Path) -> None:
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            assert target.startswith(("https://", "http://", "mailto:")), f"{page.name}:{line}: {target}"
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        assert file.is_relative_to(REPO), f"{page.name}:{line}: {target} leaves the repository"
        assert file.exists(), f"{page.name}:{line}: {target} does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}:{line}: {target} has no such heading"


@pytest.mark.parametrize("page", pages(), ids=identify)
def test_every_policy_on_a_page_loads(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "yaml" and block.text.startswith("policy:"):
            (tmp_path / "policy.yaml").write_text(block.text, encoding="utf-8")
            load_policy(str(tmp_path / "policy.yaml"))


def test_every_option_is_documented() -> None:
    page = cli_reference.PAGE.read_text(encoding="utf-8")
    assert cli_reference.update(page) == page, "run `python -m tests.docs.cli_reference`"


def test_every_page_of_the_documentation_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [REPO / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = ((page.parent / unquote(t.partition("#")[0])).resolve() for _, t in links(page) if ":" not in t)
        todo += [t for t in targets if t.suffix == ".md" and t.is_relative_to(REPO) and t.exists()]
    assert set(pages()) <= seen, f"no link leads to {sorted(identify(p) for p in set(pages()) - seen)}"


def test_every_error_class_is_documented() -> None:
    text = (REPO / "docs/reference/errors.md").read_text(encoding="utf-8")
    classes = {v for k, v in vars(errors).items() if k.isupper() and isinstance(v, str)}
    assert len(classes) >= 6
    assert {f"`{name}`" for name in classes} <= set(re.findall(r"`\w+`", text))


def test_every_column_is_documented() -> None:
    text = (REPO / "docs/reference/run-directory.md").read_text(encoding="utf-8")
    columns = {*IDENTITY.names, *FAILED.names, *FACTS.names, *DECISION_COLUMNS, "image_emb", "text_emb"}
    assert {f"`{name}`" for name in columns} <= set(re.findall(r"`[\w.]+`", text))


def test_every_key_of_a_plan_a_commit_and_a_version_is_documented() -> None:
    """They are read strictly, so whoever writes or reads them needs all keys."""
    text = (REPO / "docs/reference/run-directory.md").read_text(encoding="utf-8")
    nouns = (
        Plan,
        records.Commit,
        records.Version,
        records.Work,
        records.WorkerDetails,
        records.DataFile,
        records.FailedShard,
    )
    keys = {item.name for noun in (*nouns, records.Base) for item in fields(noun) if item.compare} | {"version"}
    keys |= {name for noun in (records.Counts, records.Totals) for name in vars(noun) if not name.startswith("_")}
    inside = {
        "number",
        "of_worker",
        "of_source",
        "to_json",
        "from_json",
        "of",
        "without_rows",
    }  # not written, or methods
    assert keys - inside <= set(re.findall(r"`([\w.]+)`", text)), keys - inside - set(re.findall(r"`([\w.]+)`", text))


def test_the_readme_shows_what_make_demo_runs() -> None:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^demo:.*\n\t@?(.*)$", makefile, re.MULTILINE)
    assert recipe, "the Makefile has no demo"
    command = recipe[1].replace("$(BIN)/", "").replace("$(DEMO_OUT)", "demo-out")
    assert f"$ {command}\n" in (REPO / "README.md").read_text(encoding="utf-8")


def test_decisions_are_numbered_without_gaps() -> None:
    found = sorted((REPO / "docs/decisions").glob("[0-9]*.md"))
    assert [path.name[:4] for path in found] == [f"{n:04d}" for n in range(1, len(found) + 1)]
    for path in found:
        text = path.read_text(encoding="utf-8")
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, f"{path.name} has no {heading}"
        assert len(text) < 4000, f"{path.name} is longer than a page"
