"""Which parameters train: a readable rule becomes a set of names."""

from __future__ import annotations

import re
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clipfilter.errors import RefusedError

Tower = Literal["image", "text"]
_PART = re.compile(r"(?:(image|text):)?(?:(all|heads)|last-(\d+)-blocks?)")

#: Where the towers of open_clip (its own, timm's, Hugging Face's) and nano keep their blocks, in order.
_BLOCKS: dict[Tower, tuple[str, ...]] = {
    "image": (
        "visual.transformer.resblocks", "visual.trunk.blocks", "visual.trunk.stages", "visual.layer", "image_body.blocks",
    ),
    "text": (
        "transformer.resblocks", "text.transformer.resblocks", "text.transformer.encoder.layer", "text_body.blocks",
    ),
}  # fmt: skip
_HEADS: dict[Tower, re.Pattern[str]] = {
    "image": re.compile(r"visual\.(proj|head|attnpool|attn_pool)\b|visual\.trunk\.head\b|image_head\."),
    "text": re.compile(r"(text\.)?text_projection\b|text\.proj\b|text_head\."),
}
#: What comes before the blocks.
_STEM: dict[Tower, re.Pattern[str]] = {
    "image": re.compile(
        r"visual\.(conv\d|bn\d|class_embedding|positional_embedding|ln_pre)\b"
        r"|visual\.trunk\.(patch_embed|cls_token|reg_token|pos_embed|norm_pre|stem|conv_stem|bn1)\b"
        r"|image_body\.(conv_stem|bn1)\b"
    ),
    "text": re.compile(
        r"(text\.)?(token_embedding|positional_embedding|cls_emb)\b|text\.transformer\.embeddings\b"
        r"|text_body\.(word|position|norm)\b"
    ),
}


def trainable_names(module: nn.Module, rule: str) -> set[str]:
    """The names of the parameters that `rule` trains.

    rule: `all`; `heads` (the projections into the common space); `last-N-blocks` (the last N blocks and all that follows
    them); any of these for one tower, `image:heads` or `text:last-2-blocks`, the other one frozen; or several, with
    commas. The temperature (and bias) of the logits always trains.

    Raises RefusedError for another rule, or one that the model has not enough blocks for.
    """
    names = [name for name, _ in module.named_parameters()]
    chosen = {name for name in names if tower_of(name) is None}
    for part in rule.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise RefusedError(
                f"--train {part.strip()!r} is unknown: use heads, last-2-blocks, all, or image:... and text:... of them."
            )
        towers: tuple[Tower, ...] = ("image", "text")
        if match[1]:
            towers = ("image",) if match[1] == "image" else ("text",)
        for tower in towers:
            mine = [name for name in names if tower_of(name) == tower]
            if match[2] == "all":
                chosen.update(mine)
            elif match[2] == "heads":
                chosen.update(name for name in mine if _HEADS[tower].match(name))
            else:
                chosen.update(_last_blocks(module, tower, int(match[3]), mine))
    return chosen


def freeze(module: nn.Module, rule: str) -> list[tuple[str, nn.Parameter]]:
    """Let only what `rule` names train; returns those parameters with their names, in the module's order."""
    chosen = trainable_names(module, rule)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [(name, parameter) for name, parameter in module.named_parameters() if name in chosen]


def train_mode(module: nn.Module) -> None:
    """Training mode (dropout, batch statistics) for what trains; frozen parts stay as they are at inference."""
    module.eval()
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        below = list(part.parameters())
        if below and all(p.requires_grad for p in below):
            part.train()  # with its children, those without parameters (dropout) too
        elif any(p.requires_grad for p in own) and not isinstance(part, _BatchNorm):
            part.training = True


def tower_of(name: str) -> Tower | None:
    """The tower that a parameter belongs to; None for the temperature and the bias of the logits."""
    if name.startswith("logit_"):
        return None
    return "image" if name.startswith(("visual.", "image_")) else "text"


def describe(module: nn.Module) -> str:
    """What trains, in one line: tensors and parameters of each tower."""
    parts = []
    for tower in ("image", "text"):
        mine = [p for name, p in module.named_parameters() if tower_of(name) == tower]
        training = [p for p in mine if p.requires_grad]
        share = sum(p.numel() for p in training), sum(p.numel() for p in mine)
        parts.append(f"{tower} tower {len(training)} of {len(mine)} tensors, {share[0]:,} of {share[1]:,} parameters")
    return "; ".join(parts)


def _last_blocks(module: nn.Module, tower: Tower, count: int, names: list[str]) -> set[str]:
    blocks = blocks_of(module, tower)
    if not blocks:
        raise RefusedError(f"the blocks of this model's {tower} tower are not known: use --train heads or all.")
    if not 1 <= count <= len(blocks):
        raise RefusedError(f"the {tower} tower has {len(blocks)} blocks: last-N-blocks needs N between 1 and that.")
    last = tuple(prefix + "." for prefix in blocks[-count:])
    every = tuple(prefix + "." for prefix in blocks)
    return {name for name in names if name.startswith(last) or not (name.startswith(every) or _STEM[tower].match(name))}


def blocks_of(module: nn.Module, tower: Tower) -> list[str]:
    """The names of a tower's blocks, first to last; stages of several blocks are taken apart."""
    modules = dict(module.named_modules())
    for path in _BLOCKS[tower]:
        parts = [f"{path}{i}" for i in range(1, 5)] if path == "visual.layer" else [path]
        if all(part in modules for part in parts):
            found: list[str] = []
            for part in parts:
                found += _flat(modules[part], part)
            return found
    return []


def frozen_blocks(module: nn.Module, tower: Tower) -> list[str]:
    """The leading blocks of a tower that are frozen, with everything before them; none when that trains."""
    trained = [name for name, p in module.named_parameters() if p.requires_grad and tower_of(name) == tower]
    if any(_STEM[tower].match(name) for name in trained):
        return []
    frozen: list[str] = []
    for block in blocks_of(module, tower):
        if any(name.startswith(block + ".") for name in trained):
            break
        frozen.append(block)
    return frozen


def _flat(module: nn.Module, name: str) -> list[str]:
    found: list[str] = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}"
        if isinstance(child, nn.Sequential):
            found += _flat(child, full)
        elif isinstance(blocks := getattr(child, "blocks", None), nn.Sequential):
            found += _flat(blocks, f"{full}.blocks")
        else:
            found.append(full)
    return found
