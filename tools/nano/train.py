"""Step 2 of nano's training: the heads, from cached features to nano.safetensors and nano.json.

The bodies stay frozen. First the class block's text projection and class vectors learn the vocabulary, then all heads
are trained together; every step of that has three parts:

Captions. InfoNCE on Flickr8k's training captions, on whole vectors and on the caption block alone.

Vocabulary. Any word has to work, not only those of 6 000 photos' captions, and there are no ImageNet photographs here.
So features are made up: a feature of class k is a real one moved along Cov(feature) (w_k - mean w), where w_k is the
classifier's weight row. That is the shift between class means that a linear classifier implies when classes share
their covariance (Fisher's discriminant read backwards); a few random other classes are mixed in as clutter. The texts
are of two kinds, both with a target over the classes:

- phrases of the visual thesaurus (looks_like.tsv), with the classes that photos of such things light up;
- nouns from all of WordNet's visible part that are not in the thesaurus. The target is even over the classes below a
  noun ("crab": four kinds of crab), with a little of softmax(Wu-Palmer similarity), which is all there is for nouns
  with no class below them (2 depth(common) / (depth(noun) + depth(class)), ACL 1994).

Half of the made-up features show one random class, half one to three classes drawn from a text's target. Which texts
of the batch fit follows from Bayes' rule: in proportion to the product of their targets at the classes shown.

Pictures. InfoNCE on drawings and renderings with their names (pictures.py), on white or pasted onto photos: the only
images here of things that are neither in ImageNet nor in the captions. Pairs of like names in a batch are no contrast.

With --hold-out N, N photos and their captions, a fifth of the classes' own nouns, a fifth of the thesaurus's lines and a
tenth of the pictures' names are left out and measured at the end; recipes were chosen that way. With --without-captions
the captions take no part: both blocks learn from the vocabulary and the pictures, and the photos only lend their features'
mean and covariance.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import torch  # noqa: E402
from features import MEAN, SIZE, STD  # noqa: E402
from init_weights import NETWORK, minilm_folder, untrained  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from clipfilter.models.nano.network import Nano, Projection, pack_nano  # noqa: E402

Cache = dict[str, Tensor]  # a file of features.py

BATCH, TEXTS = 384, 512  # photos and as many pictures, texts of the vocabulary per step
ALIKE = 0.75  # cosine of two names' embeddings above which their pictures are no contrast to each other
LOOKS_SHARE = 0.5  # of the thesaurus in the texts
SHOWN, CHANCE = 3, 0.003  # most classes in a made-up photo; chance that one of no target stands in it
LEARNING_RATE, WEIGHT_DECAY, MAX_SCALE = 1e-3, 0.1, 60.0
VOCABULARY_RATE = 3e-3  # learning rate of the first part
SLOW = 0.3  # learning rate in the second part of what the first part taught, relative
CAPTION_WEIGHT = 0.4  # share of the caption block in a cosine: held-out captions want 0.5, words outside them 0.2
CLASS_TEMPERATURE = 1.5  # of the class probabilities
CAPTION_BLOCK_LOSS = 0.5  # weight of the loss on the caption block alone
OWN_LOGIT_GAIN = (5.0, 14.0)  # how far a made-up feature raises its class's logit
KEPT_CONTENT = (0.3, 1.0)  # how much of the real photo's deviation from the mean it keeps
CLUTTER, CLUTTER_SHARE = 3.0, 0.01  # logits of other classes mixed in: standard deviation, share of classes
SIMILARITY_TEMPERATURE, EVEN_SHARE = 0.01, 0.98


class Heads(nn.Module):
    """What is trained. `forward` gives the four blocks, all of unit norm."""

    def __init__(self, class_vectors: Tensor, centre: Tensor, mean: Tensor, std: Tensor, dropout: float) -> None:
        super().__init__()
        inputs, width, codes = NETWORK["image_features"], NETWORK["text_width"], NETWORK["class_dim"]
        hidden, dim = NETWORK["hidden"], NETWORK["caption_dim"]
        self.mean, self.std = mean, std
        self.image = Projection(inputs, hidden, dim, dropout)
        self.text = Projection(width, hidden, dim, dropout / 2)
        self.text_classes = Projection(width, NETWORK["class_hidden"], codes, 0.1)
        for projection in (self.image, self.text, self.text_classes):
            nn.init.zeros_(projection.down.weight)
        with torch.no_grad():
            self.text_classes.down.bias.zero_()
            nn.init.orthogonal_(self.text_classes.linear.weight)
            self.text_classes.linear.bias.copy_(-self.text_classes.linear.weight @ centre)
            start = self.text_classes.linear(class_vectors)
        self.class_vectors = nn.Parameter(F.normalize(start, dim=-1))
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, features: Tensor, logits: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        """Caption blocks of images and texts, class blocks of images and texts."""
        with torch.autocast("cpu", torch.bfloat16):
            image, text = self.image((features - self.mean) / self.std), self.text(texts)
            text_classes = self.text_classes(texts)
        classes = (logits / CLASS_TEMPERATURE).softmax(-1) @ self.class_vectors
        image, text, classes, text_classes = (
            F.normalize(block.float(), dim=-1) for block in (image, text, classes, text_classes)
        )
        return image, text, classes, text_classes


class Vocabulary:
    """Texts with targets over the classes, and made-up image features for every class."""

    def __init__(self, nouns: Cache, looks: Cache, photos: Tensor, weight: Tensor, unseen: Tensor, part: float) -> None:
        """unseen: classes whose own nouns are left out. part: share of the thesaurus's lines that is left out."""
        self.weight = weight
        targets = torch.cat([_noun_targets(nouns, rows) for rows in torch.arange(len(nouns["paths"])).split(2000)])
        leaf, class_leaf = (_leaf(paths) for paths in (nouns["paths"], nouns["class_paths"]))
        lines = torch.randperm(len(looks["classes"]), generator=torch.Generator().manual_seed(1))
        hidden = torch.isin(looks["lines"], lines[: round(part * len(lines))])
        self.vectors = F.normalize(torch.cat([nouns["vectors"], looks["vectors"]]).float(), dim=-1)
        self.targets = torch.cat([targets, looks["classes"][looks["lines"]].half()])
        self.lines = torch.cat([torch.full((len(leaf),), -1), looks["lines"]])  # of the thesaurus; -1: a noun
        self.nouns = (~torch.isin(leaf, class_leaf[unseen])).nonzero()[:, 0]
        self.looks, self.unseen_looks = (len(leaf) + kept.nonzero()[:, 0] for kept in (~hidden, hidden))
        self.classes = torch.tensor(sorted(set(range(len(weight))) - set(unseen.tolist())))
        self.mean = photos.mean(0)
        centred, directions = photos - self.mean, weight - weight.mean(0)
        self.shift = (centred.T @ (centred @ directions.T) / len(photos)).T
        self.gain = (self.shift * directions).sum(1)

    def draw(self, photos: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Made-up features [n, 1280] from n photos' features, which of m texts fit them [n, m] (rows of sum 1 or, where
        none fits, 0), the texts' vectors [m, 384] and targets [m, 1000]."""
        looks = round(LOOKS_SHARE * TEXTS)
        chosen = [
            kind[torch.randint(len(kind), (count,), generator=generator)]
            for kind, count in ((self.nouns, TEXTS - looks), (self.looks, looks))
        ]
        texts = torch.cat(chosen)
        targets = self.targets[texts].float()
        half = len(photos) // 2
        single = self.classes[torch.randint(len(self.classes), (half, 1), generator=generator)].expand(-1, SHOWN)
        about = torch.randint(TEXTS, (len(photos) - half,), generator=generator)
        several = torch.multinomial(targets[about], SHOWN, replacement=True, generator=generator)
        shown = torch.cat([single, several])
        features = self.make_up(photos, shown, generator)
        chances = (targets.T[shown] + CHANCE).log()  # [n, SHOWN, m]
        counted = torch.ones(SHOWN, len(shown), 1)
        counted[1:, :half] = 0  # one class, shown once
        evidence = (chances.transpose(0, 1) * counted).sum(0)
        fits = (targets.T[shown] > 0.02).float().mean(1).amax(1) > 0.5
        return features, evidence.softmax(1) * fits[:, None], self.vectors[texts], targets

    def make_up(self, photos: Tensor, shown: Tensor, generator: torch.Generator) -> Tensor:
        """Features as if each photo showed objects of its classes [n, SHOWN] in random sizes, with clutter."""

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(len(shown), 1, generator=generator) * (high - low) + low

        size = torch.rand(shown.shape, generator=generator) ** 2 + 1e-3
        size = size / size.sum(1, keepdim=True) * uniform(*OWN_LOGIT_GAIN)
        features = self.mean + uniform(*KEPT_CONTENT) * (photos - self.mean)
        for step, classes in zip(size.unbind(1), shown.unbind(1), strict=True):
            features = features + (step / self.gain[classes])[:, None] * self.shift[classes]
        shape = (len(shown), len(self.gain))
        clutter = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < CLUTTER_SHARE)
        with torch.autocast("cpu", torch.bfloat16):
            around = (CLUTTER * clutter / self.gain) @ self.shift
        return (features + around).clamp_min(0)


class Pictures:
    """Named pictures: what pictures.py wrote."""

    def __init__(self, cache: dict[str, Any], part: float) -> None:
        """part: share of the names whose pictures are left out."""
        self.features, self.own = cache["features"].float(), cache["own"]
        self.texts = F.normalize(cache["texts"].float(), dim=-1)
        self.names = cache["names"]
        _, group, counts = self.names.unique(return_inverse=True, return_counts=True)
        hidden = torch.rand(len(counts), generator=torch.Generator().manual_seed(2)) < part
        self.chances = counts.float().rsqrt()[group] * ~hidden[group]  # names with many pictures come less often
        self.unseen = hidden[group].nonzero()[:, 0]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Features [n, 1280], a text for each [n, 384], and which texts are too alike to be a contrast [n, n]."""
        chosen = torch.multinomial(self.chances, count, generator=generator)
        views = torch.randint(len(self.features), (count,), generator=generator)
        told = [self.own[i] for i in chosen.tolist()]
        which = torch.rand(count, generator=generator).tolist()
        texts = self.texts[[own[int(draw * len(own))] for own, draw in zip(told, which, strict=True)]]
        names = self.texts[self.names[chosen]]
        alike = (names @ names.T > ALIKE).fill_diagonal_(False)
        return self.features[views, chosen], texts, alike


def _leaf(paths: Tensor) -> Tensor:
    """The synsets at the paths' ends."""
    return paths.gather(1, (paths != 0).sum(1, keepdim=True) - 1)[:, 0]


def _noun_targets(nouns: Cache, rows: Tensor) -> Tensor:
    """float16 [rows, classes], of sum 1."""
    noun, cls = nouns["paths"][rows][:, None], nouns["class_paths"][None]
    common = ((noun == cls) & (noun != 0)).cumprod(-1).sum(-1)
    depth, class_depth = (noun != 0).sum(-1), (cls != 0).sum(-1)
    near = (2 * common / (depth + class_depth) / SIMILARITY_TEMPERATURE).softmax(-1)
    below = (common == depth).float()
    count = below.sum(1, keepdim=True)
    mixed = EVEN_SHARE * below / count.clamp_min(1) + (1 - EVEN_SHARE) * near
    return torch.where(count > 0, mixed, near).half()


def info_nce(scores: Tensor) -> Tensor:
    """Both directions; row i belongs to column i."""
    target = torch.arange(len(scores))
    return (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2


def text_to_classes(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of texts [m] over all classes [k]."""
    return -(targets * scores.log_softmax(1)).sum(1).mean()


def image_to_texts(scores: Tensor, fit: Tensor) -> Tensor:
    """Cross entropy of images [n] over the texts of the batch [m]."""
    return -(fit * scores.log_softmax(1)).sum(1).sum() / fit.sum()


def whole(caption: Tensor, classes: Tensor) -> Tensor:
    return CAPTION_WEIGHT * caption + (1 - CAPTION_WEIGHT) * classes


def train(args: argparse.Namespace) -> None:
    """Train the heads, print what the held-out part says, and write the model below --out."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images = torch.load(args.cache / "images.pt", weights_only=True).float()
    captions = None
    if not args.without_captions:
        captions = F.normalize(torch.load(args.cache / "captions.pt", weights_only=True).float(), dim=-1)
    nouns, looks = (torch.load(args.cache / name, weights_only=True) for name in ("wordnet.pt", "looks.pt"))
    pictures = None
    if (args.cache / "pictures.pt").exists() and not args.without_pictures:
        loaded = torch.load(args.cache / "pictures.pt", weights_only=True)
        pictures = Pictures(loaded, 0.1 if args.hold_out else 0.0)
    network = untrained()
    classifier = network.image_body.classifier
    weight, bias = classifier.weight.detach(), classifier.bias.detach()
    logits = images @ weight.T + bias

    split = torch.Generator().manual_seed(0)
    order = torch.randperm(images.shape[1], generator=split)
    held_out, rows = order[: args.hold_out], order[args.hold_out :]
    unseen = torch.randperm(len(weight), generator=split)[: 200 if args.hold_out else 0]
    plain = images[:, rows].flatten(0, 1) if args.without_captions else images[0, rows]
    vocabulary = Vocabulary(nouns, looks, plain, weight, unseen, 0.2 if args.hold_out else 0.0)
    centre = vocabulary.vectors.mean(0)
    heads = Heads(nouns["class_vectors"], centre, plain.mean(0), plain.std(0) + 1e-3, args.dropout)
    learn_vocabulary(heads, vocabulary, plain, bias, args, generator)
    taught = [heads.class_vectors, *heads.text_classes.parameters()]
    others = [p for p in heads.parameters() if all(p is not kept for kept in taught)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY, "factor": 1.0},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0, "factor": 1.0},
        {"params": taught, "weight_decay": 0.0, "factor": SLOW},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))

    def photos() -> tuple[Tensor, Tensor]:
        chosen = rows[torch.randint(len(rows), (BATCH,), generator=generator)].unique()
        return torch.randint(len(images), (len(chosen),), generator=generator), chosen

    started = time.perf_counter()
    for step in range(args.steps):
        rate = LEARNING_RATE * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        scale = heads.scale.exp()
        loss = torch.zeros(())
        if captions is not None:
            views, chosen = photos()
            texts = captions[chosen, torch.randint(5, (len(chosen),), generator=generator)]
            image, text, classes, text_classes = heads(images[views, chosen], logits[views, chosen], texts)
            caption_scores = image @ text.T
            loss = info_nce(scale * whole(caption_scores, classes @ text_classes.T))
            loss = loss + CAPTION_BLOCK_LOSS * info_nce(0.7 * scale * caption_scores)

        views, chosen = photos()
        features, fit, texts, targets = vocabulary.draw(images[views, chosen], generator)
        image, text, classes, text_classes = heads(features, features @ weight.T + bias, texts)
        caption_scores, class_scores = image @ text.T, classes @ text_classes.T
        with torch.autocast("cpu", torch.bfloat16):
            text_scores = text_classes @ F.normalize(heads.class_vectors, dim=-1).T
        loss = loss + text_to_classes(scale * text_scores.float(), targets)
        loss = loss + image_to_texts(scale * whole(caption_scores, class_scores), fit)
        loss = loss + 0.5 * image_to_texts(scale * class_scores, fit)
        if pictures is not None:
            features, texts, alike = pictures.draw(BATCH, generator)
            image, text, classes, text_classes = heads(features, features @ weight.T + bias, texts)
            caption_scores, class_scores = image @ text.T, classes @ text_classes.T
            loss = loss + info_nce((scale * whole(caption_scores, class_scores)).masked_fill(alike, -torch.inf))
            loss = loss + CAPTION_BLOCK_LOSS * info_nce((0.7 * scale * caption_scores).masked_fill(alike, -torch.inf))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        heads.scale.data.clamp_(max=math.log(MAX_SCALE))
        if step % 100 == 0 or step == args.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step} loss {loss.item():.3f} scale {scale.item():.1f} {seconds:.0f} s", flush=True)

    heads.eval()
    if args.hold_out:
        if captions is not None:
            measure(heads, images[0, held_out], logits[0, held_out], captions[held_out, 0])
        measure_words(heads, vocabulary, images[0, held_out], bias)
        if pictures is not None:
            measure_pictures(heads, pictures, weight, bias)
    if args.out:
        write(args, network, heads)


def learn_vocabulary(
    heads: Heads,
    vocabulary: Vocabulary,
    photos: Tensor,
    bias: Tensor,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """First part: the class vectors and the class block's text projection, from WordNet and the thesaurus."""
    perceptron = [heads.text_classes.up.weight, heads.text_classes.down.weight]
    rest = [heads.class_vectors, heads.text_classes.linear.weight, heads.text_classes.linear.bias]
    rest += [heads.text_classes.up.bias, heads.text_classes.down.bias]
    groups = [{"params": perceptron, "weight_decay": WEIGHT_DECAY / 2}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=VOCABULARY_RATE, betas=(0.9, 0.98))
    scale = heads.scale.detach().exp()
    for step in range(args.vocabulary_steps):
        for group in optimizer.param_groups:
            ramp = min(1, (step + 1) / 30)
            group["lr"] = VOCABULARY_RATE * ramp * (1 + math.cos(math.pi * step / args.vocabulary_steps)) / 2
        chosen = torch.randint(len(photos), (256,), generator=generator)
        features, fit, texts, targets = vocabulary.draw(photos[chosen], generator)
        with torch.autocast("cpu", torch.bfloat16):
            shares = ((features @ vocabulary.weight.T + bias) / CLASS_TEMPERATURE).softmax(-1)
            classes = F.normalize(shares @ heads.class_vectors, dim=-1)
            text_classes = F.normalize(heads.text_classes(texts), dim=-1)
            names = F.normalize(heads.class_vectors, dim=-1)
            text_scores, scores = text_classes @ names.T, classes @ text_classes.T
        loss = text_to_classes(scale * text_scores.float(), targets) + image_to_texts(scale * scores.float(), fit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"vocabulary step {step} loss {loss.item():.3f}", flush=True)


@torch.inference_mode()
def measure(heads: Heads, features: Tensor, logits: Tensor, texts: Tensor) -> None:
    """Held-out matching with first captions, and the logit scale under which softmax over them is best calibrated."""
    image, text, classes, text_classes = heads(features, logits, texts)
    scores = whole(image @ text.T, classes @ text_classes.T)
    own = scores.diagonal()
    rank = (scores > own).sum(0)
    shuffled = torch.cat([scores.roll(shift, 1).diagonal() for shift in (1, 7, 77)])
    auc = (own[:, None] > shuffled[None, :]).float().mean()
    recalls = {k: round((rank < k).float().mean().item(), 3) for k in (1, 5, 10)}
    grid = torch.arange(5.0, 60.0, 1.0)
    best = grid[torch.stack([info_nce(scale * scores) for scale in grid]).argmin()]
    print(f"held out {len(own)}: AUC {auc:.4f}, text-to-image recall {recalls}, logit scale {best:.0f}")


@torch.inference_mode()
def measure_words(heads: Heads, vocabulary: Vocabulary, photos: Tensor, bias: Tensor) -> None:
    """Top-1 of made-up features among the thesaurus's lines that were left out, one phrase of each; 20 draws."""
    right, oracle = [], []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        mixed = vocabulary.unseen_looks[torch.randperm(len(vocabulary.unseen_looks), generator=generator)]
        texts = torch.tensor(list({vocabulary.lines[i].item(): i.item() for i in mixed}.values()))
        targets = vocabulary.targets[texts].float()
        shown = torch.multinomial(targets, SHOWN, replacement=True, generator=generator)
        some = photos[torch.randint(len(photos), (len(texts),), generator=generator)]
        features = vocabulary.make_up(some, shown, generator)
        logits = features @ vocabulary.weight.T + bias
        image, text, classes, text_classes = heads(features, logits, vocabulary.vectors[texts])
        truth = torch.arange(len(texts))
        best = whole(image @ text.T, classes @ text_classes.T).argmax(1)
        right.append((best == truth).float().mean())
        known = F.normalize(logits.softmax(1).sqrt(), dim=1) @ targets.sqrt().T
        oracle.append((known.argmax(1) == truth).float().mean())
    print(
        f"{len(truth)} unseen lines, made-up features: top-1 {torch.stack(right).mean():.3f}, "
        f"knowing their classes {torch.stack(oracle).mean():.3f}"
    )


@torch.inference_mode()
def measure_pictures(heads: Heads, pictures: Pictures, weight: Tensor, bias: Tensor) -> None:
    """Top-1 and top-5 of the pictures whose names were left out, among those names."""
    names, truth = pictures.names[pictures.unseen].unique(return_inverse=True)
    for features, look in zip(pictures.features, ("on white", "pasted"), strict=True):
        seen = features[pictures.unseen]
        image, _, classes, _ = heads(seen, seen @ weight.T + bias, pictures.texts[:1])
        _, text, _, text_classes = heads(seen[:1], seen[:1] @ weight.T + bias, pictures.texts[names])
        scores = whole(image @ text.T, classes @ text_classes.T)
        rank = (scores > scores.gather(1, truth[:, None])).sum(1)
        shares = [round((rank < k).float().mean().item(), 3) for k in (1, 5)]
        print(f"{len(truth)} pictures {look} of {len(names)} unseen names: top-1, top-5 {shares}")


def write(args: argparse.Namespace, network: Nano, heads: Heads) -> None:
    """nano.safetensors (packed), nano.json, vocab.txt; the input standardisation is folded into the weights."""
    caption = heads.image
    with torch.no_grad():
        for layer in (caption.linear, caption.up):
            layer.weight.div_(heads.std)
            layer.bias.sub_(layer.weight @ heads.mean)
    network.image_head.caption.load_state_dict(caption.state_dict())
    network.image_head.class_vectors.data = heads.class_vectors.data
    network.text_head.caption.load_state_dict(heads.text.state_dict())
    network.text_head.classes.load_state_dict(heads.text_classes.state_dict())
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(pack_nano(network.state_dict()), args.out / "nano.safetensors")
    shutil.copy(minilm_folder() / "vocab.txt", args.out / "vocab.txt")
    config = {
        "edition": 3,
        "architecture": "EfficientNet-Lite2 with ConSE / MiniLM-L6",
        "context_length": NETWORK["positions"],
        "logit_scale": args.logit_scale,
        "preprocess": {
            "size": SIZE,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
            "fill_color": 0,
        },
        "network": {
            **NETWORK,
            "caption_weight": CAPTION_WEIGHT,
            "class_temperature": CLASS_TEMPERATURE,
        },
    }
    (args.out / "nano.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="what features.py wrote")
    parser.add_argument("--out", type=Path, help="folder for nano.safetensors, nano.json, vocab.txt")
    parser.add_argument("--vocabulary-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--without-captions", action="store_true", help="heads that never saw a caption")
    parser.add_argument("--without-pictures", action="store_true", help="leave out what pictures.py wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--logit-scale", type=float, default=29.0, help="as the run with --hold-out 1000 printed it")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
