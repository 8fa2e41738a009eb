"""Step 1b of nano's training: drawings and renderings with names, for things that neither ImageNet nor the captions show.

    python tools/nano/pictures.py --npm FOLDER --flickr8k FLICKR8K --out CACHE

Reads Debian's `openclipart-png`, `openclipart-svg` (titles and keywords) and `sweethome3d-furniture` where they are
installed, and below --npm the unpacked packages `emoji-datasource-google`, `@lobehub/fluent-emoji-3d` and `emojibase-data`
(names). Their licences: public domain, CC-BY and CC0, Apache-2.0, MIT, MIT.

Writes below --out: `pictures.pt` with `features` (float16 [2 views, n, 1280]), `texts` (float16 [m, 384]), `names` (int64
[n], the text that is the bare name) and `own` (per picture, the numbers of the texts that name it). The views: the picture
on white, and its figure cut out and pasted onto a part of a photo or a plain colour, so that a crab drawn on white is not
only known on white.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import torch  # noqa: E402
from features import SIZE, bodies, pooled, text_features, training_rows, view  # noqa: E402
from PIL import Image, ImageDraw, ImageFile, ImageFilter  # noqa: E402
from torch import Tensor  # noqa: E402

from clipfilter.models.nano.network import Nano  # noqa: E402

Named = tuple[Path | io.BytesIO, str, list[str]]  # a file, what it shows, keywords

LARGEST, SMALLEST = 320, 24  # pixels: pictures are reduced to one, and left out below the other
TEMPLATES = ("a photo of a {}.", "{}", "a picture of a {}.", "a drawing of a {}.")
BARE = 1  # which of them is the bare name
TAGS = 6
# Names and keywords that say what a file is for, not what it shows.
NO_THING = re.compile(r"theme|collection|pattern|font|icon|button|arrow|unknown|untitled|^cross(es)? |kanji|roadsign")
VAGUE = frozenset(
    {"icons", "icon", "clipart", "clip art", "unsorted", "svg", "png", "shape", "shapes", "computer", "application"}
    | {"image", "media", "externalsource", "hash", "action", "theme", "other", "misc", "scpts", "special", "blend swap"}
    | {"white", "black", "cartoon", "color", "symbol", "symbols", "signs", "sign"}
)
SKIN_TONES = re.compile("1f3f[b-f]")
WHITE = 247  # of 255: a border of such pixels is background
MARK = (255, 0, 255)  # stands for background while a figure is cut out


@dataclass(frozen=True)
class Picture:
    """JPEG bytes on white, what it shows, and keywords."""

    data: bytes
    name: str
    tags: tuple[str, ...]


def clean(text: str) -> str:
    """A name without numbers, underscores and article, in lower case."""
    text = re.sub(r"\s+", " ", re.sub(r"[_\-\d]+", " ", text)).strip(" .").lower()
    return re.sub(r"^(a|an|the) ", "", text)


def clipart(share: Path) -> Iterator[Named]:
    """Open Clip Art: PNG files, and the titles and keywords inside the SVG files of the same names."""
    for path in sorted((share / "png").rglob("*.png")):
        source = share / "svg" / path.relative_to(share / "png").with_suffix(".svg")
        if not source.exists():
            continue
        head = source.read_text(encoding="utf-8", errors="replace")[:6000]
        title = re.search(r"<cc:Work.*?<dc:title>(.*?)</dc:title>", head, re.DOTALL)
        words = (
            re.sub(r"(?i)\b(by|icon|clip ?art|svg|png|architetto( francesco rollandin)?)\b", " ", title[1])
            if title
            else ""
        )
        yield path, clean(words), [*re.findall(r"<rdf:li>(.*?)</rdf:li>", head), path.parent.name]


def emoji(npm: Path) -> Iterator[Named]:
    """Noto's and Fluent's emoji under their English names; neither flags nor skin tones."""
    told = {}
    for entry in json.loads((npm / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8")):
        for one in (entry, *entry.get("skins", ())):
            told[one["hexcode"].lower()] = (one["label"], one.get("tags", []))
    folders = (npm / "emoji-datasource-google" / "img" / "google" / "64", npm / "fluent-emoji-3d" / "assets")
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        code = path.stem.lower()
        found = told.get(code) or told.get(code.replace("-fe0f", ""))
        if found and not SKIN_TONES.search(code) and not found[0].startswith("flag:"):
            yield path, clean(found[0]), found[1]


def furniture(folder: Path) -> Iterator[Named]:
    """The rendered icons of Sweet Home 3D's catalogues."""
    for path in sorted(folder.glob("*.sh3f")):
        with zipfile.ZipFile(path) as archive:
            text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
            keys = dict(re.findall(r"^(\w+#\d+)=(.*?)\s*$", text, re.MULTILINE))
            for key, icon in keys.items():
                kind, _, number = key.partition("#")
                if kind == "icon" and icon.lstrip("/") in archive.namelist():
                    tags = [*keys.get(f"tags#{number}", "").split(","), keys[f"category#{number}"]]
                    yield io.BytesIO(archive.read(icon.lstrip("/"))), clean(keys[f"name#{number}"]), tags


def collect(npm: Path, share: Path) -> list[Picture]:
    """All pictures that decode, once each, with a usable name."""
    pictures: dict[str, Picture] = {}
    everything = (clipart(share / "openclipart"), emoji(npm), furniture(share / "sweethome3d" / "furniture"))
    for file, name, tags in (row for source in everything for row in source):
        if not 2 < len(name) < 60 or NO_THING.search(name):
            continue
        try:
            drawn = Image.open(file).convert("RGBA")
        except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow raises the first two for broken PNG files
            continue
        if min(drawn.size) < SMALLEST:
            continue
        flat = Image.new("RGBA", drawn.size, "white")
        flat.alpha_composite(drawn)
        flat.thumbnail((LARGEST, LARGEST))
        out = io.BytesIO()
        flat.convert("RGB").save(out, "JPEG", quality=92)
        words = [tag.strip().lower() for tag in tags]
        kept = tuple(dict.fromkeys(word for word in words if 2 < len(word) < 40 and word not in VAGUE))[:TAGS]
        pictures.setdefault(hashlib.sha1(flat.tobytes()).hexdigest(), Picture(out.getvalue(), name, kept))
    return list(pictures.values())


def pasted(data: bytes, photos: list[bytes], draw: random.Random) -> np.ndarray:
    """The figure on another background, uint8 [3, SIZE, SIZE]; a random crop of pictures that fill their frame."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if (border > WHITE).all(1).mean() < 0.6:
        return view(data, "flipped crop" if draw.random() < 0.5 else "crop", draw)
    framed = Image.new("RGB", (image.width + 2, image.height + 2), "white")
    framed.paste(image, (1, 1))
    ImageDraw.floodfill(framed, (0, 0), MARK, thresh=24)
    figure = (np.asarray(framed)[1:-1, 1:-1] != MARK).any(2)
    mask = Image.fromarray((figure * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))
    box = mask.getbbox() or (0, 0, *image.size)
    image, mask = image.crop(box), mask.crop(box)
    if draw.random() < 0.5:
        image, mask = (side.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for side in (image, mask))
    if draw.random() < 0.6:
        ground = Image.fromarray(view(draw.choice(photos), "crop", draw).transpose(1, 2, 0))
        if draw.random() < 0.6:
            ground = ground.filter(ImageFilter.GaussianBlur(draw.uniform(1, 5)))
    else:
        ground = Image.new("RGB", (SIZE, SIZE), tuple(draw.randint(0, 255) for _ in range(3)))
    scale = draw.uniform(0.55, 1.0) * SIZE / max(image.size)
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    corner = draw.randint(0, SIZE - size[0]), draw.randint(0, SIZE - size[1])
    ground.paste(image.resize(size, Image.Resampling.BICUBIC), corner, mask.resize(size, Image.Resampling.BICUBIC))
    return np.asarray(ground).transpose(2, 0, 1)


def picture_features(network: Nano, pictures: list[Picture], photos: list[bytes]) -> Tensor:
    """Pooled features float16 [2, n, 1280] of both views."""
    draw = random.Random(1)
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, len(pictures), 8):
        batch = [picture.data for picture in pictures[start : start + 8]]
        looks = [[view(data, "whole", draw) for data in batch], [pasted(data, photos, draw) for data in batch]]
        for parts, look in zip(views, looks, strict=True):
            parts.append(pooled(network, look))
        if start % 1000 == 0:
            print("pictures", start, flush=True)
    return torch.stack([torch.cat(parts) for parts in views])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm", type=Path, required=True, help="folder with the unpacked npm packages")
    parser.add_argument(
        "--share", type=Path, default=Path("/usr/share"), help="where the Debian packages are installed"
    )
    parser.add_argument(
        "--flickr8k", type=Path, required=True, help="shards of Flickr8k, whose training photos are backgrounds"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ImageFile.LOAD_TRUNCATED_IMAGES = True

    pictures = collect(args.npm, args.share)
    texts: dict[str, int] = {}
    own, names = [], []
    for picture in pictures:
        told = [template.format(picture.name) for template in TEMPLATES]
        if picture.tags:
            told.append(", ".join(picture.tags))
        numbers = [texts.setdefault(text, len(texts)) for text in told]
        own.append(numbers)
        names.append(numbers[BARE])
    print(f"{len(pictures)} pictures, {len(set(names))} names, {len(texts)} texts", flush=True)
    network, tokenizer = bodies()
    with torch.inference_mode():
        vectors = text_features(network, tokenizer, list(texts))
        features = picture_features(network, pictures, training_rows(args.flickr8k)[0])
    torch.save(
        {"features": features, "texts": vectors, "names": torch.tensor(names), "own": own}, args.out / "pictures.pt"
    )


if __name__ == "__main__":
    main()
