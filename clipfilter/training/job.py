"""A training run from command to model card: prepare, train, interpolate, measure, write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from clipfilter.errors import RefusedError
from clipfilter.models import Encoder, load_encoder
from clipfilter.scratch import only_one
from clipfilter.storage import SCRATCH, Directory, is_local
from clipfilter.training.card import model_card
from clipfilter.training.checkpoints import Checkpoints
from clipfilter.training.distributed import check_ray_train, work_on_ray
from clipfilter.training.freezing import describe
from clipfilter.training.group import Group
from clipfilter.training.logs import check_tensorboard
from clipfilter.training.measuring import embed_images, measure_pairs, measure_zero_shot
from clipfilter.training.model import write_random
from clipfilter.training.pairs import PairRequest, Pairs, collect_pairs
from clipfilter.training.settings import TrainSettings
from clipfilter.training.wiseft import ALPHAS, Point, choose, interpolate
from clipfilter.training.worker import INITIAL, PAIRS, Start, open_data, threads_of, work
from clipfilter.version import __version__

PLAN, RESULT, CARD = "train.json", "result.json", "MODEL_CARD.md"
Measured = dict[str, "float | None"]
MODEL, FINETUNED, CONFIG = "model.safetensors", "finetuned.safetensors", "open_clip_config.json"


@dataclass(frozen=True)
class TrainResult:
    """`summary` is what result.json holds; `computed` is False when the run was finished before."""

    out: str
    summary: dict[str, Any]
    computed: bool


def train(
    settings: TrainSettings,
    *,
    command: Sequence[str] = ("clipfilter", "train"),
    tell: Callable[[str], None] = lambda line: None,
    show: Callable[[Any], None] | None = None,
) -> TrainResult:
    """Train (or continue, or find finished) the run in `settings.out`.

    command: for the model card. tell: gets what a person should read before training: data and what trains. show: gets a
    `loop.Shown` after each step.

    Raises RefusedError before work begins; ClipfilterError when training fails.
    """
    everywhere = settings.out.startswith("file://")  # says that the disk is mounted on every machine
    settings = replace(settings, out=settings.out.removeprefix("file://"))
    out = _check(settings)
    with only_one(out, f"another training is writing to {out}: wait for it, or choose another --out."):
        _same_run(settings, out)
        if (out / RESULT).exists():
            return TrainResult(str(out), json.loads((out / RESULT).read_text(encoding="utf-8")), False)
        facts = _prepare(settings, out, tell)
        if settings.engine == "ray":
            work_on_ray(settings, everywhere, show)
        else:
            work(settings, Group(), show)
        tell("interpolating between before and after")
        summary = _conclude(settings, out, facts, command, tell)
    return TrainResult(str(out), summary, True)


def _check(settings: TrainSettings) -> Path:
    if not is_local(settings.out):
        raise RefusedError(
            f"--out {settings.out} must be a local path, or file:///... of a disk that every machine has mounted there."
        )
    if settings.from_scratch and ("=" in settings.model or "/" in settings.model or settings.model.startswith("nano")):
        raise RefusedError(f"--from-scratch takes a bare open_clip architecture (ViT-S-32), not {settings.model}.")
    if "tensorboard" in settings.log:
        check_tensorboard()
    if settings.engine == "ray":
        check_ray_train()
    return Path(settings.out)


def _same_run(settings: TrainSettings, out: Path) -> None:
    """Refuse an OUT that another command began."""
    plan = out / PLAN
    if not plan.exists():
        others = [
            path.name
            for path in out.iterdir()
            if path.name not in (".lock", ".pairs", "initial.safetensors") and not path.name.startswith(SCRATCH)
        ]
        if others:
            raise RefusedError(f"{out} holds something else ({others[0]}): choose another --out.")
        return
    different = settings.differences(json.loads(plan.read_text(encoding="utf-8"))["settings"])
    if different:
        raise RefusedError(
            f"{out} was begun by another command ({'; '.join(different)}): repeat that command, or choose another --out."
        )


def _prepare(settings: TrainSettings, out: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Read the data once, load the model once, and say what will be done. Returns what the model card needs."""

    if settings.from_scratch:
        write_random(settings.model, out / INITIAL, settings.seed)
    start = Start.of(settings)
    model = start.model
    if settings.loss == "siglip" and model.logit_bias is None:
        raise RefusedError(
            f"--loss siglip needs a model with a logit bias, which {settings.model} has not: use --loss clip."
        )
    trains = describe(model.module)
    wanted = _requests(settings)
    data = _collect(settings, wanted, start.threads, tell)
    tell(f"trains ({settings.train}): {trains}")
    for name in wanted:
        if name != "train" or not settings.augment:
            start.store.collect(Pairs(out / PAIRS / f"{name}.arrow"), model.preprocess)
    if not (out / PLAN).exists():
        plan = {"settings": settings.to_json(), "model": model.encoder.fingerprint, "clipfilter": __version__}
        directory = Directory(str(out))
        directory.replace(PLAN, _json(plan))
        directory.clean_scratch(stale_only=False)
    else:
        begun = json.loads((out / PLAN).read_text(encoding="utf-8"))["model"]["weights_sha256"]
        if begun != model.encoder.fingerprint["weights_sha256"]:
            raise RefusedError(f"{settings.model} is now another file than when {out} was begun: choose another --out.")
    return {"data": data, "trains": trains, "start": model.encoder.fingerprint}


def _requests(settings: TrainSettings) -> dict[str, PairRequest]:
    """The pairs to collect, by the name of their file."""

    columns: dict[str, Any] = {name: getattr(settings, name) for name in ("image_column", "caption_column", "private")}
    wanted = {"train": PairRequest(settings.source, settings.where, settings.limit, **columns)}
    if settings.dev is not None:
        wanted["dev"] = PairRequest(settings.dev, settings.dev_where)
    elif settings.dev_where:
        wanted["dev"] = PairRequest(settings.source, settings.dev_where, None, **columns)
    if settings.zero_shot is not None:
        wanted["zero-shot"] = PairRequest(settings.zero_shot, label_column=settings.label_column)
    return wanted


def _collect(
    settings: TrainSettings, wanted: Mapping[str, PairRequest], threads: int, tell: Callable[[str], None]
) -> dict[str, dict[str, str]]:
    """Collect the pairs; what the model card says of each set. Raises RefusedError where there are too few."""

    data = {}
    for name, request in wanted.items():
        counts = collect_pairs(request, Path(settings.out) / PAIRS / f"{name}.arrow", threads)
        conditions = f" where {', '.join(request.where)}" if request.where else ""
        data[name] = {"source": request.url + conditions, "rows": counts.sentence()}
        tell(f"{name}: {counts.sentence()}")
    opened = open_data(settings)
    if "dev" not in data:
        held = len(opened.choose) + len(opened.report)
        data["dev"] = {"source": "held out of the training pairs", "rows": f"{held:,} rows"}
        tell(f"dev: {held:,} rows held out")
    if min(len(opened.choose), len(opened.report)) < 2:
        raise RefusedError("the dev set is too small to be halved: give --dev or --dev-where with more rows.")
    if len(opened.train) < settings.step_pairs:
        raise RefusedError(
            f"a step needs {settings.step_pairs} pairs (batch size x accumulate x workers), but there are only "
            f"{len(opened.train)}: lower --batch-size or --accumulate."
        )
    return data


@dataclass(frozen=True)
class _Exam:
    """What a model is measured on: one half of the dev pairs, and of the labelled images of the zero-shot set."""

    pairs: Pairs
    labelled: Pairs | None
    labels: list[str]

    def measure(self, encoder: Encoder, scale: float, embed: Callable[[Pairs], np.ndarray]) -> Measured:
        """embed: float32 [n, dim] of the images of some pairs. scale: the factor of the cosines."""

        found: Measured = {**measure_pairs(encoder, embed(self.pairs), self.pairs, scale), "zero_shot_top1": None}
        if self.labelled:
            found["zero_shot_top1"] = measure_zero_shot(encoder, embed(self.labelled), self.labelled, self.labels)
        return found

    def sizes(self) -> dict[str, int]:
        return {"pairs": len(self.pairs), "labelled": len(self.labelled or ())}


def _exams(settings: TrainSettings) -> tuple[_Exam, _Exam]:
    """(what the interpolation is chosen on, what is reported)."""

    data = open_data(settings)
    if settings.zero_shot is None:
        return _Exam(data.choose, None, []), _Exam(data.report, None, [])
    whole = Pairs(Path(settings.out) / PAIRS / "zero-shot.arrow")
    labels = sorted({whole.label(row) for row in range(len(whole))})
    choose, report = whole.halves()
    return _Exam(data.choose, choose, labels), _Exam(data.report, report, labels)


def _conclude(
    settings: TrainSettings, out: Path, facts: Mapping[str, Any], command: Sequence[str], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Choose the interpolation on one half of dev and zero-shot sets, report on the other, write everything."""

    choose_on, report_on = _exams(settings)
    start = Start.of(settings)
    model = start.model
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    reported = {"before": _measure_state(start, before, report_on)}
    checkpoints = Checkpoints(out / "checkpoints")
    position = checkpoints.position()
    assert position is not None
    after = checkpoints.weights(position.best_step)
    chosen_on, alpha = _choose_alpha(settings, start, before, after, choose_on, tell)
    for file, share in ((FINETUNED, 1.0), (MODEL, alpha)):
        model.load_trained(interpolate(before, after, share))
        model.write(out / file)
    directory = Directory(str(out))
    config, architecture = model.config(), model.load_as
    if config is not None:
        directory.replace(CONFIG, _json(config))
    del start, model
    reported |= _measure_files(settings, out, architecture, report_on)
    summary = {
        "clipfilter": __version__,
        "settings": settings.to_json(),
        "load": f"{architecture}={Path(settings.out) / MODEL}",
        **facts,
        "step_pairs": settings.step_pairs,
        "steps": position.step,
        "epochs": position.epoch,
        "best_step": position.best_step,
        "alpha": alpha,
        "chosen_on": {**choose_on.sizes(), "by_alpha": chosen_on},
        "reported_on": report_on.sizes(),
        "reported": reported,
    }
    directory.replace(CARD, model_card(summary, command).encode())
    directory.replace(RESULT, _json(summary))
    directory.clean_scratch(stale_only=False)
    shutil.rmtree(out / PAIRS)
    return summary


def _measure_state(start: Start, state: Mapping[str, Tensor], exam: _Exam) -> Measured:
    start.model.load_trained(state)
    return exam.measure(start.model.encoder, float(state["logit_scale"].exp()), start.embed)


def _choose_alpha(
    settings: TrainSettings,
    start: Start,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    exam: _Exam,
    tell: Callable[[str], None],
) -> tuple[dict[str, Measured], float]:
    """(the measures by interpolation, the one that is taken); from scratch there is nothing to go back to."""

    chosen_on: dict[str, Measured] = {}
    points = []
    for alpha in (1.0,) if settings.from_scratch else ALPHAS:
        found = chosen_on[f"{alpha:g}"] = _measure_state(start, interpolate(before, after, alpha), exam)
        recall, zero_shot = found["recall_at_10"], found["zero_shot_top1"]
        assert recall is not None
        points.append(Point(alpha, recall, zero_shot))
        shown = "" if zero_shot is None else f", zero-shot top-1 {zero_shot:.1%}"
        tell(f"alpha {alpha:.1f}: recall@10 {recall:.1%}{shown}")
    return chosen_on, points[0].alpha if settings.from_scratch else choose(points, settings.max_zero_shot_loss).alpha


def _measure_files(settings: TrainSettings, out: Path, architecture: str, exam: _Exam) -> dict[str, Measured]:
    """The measures of the files that were written: what was rounded to be stored is in the numbers."""

    threads = threads_of(settings)
    reported = {}
    for name, file in (("after", FINETUNED), ("interpolated", MODEL)):
        encoder = load_encoder(f"{architecture}={out.absolute() / file}", device=settings.device, threads=threads)
        reported[name] = exam.measure(encoder, encoder.logit_scale, partial(embed_images, encoder, threads=threads))
    return reported


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
