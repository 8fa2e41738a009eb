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
    settings = result["settings"]
    names = list(result["reported"])
    lines = [
        f"# {_inline(settings['model'])}, fine-tuned"
        if not settings["from_scratch"]
        else f"# {_inline(settings['model'])}",
        "",
        f"Made by `clipfilter train` {result['clipfilter']}. Load it with `--model {_inline(result['load'])}`.",
        "",
        "## Data",
        "",
        "| | source | rows |",
        "| --- | --- | --- |",
    ]
    for name, facts in result["data"].items():
        lines.append(f"| {name} | {_cell(facts['source'])} | {_cell(facts['rows'])} |")
    lines += [
        "",
        "## Recipe",
        "",
        f"Started from {_inline(settings['model'])}"
        + (
            " with random weights"
            if settings["from_scratch"]
            else f" (weights sha256 `{result['start']['weights_sha256'][:16]}`)"
        )
        + f"; trained: {_inline(settings['train'])} ({result['trains']}).",
        f"{settings['loss']} loss over {result['step_pairs']} pairs per step, {result['steps']} steps in "
        f"{result['epochs']} epochs, "
        f"AdamW with peak rate {settings['lr']:g} and weight decay {settings['weight_decay']:g}, {settings['dtype']}, "
        f"seed {settings['seed']}, {'random resized crops' if settings['augment'] else 'no augmentation'}.",
        f"model.safetensors is the interpolation (1 - a) before + a after with a = {result['alpha']:g} "
        "(WiSE-FT, arXiv:2109.01903); finetuned.safetensors is the model after training.",
        "",
        "## Numbers",
        "",
        "Measured on the half of the dev and zero-shot sets that chose nothing: neither the epoch nor the interpolation.",
        "",
        f"| | {' | '.join(names)} |",
        "| --- |" + " ---: |" * len(names),
    ]
    lines += [f"| {title} | {' | '.join(values)} |" for title, values in table_rows(result)]
    lines += ["", "## Command", "", "```", _inline(shlex.join(command)), "```", ""]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Text that ends no code span or line."""
    return " ".join(str(text).replace("`", "'").split())


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|").replace("<", "&lt;")
