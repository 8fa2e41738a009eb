"""The model card of a trained model: data, recipe, numbers, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

ROWS = (
    ("recall_at_10", "recall@10, mean of both directions"),
    ("image_to_text_at_10", "recall@10, image to text"),
    ("text_to_image_at_10", "recall@10, text to image"),
    ("auc", "caption matching AUC"),
    ("zero_shot_top1", "zero-shot top-1"),
)


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(measure, one text per model) of the `reported` measures, for the terminal and for the card."""
    models = result["reported"]
    return [
        (
            title,
            [
                "" if m[key] is None else f"{m[key]:.4f}" if key == "auc" else f"{100 * m[key]:.1f} %"
                for m in models.values()
            ],
        )
        for key, title in ROWS
        if any(m[key] is not None for m in models.values())
    ]


def model_card(result: Mapping[str, Any], command: Sequence[str]) -> str:
    """MODEL_CARD.md for the `result` that result.json holds."""
    settings, models = result["settings"], list(result["reported"])
    model = _inline(settings["model"])
    weights = f"weights sha256 `{result['start']['weights_sha256'][:16]}`"
    began = f"{model} with random weights" if settings["from_scratch"] else f"{model} ({weights})"
    sets = [f"| {name} | {_cell(facts['source'])} | {_cell(facts['rows'])} |" for name, facts in result["data"].items()]
    numbers = [f"| {title} | {' | '.join(values)} |" for title, values in table_rows(result)]
    return f"""# {model}{"" if settings["from_scratch"] else ", fine-tuned"}

Made by `clipfilter train` {result["clipfilter"]}. Load it with `--model {_inline(result["load"])}`.

## Data

| | source | rows |
| --- | --- | --- |
{_lines(sets)}
## Recipe

Started from {began}; trained: {_inline(settings["train"])} ({result["trains"]}).
{settings["loss"]} loss over {result["step_pairs"]} pairs per step, {result["steps"]} steps in {result["epochs"]} epochs, \
AdamW with peak rate {settings["lr"]:g} and weight decay {settings["weight_decay"]:g}, {settings["dtype"]}, \
seed {settings["seed"]}, {"random resized crops" if settings["augment"] else "no augmentation"}.
model.safetensors is the interpolation (1 - a) before + a after with a = {result["alpha"]:g} \
(WiSE-FT, arXiv:2109.01903); finetuned.safetensors is the model after training.

## Numbers

Measured on the half of the dev and zero-shot sets that chose nothing: neither the epoch nor the interpolation.

| | {" | ".join(models)} |
| --- |{" ---: |" * len(models)}
{_lines(numbers)}
## Command

```
{_inline(shlex.join(command))}
```
"""


def _lines(rows: Sequence[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _inline(text: str) -> str:
    """Text that ends no code span or line."""
    return " ".join(str(text).replace("`", "'").split())


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|").replace("<", "&lt;")
