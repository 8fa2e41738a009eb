"""Is the true photo first of ten by its caption? Flickr8k's dev split, which no training has seen.

    python benchmarks/ranking.py [--model nano] [--candidates 10] [--seed 0] [--json]

Each of the 1 000 photos of split=dev stands beside nine others drawn at random (seeded), and `clipfilter.operations.rank.Ranker`
orders the ten by the photo's first caption. Reads `flickr8k/*.tar` below $CLIPFILTER_SHARED/data (default:
`../shared/data` beside the repository). Measures only; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from nano_quality import shared_data

from clipfilter.engine.shard import EmbeddedShard
from clipfilter.engine.stream import embed_stream, open_inputs
from clipfilter.models import Encoder, load_encoder
from clipfilter.operations.rank import Ranker
from clipfilter.sources import open_source


def dev_photos(folder: Path) -> tuple[list[bytes], list[str]]:
    """The encoded photos of split=dev and the first caption of each."""
    source = open_source(str(folder))
    images, captions = [], []
    for shard in source.iter_shards():
        for batch in source.read(shard):
            for row, split in enumerate(batch.column("split").to_pylist()):
                if split == "dev":
                    images.append(batch.column("cf_image")[row].as_py())
                    captions.append(batch.column("cf_captions")[row].as_py()[0])
    return images, captions


def first_of(encoder: Encoder, images: list[bytes], captions: list[str], candidates: int, seed: int) -> np.ndarray:
    """The rank (1 is best) of each photo among itself and `candidates - 1` others, int [n]."""
    (shard,) = embed_stream(open_inputs(images), encoder)
    ranker, draw = Ranker(encoder), np.random.default_rng(seed)
    ranks = np.empty(len(images), np.int64)
    for photo, caption in enumerate(captions):
        others = draw.choice(len(images) - 1, candidates - 1, replace=False)
        chosen = np.append(others + (others >= photo), photo)  # the photo stands last, so that ties count against it
        table = ranker.rank_embedded(caption, [_rows(shard, chosen)])
        ranks[photo] = table["position"].to_pylist().index(candidates - 1) + 1
    return ranks


def _rows(shard: EmbeddedShard, chosen: np.ndarray) -> EmbeddedShard:
    index = pa.array(chosen)
    rows = shard.rows.take(index)
    place = rows.schema.get_field_index("cf_row")
    rows = rows.set_column(place, "cf_row", pa.array(np.arange(len(chosen))))
    return replace(shard, rows=rows, embeddings=shard.embeddings.take(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    images, captions = dev_photos(shared_data() / "flickr8k")
    ranks = first_of(load_encoder(args.model), images, captions, args.candidates, args.seed)
    result = {"first": float((ranks == 1).mean()), "top3": float((ranks <= 3).mean()), "mean_rank": float(ranks.mean())}
    if args.json:
        print(json.dumps({**vars(args), "photos": len(images), **result}, indent=2))
        return
    print(f"{args.model}: the true photo among {args.candidates}, {len(images)} photos, seed {args.seed}")
    print(
        f"  first {result['first']:.1%}, among the first three {result['top3']:.1%}, mean rank {result['mean_rank']:.2f}"
    )


if __name__ == "__main__":
    main()
