"""Generate n images of a prompt, keep the best k: `clipfilter.best_of` with a text-to-image pipeline.

    python pipelines/rank_generated.py "a red circle" --n 12 --k 3 --out best
    python pipelines/rank_generated.py "a lighthouse in a storm" --pipeline stabilityai/stable-diffusion-2-1 \\
        --n 16 --k 4 --policy generated-safety.yaml --model ViT-L-14/openai --steps 30 --out best

Without --pipeline the images come from `Shapes`, a stand-in that draws: good for trying this out, and what the test uses.
A --pipeline is loaded by diffusers (`pip install diffusers`), which needs a network or its cache, and a GPU to be of use.
`best_of` works with any object that is called like one of its pipelines:

    pipeline(prompt, num_images_per_prompt=b, generator=[b generators], ...) -> an object with .images

Every image is written as DIR/RANK-seed-SEED.png, and DIR/ranking.json holds all candidates with scores and reasons.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageDraw

import clipfilter

COLOURS = ("red", "green", "blue", "yellow", "black")
FORMS = ("circle", "square", "triangle")


class Shapes:
    """Draws one coloured shape per image, whatever the prompt says; called like a diffusers pipeline."""

    def __init__(self, size: int = 224) -> None:
        self.size = size

    def __call__(
        self,
        prompt: str,
        *,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        **options: Any,
    ) -> SimpleNamespace:
        """`images`: Pillow images, one per generator; the same generator state draws the same image."""
        generators = [generator] * num_images_per_prompt if not isinstance(generator, Sequence) else generator
        return SimpleNamespace(images=[self._draw(one) for one in generators])

    def _draw(self, generator: torch.Generator | None) -> Image.Image:
        colour, form, x, y = torch.randint(0, 2**16, (4,), generator=generator).tolist()
        image = Image.new("RGB", (self.size, self.size), "white")
        draw, side = ImageDraw.Draw(image), self.size // 2
        left, top = x % side, y % side
        box = (left, top, left + side, top + side)
        fill = COLOURS[colour % len(COLOURS)]
        match FORMS[form % len(FORMS)]:
            case "circle":
                draw.ellipse(box, fill)
            case "square":
                draw.rectangle(box, fill)
            case _:
                draw.polygon([(left, top + side), (left + side, top + side), (left + side / 2, top)], fill)
        return image


def load_pipeline(name: str | None, device: str) -> Any:
    """The stand-in, or a pipeline of diffusers on this device."""
    if name is None:
        return Shapes()
    from diffusers import DiffusionPipeline  # not one of clipfilter's dependencies

    dtype = torch.float16 if device.startswith("cuda") else torch.float32
    return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype).to(device)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--pipeline", help="model id or folder for diffusers [default: the stand-in that draws]")
    parser.add_argument("--n", type=int, default=8, help="images to generate")
    parser.add_argument("--k", type=int, default=2, help="images to keep")
    parser.add_argument("--by", default="clip", help="clip or head:NAME")
    parser.add_argument("--policy", help="drop what this policy rejects")
    parser.add_argument("--model", help="the model that ranks [default: nano]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument("--batch-size", type=int, default=1, help="images per call of the pipeline")
    parser.add_argument("--steps", type=int, help="num_inference_steps of the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", required=True, help="folder for the images and ranking.json")
    args = parser.parse_args(arguments)

    best = clipfilter.best_of(
        load_pipeline(args.pipeline, args.device),
        args.prompt,
        args.n,
        args.k,
        by=args.by,
        policy=args.policy,
        model=args.model,
        device=args.device,
        seed=args.seed,
        batch_size=args.batch_size,
        **({} if args.steps is None else {"num_inference_steps": args.steps}),
    )
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for place, (image, seed) in enumerate(zip(best.images, best.seeds, strict=True), 1):
        image.save(folder / f"{place}-seed-{seed}.png")
    (folder / "ranking.json").write_text(json.dumps(best.table.to_pylist(), indent=1), encoding="utf-8")
    for row in best.table.to_pylist():
        reasons = ", ".join(f"{reason['rule']} {reason['band']}" for reason in row["cf_reasons"] or [])
        print(f"{row['rank'] or '-':>4}  {row['image']:<14} {row['score']:.3f}  {reasons}")


if __name__ == "__main__":
    main()
