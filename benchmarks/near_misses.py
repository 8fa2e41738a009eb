"""Which score of a concept finds things best? Thirty things in Flickr8k's training photos, whose captions name them.

    python benchmarks/near_misses.py [--model nano] [--background 0.18] [--json]

Reads split=train of `flickr8k/*.tar` below $CLIPFILTER_SHARED/data (default: `../shared/data` beside the repository). A photo
shows a thing if one of its five captions names it (the patterns below); AUC is the probability that such a photo scores above
one that does not, averaged over the things. Captions leave things out, so that no score can reach 1.

contrast    : probability of the positives against near misses and the generic negatives, as policies have it by default
background  : the same with `background`, a cosine that stands for "none of these"
margin      : best cosine of the positives minus best cosine of the negatives
bare cosine : best cosine of the positives, no negatives

Also printed: the cosine that one in twenty photos exceeds that do not show a thing, which is what `background` was chosen by.
nano's caption block was trained on these photos, though not on these phrases: the comparison is between scores, not models.
"""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pyarrow as pa
from nano_quality import shared_data
from policies_caltech import auc

from clipfilter.evaluation.dataset import DataRequest, open_dataset
from clipfilter.models import load_encoder
from clipfilter.policies import compile_policy, parse_policy
from clipfilter.sources import open_source

SCORES = {
    "contrast": {"score": "probability"},
    "background": {"score": "probability", "background": None},
    "margin": {"score": "margin"},
    "bare cosine": {"score": "cosine"},
}
# name: (pattern of captions, what it is, what it is mistaken for); written before any score was looked at.
THINGS = {
    "dog": (
        r"\b(dogs?|pupp(y|ies))\b",
        ["a dog", "a puppy", "dogs playing"],
        ["a cat", "a wolf", "a fox", "a stuffed toy animal", "a horse", "a goat", "a sheep", "a bear"],
    ),
    "bicycle": (
        r"\b(bicycl\w*|bikes?|biker|cyclist)\b",
        ["a bicycle", "a person riding a bike", "a mountain bike"],
        ["a motorcycle", "a skateboard", "a scooter", "a wheelchair", "a stroller", "a shopping cart"],
    ),
    "motorcycle": (
        r"\b(motorcycl\w*|dirt ?bikes?|motorbike)\b",
        ["a motorcycle", "a dirt bike", "a motorcyclist"],
        ["a bicycle", "a scooter", "a car", "a quad bike", "a snowmobile"],
    ),
    "skateboard": (
        r"\bskateboard\w*",
        ["a skateboard", "a skateboarder doing a trick"],
        ["roller skates", "a snowboard", "a surfboard", "a scooter", "a bicycle"],
    ),
    "snowboard": (
        r"\bsnowboard\w*",
        ["a snowboard", "a snowboarder"],
        ["a skateboard", "skis", "a surfboard", "a sled"],
    ),
    "surf": (
        r"\bsurf\w*",
        ["a surfboard", "a surfer on a wave"],
        ["a snowboard", "a kayak", "a swimmer", "a sailboat", "a jet ski"],
    ),
    "guitar": (
        r"\bguitars?\b",
        ["a guitar", "a person playing guitar"],
        ["a violin", "a microphone", "a drum", "a banjo", "a piano"],
    ),
    "soccer": (
        r"\bsoccer\b",
        ["soccer", "a soccer player", "a soccer ball"],
        ["football", "rugby", "basketball", "volleyball", "hockey"],
    ),
    "basketball": (
        r"\bbasketball\b",
        ["basketball", "a basketball player"],
        ["volleyball", "soccer", "tennis", "football", "handball"],
    ),
    "tennis": (
        r"\btennis (player|racket|court|match|racquet)|\bplay\w* tennis",
        ["a tennis player", "a tennis racket"],
        ["badminton", "a baseball player", "golf", "table tennis", "squash"],
    ),
    "baseball": (
        r"\bbaseball\b",
        ["a baseball player", "a baseball bat"],
        ["cricket", "a tennis player", "a football player", "a hockey player"],
    ),
    "swimming pool": (
        r"\bpool\b",
        ["a swimming pool", "a person in a pool"],
        ["the sea", "a lake", "a bathtub", "a fountain", "a water slide"],
    ),
    "car": (r"\bcars?\b", ["a car", "a race car"], ["a truck", "a bus", "a motorcycle", "a train", "a van"]),
    "horse": (
        r"\bhorses?\b",
        ["a horse", "a person riding a horse"],
        ["a cow", "a donkey", "a camel", "a dog", "a deer"],
    ),
    "boat": (
        r"\b(boats?|kayak\w*|canoe\w*|raft)\b",
        ["a boat", "a kayak", "a canoe"],
        ["a surfboard", "a jet ski", "a pool float", "a dock", "a bridge"],
    ),
    "climbing": (
        r"\b(climb\w*)\b",
        ["a rock climber", "a person climbing a cliff"],
        ["a hiker on a trail", "a waterfall", "a person on a ladder", "a cave"],
    ),
    "camera": (
        r"\b(camera|photographer)\b",
        ["a camera", "a photographer"],
        ["binoculars", "a mobile phone", "a telescope", "a microphone", "a video screen"],
    ),
    "sunglasses": (
        r"\bsunglasses\b",
        ["sunglasses", "a person wearing sunglasses"],
        ["glasses", "goggles", "a mask", "a hat", "a helmet"],
    ),
    "hat": (
        r"\b(hats?)\b",
        ["a hat", "a person wearing a hat"],
        ["a helmet", "a hood", "a wig", "a scarf", "a headband"],
    ),
    "snow": (
        r"\b(snow\w*)\b",
        ["snow", "a snowy mountain"],
        ["sand", "a white wall", "clouds", "a beach", "ice cream"],
    ),
    "beach": (
        r"\bbeach\b",
        ["a beach", "people on a beach"],
        ["a desert", "a lake", "a swimming pool", "snow", "a sandbox"],
    ),
    "swing": (
        r"\bswings?\b",
        ["a swing", "a child on a swing"],
        ["a slide", "a hammock", "a trampoline", "a seesaw", "a rope"],
    ),
    "slide": (
        r"\bslides?\b",
        ["a slide", "a child on a slide"],
        ["a swing", "stairs", "a trampoline", "a tunnel", "a ladder"],
    ),
    "trampoline": (
        r"\btrampoline",
        ["a trampoline", "a person jumping on a trampoline"],
        ["a swing", "a mattress", "a bouncy castle", "a slide", "a swimming pool"],
    ),
    "ball": (
        r"\b(tennis ball|ball in (its|his) mouth)\b",
        ["a ball", "a dog with a ball"],
        ["a frisbee", "a balloon", "an orange", "a stick", "a toy"],
    ),
    "frisbee": (
        r"\bfrisbee",
        ["a frisbee", "a dog catching a frisbee"],
        ["a ball", "a plate", "a stick", "a kite", "a hat"],
    ),
    "wedding": (
        r"\b(bride|wedding)\b",
        ["a bride", "a wedding"],
        ["a white dress", "a church", "a party", "a graduation", "a dance"],
    ),
    "food": (
        r"\b(eat\w*|food|cake|ice cream)\b",
        ["food", "a person eating"],
        ["a plate", "a table", "a toy", "a drink", "flowers"],
    ),
    "book": (
        r"\b(books?|reading|newspaper)\b",
        ["a book", "a person reading"],
        ["a magazine rack", "a laptop", "a menu", "a letter", "a box"],
    ),
    "statue": (
        r"\bstatues?\b",
        ["a statue", "a sculpture"],
        ["a mannequin", "a person standing still", "a toy", "a fountain", "a building"],
    ),
}


def policy_text(background: float) -> str:
    """One rule for every thing and score, as JSON (which is YAML)."""
    rules = []
    for name, (_, positives, near) in THINGS.items():
        for score, told in SCORES.items():
            how = {key: background if value is None else value for key, value in told.items()}
            concept = {"any_of": positives, "but_not": near, **how}
            rules.append({"id": rule_id(name, score), "concept": concept, "reject": {"above": 0.5}})
    return json.dumps({"policy": "near-misses", "version": 1, "rules": rules})


def rule_id(thing: str, score: str) -> str:
    return f"{thing}-{score}".replace(" ", "-")


def training_captions(source: str) -> list[str]:
    """The five captions of every photo of split=train, in lower case, a line each, in the order of the rows."""
    opened = open_source(source)
    return [
        "\n".join(row["captions"]).lower()
        for shard in opened.iter_shards()
        for batch in opened.read(shard)
        for row in batch.select(["split", "captions"]).to_pylist()
        if row["split"] == "train"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--background", type=float, default=0.18)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    encoder = load_encoder(args.model)
    request = DataRequest(str(shared_data() / "flickr8k"), where=(("split", "train"),))
    data = open_dataset(request).embed(encoder)
    compiled = compile_policy(parse_policy(policy_text(args.background)), encoder)
    count = len(data.image_emb)
    values = compiled.score(data.image_emb, None, None, pa.table({"n": np.arange(count)})).values
    captions = training_captions(request.source)
    found: dict[str, dict[str, float]] = {}
    unrelated = []
    for name, (pattern, _, _) in THINGS.items():
        shown = np.array([bool(re.search(pattern, text)) for text in captions])
        scores = {score: np.asarray(values[rule_id(name, score)], np.float64) for score in SCORES}
        found[name] = {score: auc(of, shown) for score, of in scores.items()}
        unrelated.append(scores["bare cosine"][~shown])
    level = float(np.quantile(np.concatenate(unrelated), 0.95))
    if args.json:
        print(json.dumps({"model": args.model, "photos": count, "one in twenty exceeds": level, "auc": found}))
        return
    print(f"{encoder.name}: {count:,} photos, {len(THINGS)} things; one in twenty unrelated photos exceeds {level:.3f}")
    for score in SCORES:
        each = [of[score] for of in found.values()]
        worst = min(found, key=lambda name: found[name][score])
        print(f"  {score:<12} mean {np.mean(each):.4f}  median {np.median(each):.4f}  worst {min(each):.3f} ({worst})")


if __name__ == "__main__":
    main()
