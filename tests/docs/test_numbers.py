"""Every number in the prose of the guide and the reference is accounted for: in the code, in a measurement, or as no claim.

A new number on a page fails here until it stands in one of the lists below. CODE says which constant or default a sentence
repeats, MEASURED where a result was written down, GIVEN what is not ours to be wrong about: other people's software and
papers, definitions, arithmetic, examples that the page itself makes, and bounds that a named test asserts.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clipfilter.policies import TEMPLATES
from clipfilter.policies.kinds.pixels import PIXELS
from tests.browser import test_conformance as conformance
from tests.docs.claims import REPO, calculated, constants, numbers, options, places, prose, value, values
from tests.docs.pages import blocks, commands, pages

#: Pages whose numbers are checked whole: generated, or compared with what a script prints.
HELD = {
    "docs/reference/cli.md": "tests/docs/test_docs.py",
    "docs/guide/scaling.md": "tests/unit/test_scaling.py",
}

#: {page: {what it says: what its numbers are in the code, one expression each, none for a number that is not from there}}
CODE: dict[str, dict[str, list[str | None]]] = {
    "docs/guide/beam.md": {"at most 50 000 shards": ["executor.TASKS_PER_PIPELINE"]},
    "docs/guide/classify.md": {
        "(1 % by default)": ["defaults.MAX_FAILURES * 100"],
        "| `photo` (the default) | 4 |": ["templates.photo"],
        "`imagenet-like` | 8, 14 |": ["templates.cifar_style", "templates.imagenet_like"],
        "| `imagenet` | 80 |": ["templates.imagenet"],
        "| `cifar` | 18 |": ["templates.cifar"],
    },
    "docs/guide/cluster.md": {
        "at most 8 |": ["hardware.MAX_THREADS"],
        "one per 8 cores": ["hardware.MAX_THREADS"],
        "ended after 40 seconds": ["interface.SILENT_SECONDS"],
    },
    "docs/guide/curate.md": {
        "the default limit is 1 %": ["defaults.MAX_FAILURES * 100"],
        "the command ends with 3": ["job.EXIT_FAILURES"],
        "less than 5 bytes, and numbers of less than 8 digits": ["traces.LEAST", "traces.LEAST_DIGITS"],
    },
    "docs/guide/deploy.md": {"over the last 30 s": ["metrics._RATE_SECONDS"]},
    "docs/guide/ingest.md": {"larger than 256 MiB": ["egress.LARGEST / (1 << 20)"]},
    "docs/guide/nightly.md": {
        "after `--silence` such nights (2)": ["option.nightly.silence"],
        "shards of 10 000 images": ["defaults.ROWS_PER_SHARD"],
        "Its alarm is above 0.2": ["drift.FLOOR"],
        "the 99.9 % quantile": ["100 - drift.FALSE_ALARM * 100"],
        "the last 14 with rows": ["option.nightly.window"],
    },
    "docs/guide/onnx.md": {
        "the first 500 rows": ["option.models_export.limit"],
        "below 0.995": ["onnx_export.INT8_COSINE"],
    },
    "docs/guide/score.md": {"within 1e-5 of a threshold": ["arithmetic.RECHECK"]},
    "docs/guide/train.md": {
        "5 % of them, more of a small set": ["worker.HELD_OUT * 100"],
        "stays below 100": ["model.MAX_LOGIT_SCALE"],
        "up to 4 GiB per set": ["prefix.MAX_BYTES / (1 << 30)"],
        "The default rate of 3e-5": ["option.train.lr"],
    },
    "docs/reference/curation.md": {
        "of 64 bits": ["duplicates._HASH_BITS"],
        "one per thousand rows, at most 20,000": ["dedup._MOST_CLUSTERS"],
        "within 1e-5 of the threshold": ["duplicates.RECHECK"],
        "64 embeddings per cluster": ["dedup._SAMPLE_PER_CLUSTER"],
        "T = 0.01": ["scores.TEMPERATURE"],
        "at most 32,768 captioned rows": ["scores.BANK_SIZE"],
        "B/32 score at least 0.28": ["datacomp.LAION2B_THRESHOLD"],
    },
    "docs/reference/errors.md": {
        "(default 178 956 970)": ["defaults.MAX_PIXELS"],
        "a side above 65 535": ["header.MAX_SIDE"],
        "by name above 256 MiB": ["egress.LARGEST / (1 << 20)"],
        "`--decode-timeout` (60 seconds)": ["defaults.DECODE_TIMEOUT"],
    },
    "docs/reference/images.md": {
        "a side above 65 535": ["header.MAX_SIDE"],
        "500 scans, fewer": ["header._MAX_SCANS"],
        "more than 8 589 934 592 pixels in all, but at least 64; 20 000 segments": [
            "header._MAX_SCANNED",
            "header._FEW_SCANS",
            "header._MAX_PARTS",
        ],
        "up to 33 554 432 pixels": ["header._MAX_SLOW_PIXELS"],
        "| 20 000 entries of": ["header._MAX_PARTS"],
        "the picture or 33 554 432 pixels": ["header._MAX_SLOW_PIXELS"],
        "| 20 000 tiles, 1 000 000 precincts, 10 000 000 packets": [
            "header._MAX_PARTS",
            "header._MAX_PRECINCTS",
            "header._MAX_PACKETS",
        ],
        "| 8 388 608 pixels, as": ["header._MAX_RUN_PIXELS"],
        "in digits | 33 554 432 pixels": ["header._MAX_SLOW_PIXELS"],
        "at least 6 times the model's input": ["load.OVERSAMPLING"],
        "224-pixel input scaled decoding begins at a shorter side of 2 688 pixels": [
            None,
            "224 * load.OVERSAMPLING * 2",
        ],
        "leaves 6 x 224 = 1 344": ["load.OVERSAMPLING", None, "224 * load.OVERSAMPLING"],
        "a longer side of at most 128 pixels": ["facts.CANONICAL_SIDE"],
    },
    "docs/reference/models.md": {"Characters beyond number 20 000": ["tokenizer._MAX_CHARACTERS"]},
    "docs/reference/policy.md": {
        "a whole number from 0 to 100": [None, "rule.MAX_SEVERITY"],
        "At most 256 phrases of 300 characters per list": ["fields.MAX_PHRASES", "fields.MAX_PHRASE_CHARS"],
        "`photo` (4 templates)": ["templates.photo"],
        "`cifar-style` (8)": ["templates.cifar_style"],
        "`imagenet-like` (14)": ["templates.imagenet_like"],
        "`imagenet` (80)": ["templates.imagenet"],
        "`cifar` (18)": ["templates.cifar"],
        "a Hamming distance of at most 16": ["hashes.MAX_DISTANCE"],
        "more than 1 000 belong there": ["overrides.MAX_LISTED"],
        "At most 8 files deep and 32 in all": ["extends.MAX_DEPTH", "extends.MAX_FILES"],
        "within 1e-5 of a threshold": ["arithmetic.RECHECK"],
        "at most 256 KiB and 12 levels": ["yaml_nodes.MAX_YAML_BYTES / 1024", "yaml_nodes.MAX_DEPTH"],
        "below 20 000 entries": ["yaml_nodes.MAX_NODES"],
        "(default 0.01)": ["Safety.adjustment"],
        "below 25 |": ["quality.dark"],
        "above 235 |": ["quality.bright"],
        "below 10 |": ["quality.blurry"],
        "`entropy` | below 3 |": ["quality.low_information"],
        "`aspect_ratio` | above 3 |": ["quality.odd_aspect"],
        "below 2 |": ["quality.grayscale"],
    },
    "docs/reference/sources.md": {
        "row groups, about 10 000 |": ["defaults.ROWS_PER_SHARD"],
        "| 10 000 files of the sorted listing |": ["defaults.ROWS_PER_SHARD"],
        "10 seconds, passing trouble": ["fetch.TIMEOUT_SECONDS"],
        "256 MiB per image": ["egress.LARGEST / (1 << 20)"],
        "unzips to more than 1 GiB": ["egress.UNZIPPED_FREE / (1 << 30)"],
        "over 100 times its size": ["egress.UNZIPPED_RATIO"],
        "over 256 MiB": ["egress.LARGEST / (1 << 20)"],
    },
}

CARD = "clipfilter/models/nano/MODEL_CARD.md"
BENCHMARKS = "benchmarks/README.md"
#: {page: {what it says: the file where each of its numbers was written down when it was measured}}
MEASURED: dict[str, dict[str, str]] = {
    "README.md": {
        "AUC 0.971 and text-to-image recall@10 0.610 among 1 000": CARD,
        "top-1 0.521 over the 101 classes": CARD,
    },
    "docs/guide/rank.md": {"on 1 000": BENCHMARKS, "[83.7 % of the time]": BENCHMARKS},
    "docs/guide/score.md": {"at least 0.9995 to it": BENCHMARKS},
    "docs/guide/search.md": {
        "one million rows of 768 numbers": BENCHMARKS,
        "782 MB": BENCHMARKS,
        "724 MiB, after loading for 2.7 s": BENCHMARKS,
        "0.998 for captions, 1.000 for photos": BENCHMARKS,
        "takes 361 ms": BENCHMARKS,
    },
    "docs/guide/train.md": {
        "6,000 training photos": BENCHMARKS,
        "9 minutes and 40 seconds": BENCHMARKS,
        "cost 8.3 points": BENCHMARKS,
        "costs 0.5 and": BENCHMARKS,
        "With 1,024 labelled images the standard error of a top-1 is 1.5 points": BENCHMARKS,
    },
    "docs/reference/curation.md": {
        "Of 600 photographs of Flickr8k with 200 copies": BENCHMARKS,
        "| JPEG quality 40 | half size | crop to 90 % | brighter by 25 % |": BENCHMARKS,
        "| near 4 | 1.000 | 0.800 | 1.00 | 1.00 | 1.00 | 0.05 | 0.95 |": BENCHMARKS,
        "| semantic 0.95 | 0.993 | 0.700 | 1.00 | 0.78 | 0.12 | 0.65 | 0.95 |": BENCHMARKS,
        "| exact, near 4, semantic 0.97 | 1.000 | 0.865 | 1.00 | 1.00 | 1.00 | 0.33 | 1.00 |": BENCHMARKS,
    },
    "docs/reference/policy.md": {"(nano: 0.18)": BENCHMARKS},
    "docs/reference/packs.md": {"flagged of 3 000 everyday photos": "policies/safety-concepts.yaml"},
}

#: {page: what it says that is no claim about clipfilter's defaults, limits or measured results}
GIVEN: dict[str, list[str]] = {
    "README.md": [
        "97 sample photographs",  # its command's output, below, is compared
        "60 000 pixels square",
        "about 3 GB",  # torch's
        "the best 80 %",
    ],
    "docs/guide/beam.md": ["about 100 bytes", "graphs above 10 MB, which are about 200 000 shards"],
    "docs/guide/calibrate.md": [
        "at least 95 % of the flagged",  # the table repeats its first column in words
        "at most 5 % of the true",
        "at most 2 % of the run's rows",
        "for precision 0.95 at confidence 0.9 at least 72 flagged labels",  # tests/unit/test_calibration_guarantees.py
        "floor(0.05 (n + 1))",
        "at least 19 of them for 5 %",  # tests/unit/test_calibration_guarantees.py
        "4 bytes of memory per row",
    ],
    "docs/guide/cluster.md": ["32 or more random characters", "batches of 256"],  # tests/unit/test_engine_shard.py
    "docs/guide/curate.md": ["which is 3 %", "about 0.25 to 0.30"],
    "docs/guide/deploy.md": ["user 10001"],  # tests/unit/test_infra.py
    "docs/guide/evaluate.md": [
        "among 100 is easy, among 10 000 it is not",
        "1.3 GB for a million images",
        "100 000 rows take a core a quarter of an hour",
    ],
    "docs/guide/import.md": ["within 0.001"],
    "docs/guide/ingest.md": ["quality 95"],
    "docs/guide/look.md": ["Draw 90 rows", "about 5 bytes per row and rule", "(13 once you sort"],
    "docs/guide/moderate.md": ["a score of 0.9", "above 0.95 reject, between 0.85 and 0.95 review"],
    "docs/guide/nightly.md": ['"the best 30 %"'],
    "docs/guide/onnx.md": [
        "by more than 1e-4",  # tests/unit/test_onnx.py
        "above 2 GB",
        "Up to 64 of them",
        "have 7 bits",
        "products in 16 bits, and 8-bit weights",
        "have 8 bits",
        "0.87 to 0.99 with single images at 0.58 to 0.96",  # docs/decisions/0012-int8-per-row-activations.md
    ],
    "docs/guide/score.md": ["is 2.5 times this cosine"],
    "docs/guide/search.md": ["recall of the 10 nearest", "about 10 ms at the median", "about 0.001"],
    "docs/guide/train.md": [
        "the default is 2",
        "a = 0, 0.1 ... 1",
    ],
    "docs/guide/troubleshooting.md": [
        "| 2 | Wrong usage",
        "| 3 | Done,",
        "| 130 | Ctrl-C",
        "| 143 | SIGTERM",
        "treat 0 and 3 as finished",
        "ends with 0 or 3",
    ],
    "docs/reference/audit.md": ["0.5 for review", "a confidence of 0.9"],
    "docs/reference/curation.md": [
        "about 80 bytes per row",
        "2 bytes per number",
        "the 2-norm",
        "more than 2 words and 5 characters; shorter side at least 200; longer / shorter at most 3",  # DataComp's
        "(0.3 for l14, 0.25 for b32)",
        "more than 5 characters",
        "(3.0, whose offsets",
        "of 27,369 words",
        "nltk 3.10",
    ],
    "docs/reference/errors.md": ["a JPEG of 12 bits", "(404 and other", "or failed three times", "| 3 |"],
    "docs/reference/heads.md": [
        "people like such pictures, 0 to 10 |",  # the ratings of the data sets the heads were fitted to
        "about 1 to 10 |",
        "reject below 7 or 8",
        "reject below 4.5 to 6.5",
        "review above 0.5, reject above 0.9",
        "fitted to 4000 ratings; LAION-Aesthetics is what scores above 7, LAION-Art what scores above 8",
        "five of 768 for L/14, three of 512 for B/32",
        "by more than 0.1",
        "within 0.1 of zero",
        "a = 0.01 if",
        "up to 0.0005",
    ],
    "docs/reference/images.md": [
        "PNG, 16 bits",
        "JPEG 2000",
        "0.2 seconds of processor a megapixel",  # measured on samples/photos/coffee.jpg, enlarged and encoded by Pillow
        "JPEGs of 12 bits",
        "TIFF with 32-bit",
        "within 2 levels of Pillow",  # tests/unit/test_images_load.py
        "at least 0.9995 on photographs (0.9993 was seen",  # the same, and docs/decisions/0007-fast-decode-mode.md
        "(ITU-R 601)",
        "mean of luma, 0 to 255",
        "deviation of luma, 0 to 255",
        "(4 neighbours;",
        "in bits, 0 to 8",
        "64-bit DCT",
        "about 15 slightly colourful, above 80 very",
        "up to 32 x 32 cells have to agree within 12 levels in each cell and 2 on average",  # tests/support/picture_compare.py
        "When this table was made 3 957 of",
        *conformance.told(),  # tests/browser/test_conformance.py
    ],
    "docs/reference/models.md": [
        "by 3 more than a multiple of 4",
        "padded to 64 tokens",
        "open_clip 3.3",
        "| `fp32` | 1e-6 | 1e-5 | 0 |",  # tests/unit/test_models_numbers.py asserts these bounds
        "| `bf16` | 1e-3 | 0.03 | 1e-2 |",
        "| `fp16` | 1e-5 | 4e-3 | 1e-4 |",
        "`fp32` 1e-12 and 2e-7, `bf16` 7e-5 and 2e-3 (9e-5 to `fp32`), `fp16` 1e-6 and 2e-4 (1e-6 to `fp32`)",
        "within 1e-5; the",
        "| 1e-6 |",
        "| 1e-5 |",
        "within 1 % of their spread",
        "Bounds of 1e-6 are on 1 - cosine, those of 1e-5 on",
        "of 10 000 characters",
        "within 1e-6 of open_clip",
    ],
    "docs/reference/packs.md": [
        "| 3.4 % |",
        "| 1.4 % |",
        "at most 1.4 % |",
        "| 1.0 % |",
        "the first 3 000 of",
        "the best 30 %",
        "0.5 % of everyday photos",
    ],
    "docs/reference/policy.md": [
        "1 to 64 letters",
        "0, 2, 4 and 6 as in Azure's",
        "weight 2 counts as two",
        "| -2 to 2 |",
        "0.9 does not mean",
        "0.26 to 0.30 is usual",
        "of luma, 0 to 255",
        "in bits, 0 to 8",
        "about 15 slightly colourful, above 80 very",
        "of 64 bits",
        "bits / 64",
    ],
    "docs/reference/run-directory.md": ["first 16 hex digits", "16 hex digits, a hash", "else 32 hex digits"],
    "docs/reference/sources.md": ["of 32 hex digits", "the first 128 bits", "fetched 32 at a time"],
}


#: What a command printed that nobody can run here: {page: where the results stand that its blocks marked `no-run` show}
MEASURED_OUTPUT = {"docs/guide/train.md": BENCHMARKS}
#: Printed lines that show no result: an address, a folder.
NO_RESULT = ("http://", "/home/")


def checked() -> list[Path]:
    folders = (REPO / "docs/guide", REPO / "docs/reference")
    found = [page for page in pages() if page.parent in folders or page == REPO / "README.md"]
    return [page for page in found if name(page) not in HELD]


def name(page: Path) -> str:
    return str(page.relative_to(REPO))


@cache
def known() -> dict[str, Any]:
    """Everything that an expression in CODE may name."""
    found = constants() | {f"templates.{key.replace('-', '_')}": len(lines) for key, lines in TEMPLATES.items()}
    found |= {f"quality.{key}": quality.threshold for key, quality in PIXELS.items()}
    for key, default in options().items():
        command, _, option = key.partition(" --")
        found[f"option.{command.replace(' ', '_')}.{option.replace('-', '_')}"] = default
    return found


def test_what_counts_as_a_number() -> None:
    text = "At most 12 rows, 1 000 words or 0.5 %; with Python 3.11 to 3.13, exit code 3, `x = 5`, from 0 to 1, in 2021"
    assert [found.text for found in numbers(text)] == ["12", "1 000", "0.5"]
    assert values("6 x 224 = 1 344, 32,768 and 1e-5") == [6, 224, 1344, 32768, 1e-5]
    assert places("at most\n12 rows, not 112 rows", "12 rows") == [(8, 15)]


def test_what_an_expression_may_be() -> None:
    def result(text: str) -> float:
        return calculated(ast.parse(text, mode="eval").body, {"defaults.MAX": 0.25})

    assert result("defaults.MAX * 100 + (1 << 4)") == 41
    for text in ("defaults.MIN", "open('x')", "'1'", "True"):
        with pytest.raises(ValueError, match="is no number here"):
            result(text)
    assert known()["defaults.MAX_FAILURES"] == 0.01
    assert known()["option.run.max_failures"] == known()["defaults.MAX_FAILURES"]


@pytest.mark.parametrize("page", checked(), ids=name)
def test_every_number_in_prose_is_accounted_for(page: Path) -> None:
    text = prose(page)
    fragments = [*CODE.get(name(page), {}), *MEASURED.get(name(page), {}), *GIVEN.get(name(page), [])]
    spans = [span for fragment in fragments for span in places(text, fragment)]
    stray = [
        f"{name(page)}:{found.line}: {found.text}"
        for found in numbers(text)
        if not any(start <= found.start < end for start, end in spans)
    ]
    assert stray == [], "say in tests/docs/test_numbers.py where these are from"


@pytest.mark.parametrize(("page", "fragment"), [(page, said) for page, all in CODE.items() for said in all])
def test_what_a_page_says_of_the_code_is_so(page: str, fragment: str) -> None:
    assert places(prose(REPO / page), fragment), f"{page} does not say {fragment!r} any more"
    said, expressions = values(fragment), CODE[page][fragment]
    assert len(said) == len(expressions)
    for number, expression in zip(said, expressions, strict=True):
        if expression is not None:
            assert number == pytest.approx(calculated(ast.parse(expression, mode="eval").body, known()), rel=1e-9)


@pytest.mark.parametrize(("page", "fragment"), [(page, said) for page, all in MEASURED.items() for said in all])
def test_a_measured_number_stands_where_it_was_written_down(page: str, fragment: str) -> None:
    """As it is or, on the page, with fewer digits."""
    assert places(prose(REPO / page), fragment), f"{page} does not say {fragment!r} any more"
    source = (REPO / MEASURED[page][fragment]).read_text(encoding="utf-8")
    there = values(source)
    for found in numbers(fragment):
        digits = len(found.text.partition(".")[2])
        assert any(round(one, digits) == value(found.text) for one in there), f"{found.text} is not in {MEASURED[page]}"


@pytest.mark.parametrize("page", pages(), ids=name)
def test_output_that_is_not_run_was_measured(page: Path) -> None:
    for block in blocks(page):
        if "no-run" not in block.markers or block.language != "console" or not block.text.startswith("$ "):
            continue
        for line in (line for command in commands(block) for line in command.output):
            if any(word in line for word in NO_RESULT) or not values(line):
                continue
            there = values((REPO / MEASURED_OUTPUT[name(page)]).read_text(encoding="utf-8"))
            assert set(values(line)) <= {*there, 0.0, 1.0, 2.0}, f"{block.where}: {line}"


@pytest.mark.parametrize("page", GIVEN)
def test_nothing_is_excused_that_is_not_said(page: str) -> None:
    text = prose(REPO / page)
    gone = [fragment for fragment in GIVEN[page] if not places(text, fragment)]
    assert gone == []


def test_held_pages_name_their_test() -> None:
    for page, test in HELD.items():
        assert Path(page).name.removesuffix(".md") in (REPO / test).read_text(encoding="utf-8").replace(
            "cli_reference", "cli"
        )
