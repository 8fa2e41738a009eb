"""The small parts that kinds of rules share: rechecks, curves, sentences, places of refusals, cosines."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from pydantic_core import PydanticCustomError
from scipy.special import expit

from clipfilter.errors import RefusedError
from clipfilter.policies import joined, sigmoid, similarity
from clipfilter.policies.arithmetic import RECHECK, Recheck, exact_products
from clipfilter.policies.fraction import Threshold
from clipfilter.policies.kinds.base import Written, phrase_list
from clipfilter.policies.kinds.known import Known
from clipfilter.policies.language.yaml_nodes import read_yaml
from clipfilter.policies.parts.attachments import Attachment
from clipfilter.policies.parts.bands import CalibratedBand, CalibratedRule
from clipfilter.policies.parts.columns import column_type
from clipfilter.policies.parts.fields import Model, fail, within, written_as


def test_only_what_lies_near_a_threshold_is_computed_again() -> None:
    recheck = Recheck.of([[0.5, 0.75], [0.25]])
    values = np.array([[0.1, 0.5, 0.75, np.nan], [0.25, 0.3, 0.3, 0.25]], dtype=np.float32)
    asked: list[list[int]] = []

    def exact(rows: np.ndarray) -> np.ndarray:
        asked.append(rows.tolist())
        return values[:, rows].astype(np.float64) + np.array([[1e-9], [-1e-9]])

    recheck.settle(values, exact)
    assert asked == [[0, 1, 2, 3]]
    assert values[0, 1] > np.float32(0.5)
    assert values[0, 2] > np.float32(0.75)
    assert values[1, 0] < np.float32(0.25)
    assert values[1, 3] < np.float32(0.25)
    np.testing.assert_array_equal(values[0, [0, 3]], np.float32([0.1, np.nan]))
    np.testing.assert_array_equal(values[1, 1:3], np.float32([0.3, 0.3]))


def test_rules_have_their_own_reach_and_rows_may_be_in_doubt_for_another_reason() -> None:
    values = np.array([[0.5 + 1e-3, 0.7]], dtype=np.float32)
    seen: list[int] = []

    def exact(rows: np.ndarray) -> np.ndarray:
        seen.extend(rows.tolist())
        return values[:, rows].astype(np.float64)

    Recheck.of([[0.5]]).settle(values, exact)
    assert seen == []
    Recheck.of([[0.5]], [1e-2]).settle(values, exact)
    assert seen == [0]
    Recheck.of([[]]).settle(values, exact, np.array([False, True]))
    assert seen == [0, 1]
    assert Recheck.of([[0.5], [0.1, 0.2]]).near.tolist() == [np.float32(RECHECK)] * 2


def test_exact_products_are_those_of_each_row_alone() -> None:
    rng = np.random.default_rng(0)
    weights, half = rng.normal(size=(3, 8)), rng.normal(size=(5, 8)).astype(np.float16)
    found = exact_products(weights, half, np.array([4, 1]))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[:, 0], weights @ half[4].astype(np.float64))
    np.testing.assert_array_equal(found, np.hstack([exact_products(weights, half, np.array([row])) for row in (4, 1)]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_sigmoid_keeps_its_type_and_small_results(dtype: type) -> None:
    x = np.array([-1e4, -80, -20, -1, 0, 1, 20, 1e4], dtype=dtype)
    with np.errstate(all="raise", under="ignore"):
        found = sigmoid(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expit(x.astype(np.float64)), rtol=1e-6, atol=1e-37)


def test_cosines_of_images_and_captions_row_by_row() -> None:
    rng = np.random.default_rng(1)
    images, texts = (
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
        for rows in rng.normal(size=(2, 2500, 16))
    )
    images[7] = texts[9] = 0
    found = similarity(images, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (images.astype("f8") * texts.astype("f8")).sum(axis=1), atol=1e-6)
    assert found[7] == found[9] == 0.0  # a row of zeros resembles nothing
    np.testing.assert_array_equal(similarity(images, None), np.zeros(2500, np.float32))
    assert len(similarity(images[:0], texts[:0])) == 0


def test_sentences_show_what_people_wrote_in_the_readers_own_way() -> None:
    words = ["Looks for ", *phrase_list([f"p{number}" for number in range(10)]), "."]
    assert joined(words, lambda written: f"<{written.text}>") == (
        "Looks for “<p0>”, “<p1>”, “<p2>”, “<p3>”, “<p4>”, “<p5>”, “<p6>”, “<p7>” and 2 more."
    )
    assert all(part.isolated and part.limit == 120 for part in words if isinstance(part, Written))


def test_a_refusal_inside_gets_the_place_around_it() -> None:
    with pytest.raises(PydanticCustomError) as refused, within("rules", 3), within("combine"):
        fail("no", "weighted", key=True)
    assert refused.value.context == {"message": "no", "at": ("rules", 3, "combine", "weighted"), "at_key": True}


def test_other_data_stands_in_the_place_of_a_node() -> None:
    root = read_yaml(b"a: [1, 2]\nb: {c: 3}\n", "p.yaml")
    items, inner = root.data["a"], root.data["b"]
    assert [node.data for node in items.items()] == [1, 2]
    assert inner.items() == []
    assert inner.get("c").data == 3
    assert items.get("c") is inner.get("d") is None
    assert items.put([]).at == items.at
    less = root.put({"b": inner.put({})})
    assert less.plain() == {"b": {}}
    assert less.keys == {"b": root.keys["b"]}
    assert root.put({"x": items}, {"x": inner.at, "y": items.at}).keys == {"x": inner.at}


def test_bands_of_a_calibrated_rule_have_their_direction() -> None:
    rule = CalibratedRule(reject=CalibratedBand(below=0.25, n=10))
    assert {name: (band.direction, band.value) for name, band in rule.bands.items()} == {"reject": ("below", 0.25)}


def test_a_model_may_be_written_as_a_word() -> None:
    class Word(Model):
        model_config = written_as(lambda own: {"anyOf": [{"type": "string"}, own]})

        name: str

    schema = Word.model_json_schema()
    assert schema["anyOf"][0] == {"type": "string"}
    assert schema["anyOf"][1]["required"] == ["name"]


def test_a_column_that_is_not_there_is_refused_with_who_needs_it() -> None:
    schema = pa.schema([("a", pa.int8())])
    assert column_type("a", schema, "the rule") == pa.int8()
    with pytest.raises(RefusedError, match="the rule needs the column 'b', which this data does not have; try a"):
        column_type("b", schema, "the rule", lambda: "; try a")


def test_the_files_of_a_kind_are_those_its_keys_name() -> None:
    assert list(Known(sha256=["a" * 64]).attachments) == []
    assert list(Known(sha256={"sha256": "b" * 64}).attachments) == [Attachment(sha256="b" * 64)]


def test_a_fraction_keeps_what_is_equal_to_its_threshold() -> None:
    assert Threshold.at(0.5, 0.3, "top", 10, below=6, equal=2).kept == 4
    assert Threshold.at(0.5, 0.3, "bottom", 10, below=6, equal=2).kept == 8
