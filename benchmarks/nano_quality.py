"""How well a model matches captions and names objects: Flickr8k's dev split and Caltech101, neither used in training.

    python benchmarks/nano_quality.py [--model nano] [--json]

Reads `flickr8k/*.tar` and `caltech101/caltech101.parquet` below $CLIPFILTER_SHARED/data (default: `../shared/data`
beside the repository). Protocol, all images through the product's own loading (`--decode fast` or `exact`):

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
import tarfile
import time
from pathlib import Path

import numpy as np

from clipfilter.images.load import load_image
from clipfilter.models import Encoder, load_encoder

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a drawing of a {}.", "{}")


def shared_data() -> Path:
    """The folder with the measuring sets; exits with a clear sentence where it is missing."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("CLIPFILTER_SHARED", default)) / "data"
    if not folder.is_dir():
        sys.exit(f"{folder} does not exist: set CLIPFILTER_SHARED to the folder that holds data/flickr8k")
    return folder


def flickr_dev(folder: Path) -> tuple[list[bytes], list[str]]:
    """Image bytes and first caption of every photo of split=dev."""
    images, captions = [], []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            rows: dict[str, dict[str, bytes]] = {}
            for member in tar:
                file = tar.extractfile(member)
                if file is not None:
                    key, _, extension = member.name.partition(".")
                    rows.setdefault(key, {})[extension] = file.read()
        for row in rows.values():
            record = json.loads(row["json"])
            if record["split"] == "dev":
                images.append(row["jpg"])
                captions.append(record["captions"][0])
    return images, captions


def embed_images(encoder: Encoder, images: list[bytes], decode: str) -> np.ndarray:
    """Unit vectors float32 [n, dim] of encoded images."""
    parts = []
    for start in range(0, len(images), 64):
        batch = [load_image(data, encoder.preprocess, decode).pixels for data in images[start : start + 64]]
        parts.append(encoder.encode_images(np.stack(batch)))
    return np.concatenate(parts)


def pair_auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive is above a negative (Mann-Whitney), ties counting half."""
    negative = np.sort(negative)
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.mean() / 2 / len(negative))


def caption_quality(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """AUC and recall of matched pairs: images [n, d], texts [n, d], row i belongs to row i."""
    scores = images @ texts.T
    own = scores.diagonal()
    wrong = ~np.eye(len(scores), dtype=bool)
    order = np.random.default_rng(0).permutation(len(scores))
    shuffled = scores[order, np.roll(order, 1)]  # one cycle: no photo keeps its caption
    rank = (scores > own[None, :]).sum(0)  # photos that a caption prefers to its own
    return {
        "caption_auc": pair_auc(own, scores[wrong]),
        "caption_auc_shuffled": pair_auc(own, shuffled),
        **{f"text_to_image_recall@{k}": float((rank < k).mean()) for k in (1, 5, 10)},
    }


def zero_shot(encoder: Encoder, images: np.ndarray, labels: list[str]) -> dict[str, float]:
    """Top-1 and top-5 accuracy over the classes that occur."""
    classes = sorted(set(labels))
    vectors = []
    for label in classes:
        name = label.replace("_", " ").lower()
        mean = encoder.encode_texts([template.format(name) for template in TEMPLATES]).mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    scores = images @ np.stack(vectors).T
    truth = np.array([classes.index(label) for label in labels])
    best = np.argsort(-scores, axis=1)[:, :5]
    return {
        "zero_shot_top1": float((best[:, 0] == truth).mean()),
        "zero_shot_top5": float((best == truth[:, None]).any(1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--decode", default="fast", choices=("fast", "exact"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    import pyarrow.parquet as pq

    folder = shared_data()
    encoder = load_encoder(args.model, threads=args.threads)
    started = time.perf_counter()
    photos, captions = flickr_dev(folder / "flickr8k")
    result = caption_quality(embed_images(encoder, photos, args.decode), encoder.encode_texts(captions))
    table = pq.read_table(folder / "caltech101" / "caltech101.parquet", columns=["image", "label"])
    objects = embed_images(encoder, table["image"].to_pylist(), args.decode)
    result |= zero_shot(encoder, objects, table["label"].to_pylist())
    seconds = time.perf_counter() - started
    if args.json:
        facts = {"fingerprint": encoder.fingerprint, "decode": args.decode, "seconds": round(seconds, 1)}
        print(json.dumps({"model": args.model, **result, **facts}, indent=2))
        return
    print(f"{args.model}: {len(photos)} Flickr8k dev photos, {len(table)} Caltech101 photos, {seconds:.0f} s")
    for name, value in result.items():
        print(f"  {name:24} {value:.4f}")


if __name__ == "__main__":
    main()
