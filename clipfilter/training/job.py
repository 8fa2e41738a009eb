"""A training run from command to model card: prepare, train, interpolate, measure, write."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfilter.errors import RefusedError
from clipfilter.storage import Directory, is_local
from clipfilter.training.group import Group
from clipfilter.training.settings import TrainSettings
from clipfilter.version import __version__

if TYPE_CHECKING:
    import numpy as np

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
    with _alone(out):
        _same_run(settings, out)
        if (out / RESULT).exists():
            return TrainResult(str(out), json.loads((out / RESULT).read_text(encoding="utf-8")), False)
        facts = _prepare(settings, out, tell)
        if settings.engine == "ray":
            from clipfilter.training.distributed import work_on_ray

            work_on_ray(settings, everywhere, show)
        else:
            from clipfilter.training.worker import work

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
        from clipfilter.training.logs import check_tensorboard

        check_tensorboard()
    if settings.engine == "ray":
        from clipfilter.training.distributed import check_ray_train

        check_ray_train()
    return Path(settings.out)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two trainings must not write one log."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RefusedError(f"another training is writing to {out}: wait for it, or choose another --out.") from None
        yield


def _same_run(settings: TrainSettings, out: Path) -> None:
    """Refuse an OUT that another command began."""
    plan = out / PLAN
    if not plan.exists():
        others = [
            path.name for path in out.iterdir() if path.name not in (".lock", ".pairs", ".tmp", "initial.safetensors")
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
    from clipfilter.training.freezing import describe, freeze
    from clipfilter.training.model import write_random
    from clipfilter.training.pairs import PairRequest, Pairs, collect_pairs
    from clipfilter.training.prefix import Prefix, PrefixStore
    from clipfilter.training.worker import INITIAL, PAIRS, load_start, open_data, threads_of

    if settings.from_scratch:
        write_random(settings.model, out / INITIAL, settings.seed)
    model = load_start(settings)
    if settings.loss == "siglip" and model.logit_bias is None:
        raise RefusedError(
            f"--loss siglip needs a model with a logit bias, which {settings.model} has not: use --loss clip."
        )
    freeze(model.module, settings.train)
    trains = describe(model.module)

    threads = threads_of(settings)
    columns = {"image_column": settings.image_column, "caption_column": settings.caption_column}
    wanted = {"train": PairRequest(settings.source, settings.where, settings.limit, **columns)}
    if settings.dev is not None:
        wanted["dev"] = PairRequest(settings.dev, settings.dev_where)
    elif settings.dev_where:
        wanted["dev"] = PairRequest(settings.source, settings.dev_where, None, **columns)
    if settings.zero_shot is not None:
        wanted["zero-shot"] = PairRequest(settings.zero_shot, label_column=settings.label_column)
    data = {}
    for name, request in wanted.items():
        counts = collect_pairs(request, out / PAIRS / f"{name}.arrow", threads)
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
    tell(f"trains ({settings.train}): {trains}")
    store = PrefixStore(Prefix(model), threads)
    for name in wanted:
        if name != "train" or not settings.augment:
            store.collect(Pairs(out / PAIRS / f"{name}.arrow"), model.preprocess)
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


def _conclude(
    settings: TrainSettings, out: Path, facts: Mapping[str, Any], command: Sequence[str], tell: Callable[[str], None]
) -> dict[str, Any]:
    """Choose the interpolation on one half of dev and zero-shot sets, report on the other, write everything."""
    from clipfilter.models import load_encoder
    from clipfilter.training.card import model_card
    from clipfilter.training.checkpoints import Checkpoints
    from clipfilter.training.freezing import freeze
    from clipfilter.training.measuring import embed_images, measure_pairs, measure_zero_shot
    from clipfilter.training.pairs import Pairs
    from clipfilter.training.prefix import Prefix, PrefixStore
    from clipfilter.training.wiseft import ALPHAS, Point, choose, interpolate
    from clipfilter.training.worker import PAIRS, load_start, open_data, threads_of

    threads = threads_of(settings)
    data = open_data(settings)
    zero_shot_choose = zero_shot_report = None
    labels: list[str] = []
    if settings.zero_shot is not None:
        whole = Pairs(out / PAIRS / "zero-shot.arrow")
        labels = sorted({whole.label(row) for row in range(len(whole))})
        zero_shot_choose, zero_shot_report = whole.halves()
    model = load_start(settings)
    freeze(model.module, settings.train)
    store = PrefixStore(Prefix(model), threads)
    before = {name: tensor.clone() for name, tensor in model.trained_state().items()}
    checkpoints = Checkpoints(out / "checkpoints")
    position = checkpoints.position()
    assert position is not None
    after = checkpoints.weights(position.best_step)

    def measure(
        encoder: Any, scale: float, pairs: Pairs, labelled: Pairs | None, store: PrefixStore | None
    ) -> Measured:
        def embed(some: Pairs) -> np.ndarray:
            quick = store.embed(some) if store else None
            return embed_images(encoder, some, threads) if quick is None else quick

        found: Measured = {**measure_pairs(encoder, embed(pairs), pairs, scale)}
        found["zero_shot_top1"] = measure_zero_shot(encoder, embed(labelled), labelled, labels) if labelled else None
        return found

    def scale_of(state: Mapping[str, Any]) -> float:
        return float(state["logit_scale"].exp())

    chosen_on: dict[str, Measured] = {}
    points = []
    for alpha in (1.0,) if settings.from_scratch else ALPHAS:
        weights = interpolate(before, after, alpha)
        model.load_trained(weights)
        found = measure(model.encoder, scale_of(weights), data.choose, zero_shot_choose, store)
        chosen_on[f"{alpha:g}"] = found
        recall = found["recall_at_10"]
        assert recall is not None
        points.append(Point(alpha, recall, found["zero_shot_top1"]))
        shown = "" if points[-1].zero_shot is None else f", zero-shot top-1 {points[-1].zero_shot:.1%}"
        tell(f"alpha {alpha:.1f}: recall@10 {recall:.1%}{shown}")
    alpha = points[0].alpha if settings.from_scratch else choose(points, settings.max_zero_shot_loss).alpha

    reported = {}
    model.load_trained(before)
    reported["before"] = measure(model.encoder, scale_of(before), data.report, zero_shot_report, store)
    model.load_trained(interpolate(before, after, 1.0))
    model.write(out / FINETUNED)
    model.load_trained(interpolate(before, after, alpha))
    model.write(out / MODEL)
    directory = Directory(str(out))
    config = model.config()
    if config is not None:
        directory.replace(CONFIG, _json(config))
    del model
    # The files themselves are measured: what was rounded to be stored is in the numbers.
    architecture = load_start(settings).load_as
    for name, file in (("after", FINETUNED), ("interpolated", MODEL)):
        encoder = load_encoder(f"{architecture}={out.absolute() / file}", device=settings.device, threads=threads)
        reported[name] = measure(encoder, encoder.logit_scale, data.report, zero_shot_report, None)
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
        "chosen_on": {"pairs": len(data.choose), "labelled": len(zero_shot_choose or ()), "by_alpha": chosen_on},
        "reported_on": {"pairs": len(data.report), "labelled": len(zero_shot_report or ())},
        "reported": reported,
    }
    directory.replace(CARD, model_card(summary, command).encode())
    directory.replace(RESULT, _json(summary))
    directory.clean_scratch(stale_only=False)
    shutil.rmtree(out / PAIRS)
    return summary


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
