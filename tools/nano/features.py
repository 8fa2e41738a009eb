"""Step 1 of nano's training: the frozen bodies' outputs for photos, captions and the vocabulary, cached.

Writes below --out: `images.pt` (float16 [4 views, 6000, 1280] pooled features), `captions.pt` (float16 [6000, 5, 384]),
`wordnet.pt` (embeddings of nouns, and where WordNet has them) and `looks.pt` (the same of the thesaurus). With --photos
in place of --flickr8k there are no captions, and 36 views of every photo. See README.md for the commands.
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
from looks_like import phrases, read_looks  # noqa: E402
from PIL import Image  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402
from wordnet import LONGEST_PATH, class_names, path_to, read_nouns, visible_nouns  # noqa: E402

from clipfilter.models.nano.network import Nano  # noqa: E402

SIZE, MEAN, STD = 240, 127 / 255, 128 / 255
# Views of each photo, and the seeds of their crops: those of edition 1, so that its features can be made again.
VIEWS = {"whole": "", "flipped": "", "crop": "['crop0']", "flipped crop": "['flip', 'crop1']"}
MANY_CROPS = {f"{kind} {i}": f"{kind} {i}" for i in range(18) for kind in ("crop", "flipped crop")}


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


def readable_photos(folder: Path) -> list[bytes]:
    """Bytes of the folder's JPEG files that decode."""
    images = []
    for path in sorted(folder.glob("*.jpg")):
        try:
            Image.open(path).convert("RGB")
        except OSError:
            continue
        images.append(path.read_bytes())
    return images


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


def bodies() -> tuple[Nano, Tokenizer]:
    """The frozen bodies in bfloat16, and the texts' tokenizer."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    network = untrained()
    network.place(torch.device("cpu"), torch.bfloat16)  # twice as fast; its rounding is small beside the crops'
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    return network, tokenizer


def pooled(network: Nano, views: list[np.ndarray]) -> Tensor:
    """Pooled features float16 [n, 1280] of views uint8 [3, SIZE, SIZE]."""
    batch = ((torch.from_numpy(np.stack(views)).float() / 255 - MEAN) / STD).bfloat16()
    features = network.image_body.forward_features(batch.contiguous(memory_format=torch.channels_last))
    return features.float().mean((2, 3)).half()


def image_features(network: Nano, images: list[bytes], name: str, seed: str) -> Tensor:
    """Pooled features [n, 1280] of one view of every photo."""
    draw = random.Random(seed)
    parts = []
    for start in range(0, len(images), 4):
        parts.append(pooled(network, [view(data, name, draw) for data in images[start : start + 4]]))
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


def wordnet_features(network: Nano, tokenizer: Tokenizer, folder: Path, known: set[str]) -> dict[str, Tensor]:
    """Embeddings float16 [n, 384] and paths int64 [n, LONGEST_PATH] (0 fills up) of the nouns that are not `known`,
    and of the classes."""
    synsets = read_nouns(folder)
    ids = timm.data.ImageNetInfo().label_names()
    nouns = [noun for noun in visible_nouns(synsets, ids) if noun.word not in known]
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


def look_features(network: Nano, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """The thesaurus: embeddings float16 [n, 384] of phrases, each phrase's line [n], the lines' classes [lines, 1000]."""
    draw = random.Random(0)
    looks = read_looks()
    texts = [(text, line) for line, look in enumerate(looks) for term in look.terms for text in phrases(term, draw)]
    classes = torch.zeros(len(looks), 1000)
    for line, look in enumerate(looks):
        classes[line, list(look.classes)] = torch.tensor(list(look.classes.values()))
    return {
        "vectors": text_features(network, tokenizer, [text for text, _ in texts]),
        "lines": torch.tensor([line for _, line in texts]),
        "classes": classes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--flickr8k", type=Path, help="folder with the shards of Flickr8k")
    source.add_argument("--photos", type=Path, help="folder of any JPEG photos, for heads without captions")
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    network, tokenizer = bodies()
    known = {term for look in read_looks() for term in look.terms}
    with torch.inference_mode():
        torch.save(look_features(network, tokenizer), args.out / "looks.pt")
        torch.save(wordnet_features(network, tokenizer, args.wordnet, known), args.out / "wordnet.pt")
        if args.photos:
            images, views = readable_photos(args.photos), MANY_CROPS
        else:
            (images, captions), views = training_rows(args.flickr8k), VIEWS
            flat = [caption for five in captions for caption in five]
            torch.save(text_features(network, tokenizer, flat).view(-1, 5, 384), args.out / "captions.pt")
        seen = [image_features(network, images, name, seed) for name, seed in views.items()]
        torch.save(torch.stack(seen), args.out / "images.pt")


if __name__ == "__main__":
    main()
