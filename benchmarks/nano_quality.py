"""How well a model matches captions and names objects: Flickr8k's dev split and Caltech101, neither used in training.

    python benchmarks/nano_quality.py [--model nano] [--json]

Reads `flickr8k/*.tar` and `caltech101/caltech101.parquet` below $CLIPFILTER_SHARED/data (default: `../shared/data`
beside the repository). Protocol, all images through the product's own loading (`--decode fast` or `exact`), embeddings
rounded to float16 as a run stores them, measures those of `clipfilter evaluate`:

- caption AUC: the 1 000 photos of split=dev with their first caption. Probability that a photo's cosine to its own
  caption is above its cosine to a wrong one, over all 1 000 x 999 wrong pairs (and, as `shuffled`, with one wrong
  caption per photo from a seeded permutation without fixed points).
- text-to-image recall@k: first caption per photo as the query, the 1 000 photos as the gallery.
- zero-shot top-1: 2 020 photos, 101 classes; label with "_" as a space and in lower case; the class vector is the
  normalised mean of the normalised embeddings of the templates below.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from clipfilter.evaluation.dataset import DataRequest, open_dataset
from clipfilter.evaluation.evaluate import Evaluation, assess
from clipfilter.models import Encoder, load_encoder

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a drawing of a {}.", "{}")


def shared_data() -> Path:
    """The folder with the measuring sets; exits with a clear sentence where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("CLIPFILTER_SHARED", default)) / "data"
    if not folder.is_dir():
        sys.exit(f"{folder} does not exist: set CLIPFILTER_SHARED to the folder that holds data/flickr8k")
    return folder


def measure(encoder: Encoder, request: DataRequest) -> Evaluation:
    """Everything that the labels and first captions of a data set allow."""
    return assess(encoder, open_dataset(request).embed(encoder), TEMPLATES, style="words")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--decode", default="fast", choices=("fast", "exact"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    folder = shared_data()
    encoder = load_encoder(args.model, threads=args.threads)
    started = time.perf_counter()
    how = {"decode": args.decode, "threads": args.threads}
    photos = measure(encoder, DataRequest(str(folder / "flickr8k"), where=(("split", "dev"),), **how))
    objects = measure(encoder, DataRequest(str(folder / "caltech101" / "caltech101.parquet"), **how))
    seconds = time.perf_counter() - started
    assert photos.caption_match is not None
    assert photos.retrieval is not None
    assert objects.zero_shot is not None
    result = {
        "caption_auc": photos.caption_match.auc,
        "caption_auc_shuffled": photos.caption_match.auc_shuffled,
        **{f"text_to_image_recall@{k}": share for k, share in photos.retrieval.text_to_image.items()},
        "zero_shot_top1": objects.zero_shot.top1,
        "zero_shot_top5": objects.zero_shot.top5,
    }
    if args.json:
        facts = {"fingerprint": encoder.fingerprint, "decode": args.decode, "seconds": round(seconds, 1)}
        print(json.dumps({"model": args.model, **result, **facts}, indent=2))
        return
    counts = photos.counts["images"], objects.counts["images"]
    print(f"{args.model}: {counts[0]} Flickr8k dev photos, {counts[1]} Caltech101 photos, {seconds:.0f} s")
    for name, value in result.items():
        print(f"  {name:24} {value:.4f}")


if __name__ == "__main__":
    main()
