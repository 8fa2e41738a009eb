"""Concept scores against their formula in float64, where cosines are ordinary and where exponentials vanish."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit, logsumexp

from clipfilter.policies.kinds.base import CompiledRule
from clipfilter.policies.kinds.concept import Concept
from clipfilter.policies.kinds.concept_plan import ConceptPlan, Part, concept_scores

SIZES = [(5, 4), (1, 0), (2, 7), (5, 4), (3, 1)]  # positives and near misses of every rule; all share the generics
GENERIC = 6


def rule(number: int) -> CompiledRule:
    """A rule that rejects above 0.5."""
    measure = Concept(any_of=["a thing"])
    return CompiledRule(
        f"rule-{number}", measure, ("{}",), "above", None, 0.5, "review", ranked=False, calibrated=False
    )


def plan(scale: float, kinds: list[str], sigmoid: bool = False) -> tuple[ConceptPlan, list[list[list[int]]]]:
    """A plan of unit vectors, and the phrases (as rows of the cosines) of every rule: positives and negatives."""
    starts, members, groups, k = [], [], [], 0
    for number, kind in enumerate(kinds):
        own = []
        for size in SIZES[number]:
            own.append(len(starts) if size else -1)
            if size:
                starts.append(k)
            groups.append(list(range(k, k + size)))
            k += size
        members.append([f"rule-{number}", *own, -1, kind])
    starts.append(k)
    for member in members:
        member[3] = len(starts) - 1
    generic = list(range(k, k + GENERIC))
    k += GENERIC
    built = ConceptPlan.build(
        weights=np.eye(k, dtype=np.float32),
        labels=tuple(f"p{column}" for column in range(k)),
        starts=starts,
        parts=[Part(*member) for member in members],
        rules=[rule(number) for number in range(len(kinds))],
        logit_scale=scale,
        logit_bias=-1.0,
        sigmoid=sigmoid,
    )
    return built, [[groups[2 * rule], groups[2 * rule + 1] + generic] for rule in range(len(kinds))]


def sorted_columns(built: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """The cosines in the plan's own order of columns."""
    return cosines[[int(name[1:]) for name in built.labels]]


@pytest.mark.parametrize("spread", [0.05, 0.6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_are_softmax_of_means(spread: float, dtype: type) -> None:
    """With a spread of 0.6 at scale 100 whole rules lie e^-100 below the row's best phrase, and still are compared."""
    built, phrases = plan(100.0, ["probability"] * 5)
    cosines = np.clip(np.random.default_rng(1).normal(0, spread, (built.weights.shape[0], 700)), -1, 1).astype(dtype)
    cosines[phrases[3][0] + phrases[3][1][:4], :50] = -0.99  # a rule far below everything, for rows with a high generic
    found = concept_scores(built, sorted_columns(built, cosines))
    for rule, (positives, negatives) in enumerate(phrases):
        exact = 100.0 * cosines.astype(np.float64)
        ahead = logsumexp(exact[positives], axis=0) - np.log(len(positives))
        behind = logsumexp(exact[negatives], axis=0) - np.log(len(negatives))
        np.testing.assert_allclose(found[rule], expit(ahead - behind), atol=2e-5 if dtype is np.float32 else 1e-12)


def test_rules_without_generics_in_sight_are_compared_with_their_near_misses() -> None:
    """A rule whose positives and negatives all vanish beside another rule's phrase keeps its own ratio."""
    built, phrases = plan(100.0, ["probability"] * 2)
    cosines = np.full((built.weights.shape[0], 3), -0.98, dtype=np.float32)
    cosines[phrases[1][0]] = 0.98
    cosines[phrases[0][0], 1] = -0.97
    found = concept_scores(built, sorted_columns(built, cosines))
    share = len(phrases[0][1])
    assert share > 0
    np.testing.assert_allclose(found[0, [0, 2]], 0.5, atol=1e-5)
    np.testing.assert_allclose(found[0, 1], expit(1.0), atol=1e-4)
    np.testing.assert_array_equal(found[1], 1.0)


def test_margins_cosines_and_sigmoids_take_the_highest_of_each_group() -> None:
    built, phrases = plan(10.0, ["margin", "cosine", "probability"], sigmoid=True)
    cosines = np.random.default_rng(2).normal(0, 0.3, (built.weights.shape[0], 200))
    found = concept_scores(built, sorted_columns(built, cosines))
    top = [[cosines[columns].max(axis=0) for columns in rule] for rule in phrases]
    np.testing.assert_allclose(found[0], top[0][0] - top[0][1], atol=1e-12)
    np.testing.assert_allclose(found[1], top[1][0], atol=1e-12)
    np.testing.assert_allclose(found[2], expit(10 * top[2][0] - 1) - expit(10 * top[2][1] - 1), atol=1e-12)
