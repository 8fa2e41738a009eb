"""Config files of the pipelines: typed, strict, with a place and a suggestion; and the arithmetic of an estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from clipfilter.cli.pipeline_config import JobConfig, arguments, job_request, load_config, show_plan
from clipfilter.errors import RefusedError
from clipfilter.operations.estimate import CostConfig, amount, count_images, estimate_job, estimate_lines
from clipfilter.sources import open_source
from tests.support.engine import PHOTOS, write_tars
from tests.support.sources import samples, write_parquet


class Example(JobConfig):
    policy: str
    columns: tuple[str, ...] = ()
    queue: int = Field(default=5, ge=1)


GOOD = "source: {url: here}\nout: there\npolicy: demo\n"


def load(folder: Path, text: str) -> Example:
    (folder / "config.yaml").write_text(text)
    return load_config(folder / "config.yaml", Example)


def test_a_config_becomes_a_request(tmp_path: Path) -> None:
    text = (
        GOOD + "model: {name: nano, batch_size: 8, decode: exact}\nengine: {name: local, threads: 2}\ncolumns: [a, b]\n"
    )
    config = load(tmp_path, text + "max_failures: 1\n")
    assert config.columns == ("a", "b")
    request = job_request(config, "run", policy=config.policy)
    assert (request.source, request.out, request.policy, request.batch_size) == ("here", "there", "demo", 8)
    assert (request.decode, request.engine, request.threads, request.max_failures) == ("exact", "local", 2, 1.0)
    assert request.source_options.captions == "first"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GOOD.replace("policy:", "polcy:"), r"config.yaml:3:1: unknown key 'polcy'; did you mean 'policy'\?"),
        (
            GOOD.replace("url:", "path:"),
            "config.yaml:1:10: unknown key 'source.path'; the keys here are url, image_column",
        ),
        ("out: there\npolicy: demo\n", "the key 'source' is missing"),
        (GOOD + "queue: 0\n", "config.yaml:4:8: 'queue' is not valid: Input should be greater than or equal to 1"),
        (GOOD + "queue: '7'\n", "'queue' is not valid: Input should be a valid integer"),
        (GOOD + "engine: {name: spark}\n", "'engine.name' is not valid: Input should be 'auto', 'local' or 'ray'"),
        (GOOD + "out: again\n", "given twice"),
        (GOOD + "policy2: !!python/object:os.system x\n", "config.yaml:4"),
        ("- a\n", "a config is a map"),
    ],
)
def test_what_is_wrong_has_a_place(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=sentence):
        load(tmp_path, text)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.yaml", Example)


def test_the_command_line_of_a_pipeline() -> None:
    given = arguments("First line.\n\nMore.", ["x.yaml", "--dry-run", "--json"])
    assert (given.config, given.dry_run, given.as_json) == ("x.yaml", True, True)


def test_images_are_counted_where_that_is_cheap(tmp_path: Path) -> None:
    photos = open_source(str(PHOTOS))
    count, exact = count_images(photos, list(photos.iter_shards()))
    assert exact
    assert count == sum(len(shard.members) for shard in photos.iter_shards())
    write_parquet(tmp_path / "p" / "a.parquet", samples(37))
    parquet = open_source(str(tmp_path / "p"))
    assert count_images(parquet, list(parquet.iter_shards())) == (37, True)
    tars = open_source(str(write_tars(tmp_path / "t", 6, 20)))
    count, exact = count_images(tars, list(tars.iter_shards()))
    assert not exact
    assert 100 <= count <= 140


def test_an_estimate_is_arithmetic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(tmp_path, f"source: {{url: {PHOTOS}}}\nout: {tmp_path / 'out'}\npolicy: demo\n")
    cost = CostConfig(images_per_second=0.01, workers=4, hour=2.0, gb_month=0.5, thousand_writes=5.0)
    found = estimate_job(job_request(config, "run", policy="demo"), cost)
    assert found.rate_from == "given"
    assert found.hours == pytest.approx(found.images / 0.01 / 3600)
    assert found.wall_hours == pytest.approx(found.hours / 4)
    assert found.storage_bytes > found.source_bytes > 1_000_000
    assert found.price == pytest.approx(2.0 * found.hours + 5.0 * found.writes / 1000)
    assert found.price_month == pytest.approx(0.5 * found.storage_bytes / 1e9)
    assert "with all workers" in estimate_lines(found)[1]
    without = estimate_job(job_request(config, "embed"), CostConfig())
    assert without.price is without.price_month is None
    assert without.storage_bytes < found.storage_bytes
    assert without.rate > 0.5
    show_plan({"job": "run", "warnings": ["mind"]}, found, True)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["job"], shown["estimate"]["images"]) == ("run", found.images)


def test_amounts() -> None:
    assert [amount(n) for n in (12, 1234, 250_000, 3.2e12, 5e15)] == [
        "12 bytes",
        "1.2 kB",
        "250 kB",
        "3.2 TB",
        "5,000 TB",
    ]
