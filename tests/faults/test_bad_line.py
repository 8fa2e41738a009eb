"""From S3 to S3 over a line that loses requests, answers and connections: repeated until it is done, all is as undisturbed."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Any

import fsspec
import pytest

from tests.faults.conftest import OPTIONS, Inputs
from tests.support.faults import clipfilter
from tests.support.s3 import s3_server
from tests.support.s3_faults import SPOILS, Line, Spoil, at, bad_line, honest, often

pytestmark = pytest.mark.integration

#: Commands of one job over the names in braces: a source, an embedded run, a filtered one, and what is exported.
JOB = (
    ["embed", "s3://bucket/tars", "--out", "s3://bucket/{}/embedded", *OPTIONS],
    ["filter", "s3://bucket/{}/embedded", "--policy", "POLICY", "--out", "s3://bucket/{}/filtered", "--threads", "1", "-q"],
    ["verify", "s3://bucket/{}/filtered"],
    ["export", "s3://bucket/{}/filtered", "--to", "s3://bucket/{}/kept"],
)  # fmt: skip
RUN = (["run", "s3://bucket/tars", "--policy", "POLICY", "--out", "s3://bucket/{}/run", *OPTIONS],)
JOBS = {"job": JOB, "run": RUN}
_TIMES = 40


@dataclass
class Site:
    """An S3 server with the tars in it, the line to it, and a file system that goes around the line."""

    line: Line
    fs: Any
    url: str
    policy: str

    def clipfilter(self, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return clipfilter(*arguments, env={"AWS_ENDPOINT_URL": self.line.url}, timeout=timeout)

    def do(self, job: tuple[list[str], ...], name: str) -> int:
        """Each command until it has done its work, and nothing but sentences meanwhile; how many were needed in all."""
        needed = 0
        for arguments in job:
            given = [part.replace("{}", name).replace("POLICY", self.policy) for part in arguments]
            for _ in range(_TIMES):
                needed += 1
                done = self.clipfilter(*given)
                assert "Traceback" not in done.stderr, done.stderr
                if done.returncode == 0:
                    break
                assert done.returncode in (1, 2, 3), (given, done.returncode, done.stderr)
                assert len(re.findall("^clipfilter: ", done.stderr, re.M)) == 1 or arguments[0] == "verify", done.stderr
            else:
                raise AssertionError(f"{given} was not done after {_TIMES} times: {done.stderr}")
        return needed

    def content(self, name: str) -> dict[str, Any]:
        """What a job left: every object by its sha256, commits without the work they took, names of places levelled."""
        self.fs.invalidate_cache()
        found: dict[str, Any] = {}
        for path in self.fs.find(f"bucket/{name}"):
            short, data = path.removeprefix(f"bucket/{name}/"), self.fs.cat_file(path)
            data = data.replace(f"bucket/{name}/".encode(), b"bucket/NAME/")
            if "/commits/" in short:
                found[short] = {key: value for key, value in json.loads(data).items() if key not in ("work", "plan")}
            elif short.endswith(("/plan.json", "/export.json")) or "/versions/" in short:
                found[short] = {key: value for key, value in json.loads(data).items() if key not in ("plan", "sha256")}
            elif "/derived/" in short:  # named by the place of what was made
                found[f"{short.rpartition('/')[0]}/{sha256(data).hexdigest()}"] = True
            elif not short.endswith(("run.log", "run.json", "report.html")):
                found[short] = sha256(data).hexdigest()
        return found


@pytest.fixture(scope="module")
def site(inputs: Inputs) -> Iterator[Site]:
    with s3_server() as url, bad_line(url) as line:
        fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(inputs.tars), "bucket/tars", recursive=True)
        yield Site(line, fs, url, inputs.policy)


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> Callable[[str], tuple[dict[str, Any], int]]:
    """What a job leaves over an honest line, and how many requests it made."""

    @cache
    def get(name: str) -> tuple[dict[str, Any], int]:
        job = JOBS[name]
        site.line.start(honest)
        assert site.do(job, name) == len(job)
        return site.content(name), len(site.line.requests)

    return get


@pytest.mark.parametrize(
    ("share", "seed"), [(0.05, 1), *(pytest.param(0.05 * (1 + n % 3), n, marks=pytest.mark.soak) for n in range(2, 10))]
)
def test_a_job_over_a_line_that_spoils_some_requests(share: float, seed: int, site: Site, undisturbed: Any) -> None:
    name, (want, _) = f"job-{seed}", undisturbed("job")
    site.line.start(often(share, seed))
    needed = site.do(JOB, name)
    print(f"FAULTS job over S3, {share:.0%}: {needed} commands for {len(JOB)}, {dict(site.line.spoiled)}")
    assert sum(site.line.spoiled.values()) > site.line.spoiled["none"]
    assert site.content(name) == want


@pytest.mark.soak("test_a_job_over_a_line_that_spoils_some_requests")
@pytest.mark.timeout(3600)
def test_each_request_of_a_run_spoiled_in_turn(site: Site, undisturbed: Any) -> None:
    want, count = undisturbed("run")
    needed: Counter[str] = Counter()
    points = [(number, SPOILS[number % len(SPOILS)]) for number in range(1, count + 1)]
    for number, spoil in points:
        name = f"run-{number}-{spoil}"
        site.line.start(at(number, spoil))
        needed[f"{spoil}: {site.do(RUN, name)}"] += 1
        assert site.content(name) == want, name
    print(f"FAULTS run over S3: {count} requests, {len(points)} spoiled: {dict(sorted(needed.items()))}")


@pytest.mark.soak("test_a_job_over_a_line_that_spoils_some_requests")
def test_a_server_that_takes_requests_and_never_answers(site: Site, undisturbed: Any) -> None:
    """From one request on everything hangs; the run ends by itself, and goes on later where it was."""
    want, count = undisturbed("run")
    silent: Spoil = "hang"
    site.line.start(lambda number, method, path: silent if number > count // 2 else None)
    arguments = [part.replace("{}", "silent").replace("POLICY", site.policy) for part in RUN[0]]
    done = site.clipfilter(*arguments, timeout=800)
    assert done.returncode in (1, 2, 3)
    assert "Traceback" not in done.stderr
    site.line.start(honest)
    assert site.do(RUN, "silent") == 1
    assert site.content("silent") == want
