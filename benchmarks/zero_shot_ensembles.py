"""Prompt ensembles against a single template: zero-shot classification on Caltech101, which no training has seen.

    python benchmarks/zero_shot_ensembles.py [--model nano] [--json]

2 020 photos, 101 classes; the label with "_" as a space and in lower case. The class vector is the normalised mean of
the normalised embeddings of an ensemble's prompts, as `clipfilter classify` and `evaluate` compute it. Reads
`caltech101/caltech101.parquet` below $CLIPFILTER_SHARED/data (default: `../shared/data` beside the repository). Measures
only: no ensemble was written, chosen or changed by it.
"""

from __future__ import annotations

import argparse
import json

from nano_quality import shared_data

from clipfilter.evaluation.dataset import DataRequest, open_dataset
from clipfilter.evaluation.evaluate import assess
from clipfilter.models import load_encoder
from clipfilter.policies.prompts import TEMPLATES

SINGLE = ("a photo of a {}.",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    encoder = load_encoder(args.model)
    data = open_dataset(DataRequest(str(shared_data() / "caltech101" / "caltech101.parquet"))).embed(encoder)
    result = {}
    for name, templates in {"single: " + SINGLE[0]: SINGLE, **TEMPLATES}.items():
        found = assess(encoder, data, templates, style="words").zero_shot
        assert found is not None
        result[name] = {"templates": len(templates), "top1": found.top1, "top5": found.top5}
    if args.json:
        print(json.dumps({"model": args.model, "photos": len(data.image_emb), **result}, indent=2))
        return
    print(f"{args.model}: {len(data.image_emb)} photos")
    for name, numbers in result.items():
        print(f"  {name:28} {numbers['templates']:3} prompts  top-1 {numbers['top1']:.3f}  top-5 {numbers['top5']:.3f}")


if __name__ == "__main__":
    main()
