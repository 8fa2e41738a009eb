"""Do near misses help? "Weapons" and "money" as policy concepts on Caltech101, whose revolvers and dollar bills are known.

    python benchmarks/policies_caltech.py [--model nano] [--json]
    python benchmarks/policies_caltech.py --source RUN       # embeddings of an earlier run instead of the images

Reads `caltech101/caltech101.parquet` below $CLIPFILTER_SHARED/data (default: `../shared/data` beside the repository): 2 020
photos, 20 of each class. Every photo gets the score of each concept; AUC is the probability that one of the 20 photos of the
class scores above one of the 2 000 others, ties counted half (Mann-Whitney), with a 95 % bootstrap interval.

contrast    : probability of the positives against near misses and the generic negatives, as policies have it by default
pruned      : the same without the near misses that `clipfilter policy show` warns of, from the texts alone
background  : the contrast with `background`, the cosine that one in twenty unrelated photos of Flickr8k exceeds
margin      : best cosine of the positives minus best cosine of the negatives
bare cosine : best cosine of the positives, no negatives

The phrases were written from what the words mean, not from what the data set holds, and have not been changed since the
first measurement; the pruned concept is what a rule makes of them that looks at no image.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

from clipfilter.evaluation.contrast import contrasts
from clipfilter.evaluation.dataset import DataRequest, open_dataset
from clipfilter.models import Encoder, load_encoder
from clipfilter.policies import compile_policy, parse_policy

SHARED = Path(os.environ.get("CLIPFILTER_SHARED", Path(__file__).resolve().parents[2] / "shared"))
PRUNED = "pruned"
BACKGROUND = "background"
SCORES = {
    "contrast": "probability",
    "pruned": PRUNED,
    "background": BACKGROUND,
    "margin": "margin",
    "bare cosine": "cosine",
}
CONCEPTS = {
    "weapons": {
        "class": "revolver",
        "any_of": ["a handgun", "a revolver", "a pistol", "a rifle", "a person holding a gun"],
        "but_not": [
            "a toy water gun", "a camera", "a power drill", "a hair dryer", "a flashlight", "a wrench", "a pair of pliers",
            "a microphone", "a tripod", "a telescope", "a musical instrument", "a tobacco pipe",
        ],
    },
    "money": {
        "class": "dollar_bill",
        "any_of": ["a dollar bill", "banknotes", "paper money", "a stack of cash", "a hundred dollar bill"],
        "but_not": [
            "coins", "a postage stamp", "a ticket", "a receipt", "a credit card", "a certificate", "a newspaper",
            "a playing card", "an envelope", "a portrait of a man", "a page of a book", "an identity card",
        ],
    },
}  # fmt: skip


def policy_text(background: float, crowded: dict[str, set[str]] | None = None) -> str:
    """One rule per concept and kind of score, as JSON (which is YAML).

    crowded: per concept the near misses to leave out in one more rule.
    """
    rules = []
    for name, concept in CONCEPTS.items():
        told = {"any_of": concept["any_of"], "but_not": concept["but_not"]}
        made = {score: {**told, "score": score} for score in SCORES.values() if score not in (PRUNED, BACKGROUND)}
        made[BACKGROUND] = {**told, "background": background}
        if crowded is not None:
            made[PRUNED] = {**told, "but_not": [near for near in told["but_not"] if near not in crowded[name]]}
        rules += [{"id": f"{name}-{score}", "concept": made[score], "reject": {"above": 0.5}} for score in made]
    return json.dumps({"policy": "caltech", "version": 1, "rules": rules})


def crowded_near_misses(encoder: Encoder) -> dict[str, set[str]]:
    """Per concept the near misses that are more like one of its positives than its other positives are."""
    return {
        contrast.rule.removesuffix("-probability"): {
            near.phrase for positive in contrast.positives for near in positive.crowded
        }
        for contrast in contrasts(parse_policy(policy_text(0.0)), encoder)
        if contrast.rule.endswith("-probability")
    }


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, from the rank sum of the positives."""
    ranks = rankdata(scores)
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m))


def interval(scores: np.ndarray, positive: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap; positives and negatives are drawn apart."""
    random = np.random.default_rng(0)
    groups = np.flatnonzero(positive), np.flatnonzero(~positive)
    found = []
    for _ in range(draws):
        drawn = np.concatenate([random.choice(group, len(group)) for group in groups])
        found.append(auc(scores[drawn], positive[drawn]))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--background", type=float, default=0.18, help="as near_misses.py prints it for the model")
    parser.add_argument("--source", default=str(SHARED / "data" / "caltech101" / "caltech101.parquet"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if not Path(args.source).exists():
        sys.exit(f"{args.source} does not exist: set CLIPFILTER_SHARED to the folder that holds data/caltech101")

    encoder = load_encoder(args.model)
    data = open_dataset(DataRequest(args.source, label_column="label")).embed(encoder)
    labels = np.array(data.label_values, dtype=object)[data.label_index]
    crowded = crowded_near_misses(encoder)
    compiled = compile_policy(parse_policy(policy_text(args.background, crowded)), encoder)
    values = compiled.score(data.image_emb, None, None, pa.table({"n": np.arange(len(labels))})).values
    result = {}
    for name, concept in CONCEPTS.items():
        positive = labels == concept["class"]
        found = {kind: np.asarray(values[f"{name}-{score}"], np.float64) for kind, score in SCORES.items()}
        result[name] = {
            kind: {"auc": auc(scores, positive), "interval": interval(scores, positive)}
            for kind, scores in found.items()
        }
    if args.json:
        print(json.dumps({"model": args.model, "photos": len(labels), "fingerprint": encoder.fingerprint, **result}))
        return
    print(f"{encoder.name}: {len(labels):,} photos; area under the ROC curve (95 % bootstrap interval)")
    for name, concept in CONCEPTS.items():
        print(f"{name} ({int((labels == concept['class']).sum())} photos of {concept['class']})")
        for kind, measured in result[name].items():
            low, high = measured["interval"]
            print(f"  {kind:<12} {measured['auc']:.4f}  ({low:.4f} to {high:.4f})")
        if crowded[name]:
            print(f"  pruned of: {', '.join(sorted(crowded[name]))}")
        best = max(result[name], key=lambda kind: result[name][kind]["auc"])
        print(f"  best: {best}")


if __name__ == "__main__":
    main()
