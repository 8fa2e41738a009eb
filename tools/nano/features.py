"""Step 1 of nano's training: the frozen bodies' outputs for Flickr8k's training part and WordNet's texts, cached.

Writes below --out: `images.pt` (float16 [4 views, 6000, 1280] pooled features), `captions.pt` (float16 [6000, 5, 384])
and `wordnet.pt` (embeddings of nouns, and where WordNet has them). See README.md for the command.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np

from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import timm.data  # noqa: E402
import torch  # noqa: E402
from init_weights import minilm_folder, untrained  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402
from wordnet import LONGEST_PATH, class_names, path_to, read_nouns, visible_nouns  # noqa: E402

from clipfilter.models.nano.network import Nano  # noqa: E402

SIZE, MEAN, STD = 240, 127 / 255, 128 / 255
# Views of each photo, and the seeds of their crops: those of edition 1, so that its features can be made again.
VIEWS = {"whole": "", "flipped": "", "crop": "['crop0']", "flipped crop": "['flip', 'crop1']"}


def training_rows(folder: Path) -> tuple[list[bytes], list[list[str]]]:
    """Image bytes and the five captions of split=train, in the shards' order. No other split is touched."""
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
            if record["split"] == "train":
                images.append(row["jpg"])
                captions.append(record["captions"])
    return images, captions


def view(data: bytes, name: str, draw: random.Random) -> np.ndarray:
    """One view of a photo as uint8 [3, SIZE, SIZE]: whole or a random crop of 45 to 100 % area, perhaps mirrored."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if "crop" in name:
        area, aspect = draw.uniform(0.45, 1.0), np.exp(draw.uniform(-0.25, 0.25))
        width = min(image.width, int(image.width * np.sqrt(area * aspect)))
        height = min(image.height, int(image.height * np.sqrt(area / aspect)))
        left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
        image = image.crop((left, top, left + width, top + height))
    if "flipped" in name:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def image_features(network: Nano, images: list[bytes], name: str) -> Tensor:
    """Pooled features [n, 1280] of one view of every photo."""
    draw = random.Random(VIEWS[name])
    parts = []
    for start in range(0, len(images), 4):
        pixels = np.stack([view(data, name, draw) for data in images[start : start + 4]])
        batch = ((torch.from_numpy(pixels).float() / 255 - MEAN) / STD).bfloat16()
        features = network.image_body.forward_features(batch.contiguous(memory_format=torch.channels_last))
        parts.append(features.float().mean((2, 3)).half())
        if start % 1000 == 0:
            print(name, start, flush=True)
    return torch.cat(parts)


def text_features(network: Nano, tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Mean-pooled MiniLM embeddings [n, 384] (not normalised)."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out = torch.empty(len(ids), 384)
    for start in range(0, len(order), 64):
        rows = order[start : start + 64]
        batch = torch.zeros(len(rows), len(ids[rows[-1]]), dtype=torch.long)
        for i, row in enumerate(rows):
            batch[i, : len(ids[row])] = torch.tensor(ids[row])
        out[rows] = network.text_body(batch).float()
    return out.half()


def wordnet_features(network: Nano, tokenizer: Tokenizer, folder: Path) -> dict[str, Tensor]:
    """The nouns' embeddings float16 [n, 384] and paths int64 [n, LONGEST_PATH] (0 fills up); the same of the classes."""
    synsets = read_nouns(folder)
    ids = timm.data.ImageNetInfo().label_names()
    nouns = visible_nouns(synsets, ids)
    names = class_names(synsets, ids)
    flat = [text for group in names for text in group]
    vectors = torch.nn.functional.normalize(text_features(network, tokenizer, flat).float(), dim=-1)
    own = torch.stack([rows.mean(0) for rows in vectors.split([len(group) for group in names])])

    def padded(paths: list[tuple[int, ...]]) -> Tensor:
        return torch.tensor([[*path, *[0] * (LONGEST_PATH - len(path))] for path in paths])

    return {
        "vectors": text_features(network, tokenizer, [noun.text for noun in nouns]),
        "paths": padded([noun.path for noun in nouns]),
        "class_vectors": own,
        "class_paths": padded([path_to(synsets, int(name[1:])) for name in ids]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, required=True, help="folder with the shards of Flickr8k")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    network = untrained()
    network.place(torch.device("cpu"), torch.bfloat16)  # twice as fast; its rounding is small beside the crops'
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    images, captions = training_rows(args.flickr8k)
    with torch.inference_mode():
        torch.save(wordnet_features(network, tokenizer, args.wordnet), args.out / "wordnet.pt")
        flat = [caption for five in captions for caption in five]
        torch.save(text_features(network, tokenizer, flat).view(-1, 5, 384), args.out / "captions.pt")
        torch.save(torch.stack([image_features(network, images, name) for name in VIEWS]), args.out / "images.pt")
    (args.out / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


if __name__ == "__main__":
    main()
