"""One evaluation from request to numbers: zero-shot where there are labels, retrieval and AUC where there are captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter import defaults
from clipfilter.errors import RefusedError
from clipfilter.evaluation.dataset import DataRequest, Dataset, EvaluationData, open_dataset
from clipfilter.evaluation.labels import LabelNames, Style, name_classes, read_labels, read_templates
from clipfilter.evaluation.measures import Retrieval, ZeroShot, caption_match_auc, retrieval, shuffled_auc, zero_shot
from clipfilter.models import load_encoder
from clipfilter.policies import DEFAULT_TEMPLATES, class_vectors, fill

if TYPE_CHECKING:
    from clipfilter.models import Encoder

#: Of the one wrong caption per image; the same in every evaluation, so that two models meet the same pairs.
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate, and on what. model None: nano, or of a run the model that embedded it (also its dtype).

    labels: a file of class names; templates: a named ensemble or a file (see `labels`).
    """

    data: DataRequest
    model: str | None = None
    device: str = "cpu"
    dtype: defaults.Dtype = "fp32"
    labels: str | None = None
    label_style: Style = "as-is"
    templates: str = DEFAULT_TEMPLATES


@dataclass(frozen=True)
class CaptionMatch:
    """How often an image prefers its own first caption: to every other one, and to one wrong caption per image."""

    pairs: int
    auc: float
    auc_shuffled: float
    seed: int = SHUFFLE_SEED


@dataclass(frozen=True)
class Evaluation:
    """The measures that the data allowed, and all that decides them. `facts` and `counts` are JSON."""

    facts: dict[str, Any]
    counts: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    zero_shot: ZeroShot | None = None
    retrieval: Retrieval | None = None
    caption_match: CaptionMatch | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Shares are between 0 and 1; recall by k as text."""
        result: dict[str, Any] = {**self.facts, **self.counts, "zero_shot": None, "retrieval": None}
        if self.zero_shot is not None:
            result["zero_shot"] = asdict(self.zero_shot) | {
                "classes": len(self.classes),
                "per_class": [
                    {"class": self.classes[index], "n": n, "top1": share}
                    for index, n, share in self.zero_shot.per_class
                ],
            }
        if self.retrieval is not None:
            result["retrieval"] = asdict(self.retrieval) | {
                "image_to_text": {str(k): share for k, share in self.retrieval.image_to_text.items()},
                "text_to_image": {str(k): share for k, share in self.retrieval.text_to_image.items()},
            }
        result["caption_match"] = asdict(self.caption_match) if self.caption_match else None
        return result | {"class_names": self.classes, "notes": self.notes}


def evaluate(request: EvaluateRequest, on_rows: Callable[[int], None] | None = None) -> Evaluation:
    """Embed the data with the model and compute every measure that it allows.

    Raises RefusedError before any work for a request that cannot be done, and where the rows turn out to hold no label
    and no caption; ClipfilterError where the model gives no usable vectors.
    """
    templates = read_templates(request.templates)
    names = read_labels(request.labels) if request.labels else None
    dataset = open_dataset(request.data)
    notes = []
    if names is not None and dataset.label_column is None:
        raise RefusedError("--labels names classes, but no column with labels was found; name it with --label-column.")
    if names is None and dataset.integer_labels:
        sentence = f"the column {dataset.label_column!r} holds numbers; say what they stand for with --labels FILE."
        if request.data.label_column is not None or not dataset.captions:
            raise RefusedError(sentence)
        notes.append(f"no zero-shot classification: {sentence}")
        dataset = replace(dataset, label_column=None)
    encoder = _load(request, dataset)
    data = dataset.embed(encoder, on_rows)
    found = assess(encoder, data, templates, names, request.label_style)
    facts = {
        "source": request.data.source,
        "kind": dataset.kind,
        "where": [f"{name}={value}" for name, value in request.data.where],
        "limit": request.data.limit,
        "label_column": dataset.label_column,
        "caption_column": request.data.options.caption_column,
        "captions": request.data.captions if dataset.captions else None,
        "decode": dataset.base.plan.options["decode"] if dataset.base else request.data.decode,
        "model": encoder.fingerprint["model"],
        "fingerprint": encoder.fingerprint,
        "templates": list(templates) if found.zero_shot else [],
    }
    return replace(found, facts=facts, notes=notes + found.notes)


def assess(
    encoder: Encoder,
    data: EvaluationData,
    templates: Sequence[str],
    names: LabelNames | None = None,
    style: Style = "as-is",
) -> Evaluation:
    """Every measure that embedded data allows; `facts` is left empty.

    Raises RefusedError where there is no label and no caption, or a label without a name.
    """
    labelled = np.flatnonzero(data.label_index >= 0)
    first = data.first_text
    if not len(labelled) and not len(first):
        raise RefusedError("none of the rows has a label or a caption: there is nothing to evaluate against.")
    classes: list[str] = []
    classified = recalled = matched = None
    prompts_truncated = 0
    notes = []
    if len(labelled):
        classes, class_of = name_classes(data.label_values, names, style)
        wanted = class_vectors(encoder, classes, templates)
        prompts_truncated = encoder.count_truncated([fill(t, name) for name in classes for t in templates])
        classified = zero_shot(data.image_emb[labelled], class_of[data.label_index[labelled]], wanted)
        if len(classes) == 1:
            notes.append("there is only one class, so that every image is classified rightly.")
    if len(first):
        recalled = retrieval(data.image_emb, data.text_emb, data.text_image)
        notes += _repeated_captions(data)
    if len(first) > 1:
        images, captions = data.image_emb[data.text_image[first]], data.text_emb[first]
        auc, shuffled = caption_match_auc(images, captions), shuffled_auc(images, captions, SHUFFLE_SEED)
        matched = CaptionMatch(len(first), auc, shuffled)
    for what, cut in (("captions", data.texts_truncated), ("prompts", prompts_truncated)):
        if cut:
            notes.append(f"{cut:,} {what} are longer than {encoder.name} reads and were cut.")
    counts = _counts(data, len(labelled), len(first), prompts_truncated)
    return Evaluation({}, counts, classes, classified, recalled, matched, notes)


def _repeated_captions(data: EvaluationData) -> list[str]:
    texts = len(data.text_emb)
    if data.distinct_texts >= 0.9 * texts:
        return []
    return [
        f"only {data.distinct_texts:,} of {texts:,} captions are different; the same words on another image count "
        "as wrong, so that retrieval and caption matching look worse than they are."
    ]


def _counts(data: EvaluationData, labelled: int, captioned: int, prompts_truncated: int) -> dict[str, Any]:
    """What became of the rows, as `Evaluation.counts` has it."""
    return {
        "rows": data.rows,
        "images": len(data.image_emb),
        "labelled": labelled,
        "captioned": captioned,
        "failed": data.failed,
        "failed_by_class": data.failed_by_class,
        "failures": data.failures,
        "failed_shards": data.failed_shards,
        "damaged_shards": data.damaged_shards,
        "captions_truncated": data.texts_truncated,
        "prompts_truncated": prompts_truncated,
    }


def _load(request: EvaluateRequest, dataset: Dataset) -> Encoder:
    """The model asked for; of a run, the one that embedded it, and no other."""
    if dataset.base is None:
        return load_encoder(
            request.model or defaults.MODEL, device=request.device, dtype=request.dtype, threads=request.data.threads
        )
    recorded = dataset.base.plan.model
    encoder = load_encoder(
        request.model or recorded["model"],
        device=request.device,
        dtype=recorded.get("dtype", "fp32"),
        threads=request.data.threads,
    )
    for name in ("weights_sha256", "architecture"):
        if recorded.get(name) != encoder.fingerprint.get(name):
            raise RefusedError(
                f"the run was embedded with other weights ({recorded['model']}) than {encoder.name} loads now ({name} "
                "differs); leave out --model, or evaluate the source instead of the run."
            )
    return encoder
