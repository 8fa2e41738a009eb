"""The page of `policy diff`: what a change of policy does to a dataset, in counts and in pictures."""

from __future__ import annotations

from collections import Counter

from clipfilter.decisions import ESCALATE, LIMITS, MISSING
from clipfilter.operations import Comparison, Flip, Side
from clipfilter.policies import OVERRIDE_RULE as OVERRIDE
from clipfilter.report import text
from clipfilter.report.examples import Example, Examples
from clipfilter.report.markup import dot, note, place_of, plural, table
from clipfilter.report.page import document
from clipfilter.report.thumbnails import add_thumbnails
from clipfilter.sources import Shard

_DECISIONS = (("keep", "Kept"), ("review", "To review"), ("reject", "Rejected"))
_BANDS = (*LIMITS, ESCALATE, MISSING, "keep")


def diff_page(found: Comparison, thumbnails: str) -> str:
    """The whole HTML document. thumbnails: "none", "blur" or "show"; what either policy does not keep is blurred."""
    examples = {id(flip): _example(flip) for flip in found.flips}
    problem = None
    if thumbnails != "none":
        shards = {name: Shard.from_json(shard) for name, shard in found.shards.items()}
        by_bucket = {("", ""): list(examples.values())}
        problem = add_thumbnails(Examples(by_bucket, shards), found.source, thumbnails)
    title = f"{found.before.name} {found.before.version} against {found.after.name} {found.after.version}"
    header = (
        f'<header>\n<p class="kicker">Policy change on <bdi>{text.esc(text.place(found.run), 200)}</bdi>, '
        f"dataset version {int(found.dataset_version)}, model {text.esc(found.model)}</p>\n<h1>{_title(found)}</h1>\n</header>\n"
    )
    sections = [_summary(found), _rules(found), _flips(found, examples, problem)]
    return document(title, header, sections, "the stored embeddings of the run; nothing was written to it")


def _title(found: Comparison) -> str:
    if found.before.name == found.after.name:
        return f"{text.esc(found.after.name)}: version {found.before.version} to {found.after.version}"
    return f"{text.esc(found.before.name)} to {text.esc(found.after.name)}"


def _summary(found: Comparison) -> str:
    share = text.share(found.flipped, found.rows)
    said = f"Of {plural(found.rows, 'image')}, <b>{found.flipped:,}</b> ({share}) would be decided differently."
    rows = []
    for name, shown in _DECISIONS:
        before, after = found.before.decisions[name], found.after.decisions[name]
        rows.append([f"{dot(name)} {shown}", f"{before:,}", f"{after:,}", _signed(after - before)])
    changes = [
        [f"{_chip(a)} to {_chip(b)}", f"{count:,}", text.share(count, found.rows)]
        for (a, b), count in sorted(found.changes.items(), key=lambda item: -item[1])
    ]
    parts = [f'<p class="lead">{said}</p>', table(["Decision", "#Before", "#After", "#Change"], rows)]
    if changes:
        parts.append(table(["What changes", "#Images", "#Of all"], changes))
    return '<section id="summary" aria-label="Summary">\n' + "\n".join(parts) + "\n</section>"


def _rules(found: Comparison) -> str:
    names = list(dict.fromkeys([*found.before.rules, *found.after.rules]))
    rows = [[f"<bdi>{text.esc(name)}</bdi>", _bands(found.before, name), _bands(found.after, name)] for name in names]
    body = table(["Rule", "Before", "After"], rows) if rows else note("Neither policy stops any image.")
    return (
        f'<section id="rules">\n<h2>Rules</h2>\n<p>How many images each rule puts into a band.</p>\n{body}\n</section>'
    )


def _bands(side: Side, rule: str) -> str:
    counts = side.rules.get(rule, Counter())
    return ", ".join(f"{counts[band]:,} {band}" for band in _BANDS if counts.get(band)) or "–"


def _flips(found: Comparison, examples: dict[int, Example], problem: str | None) -> str:
    parts = ['<section id="flips">\n<h2>What changes, seen</h2>']
    if not found.flips:
        return "\n".join([*parts, note("No image changes its decision."), "</section>"])
    parts.append(note("A uniform sample of each kind of change, the same every time."))
    if problem:
        parts.append(note(text.esc(problem)))
    for change in dict.fromkeys((flip.before, flip.after) for flip in found.flips):
        flips = [flip for flip in found.flips if (flip.before, flip.after) == change]
        cards = "".join(_card(flip, examples[id(flip)]) for flip in flips)
        heading = f"{_chip(change[0])} to {_chip(change[1])}: {plural(found.changes[change], 'image')}"
        plain = " no-images" if all(examples[id(flip)].image is None for flip in flips) else ""
        parts.append(
            f'<article class="rule examples{plain}"><h3>{heading}</h3><ul class="cards many">{cards}</ul></article>'
        )
    return "\n".join(parts) + "\n</section>"


def _card(flip: Flip, example: Example) -> str:
    parts = []
    if example.image is not None:
        seen = "Blurred picture" if example.blurred else "Picture"
        alt = text.esc(f"{seen}: {flip.caption or flip.key}", 200)
        parts.append(f'<img src="{example.image}" alt="{alt}" loading="lazy" decoding="async">')
    if flip.caption:
        parts.append(f'<p class="caption"><bdi>{text.esc(flip.caption, 220)}</bdi></p>')
    for label, reasons in (("Before", flip.reasons_before), ("After", flip.reasons_after)):
        said = "; ".join(_reason(reason) for reason in reasons) or "kept"
        parts.append(f'<p class="small">{label}: {said}</p>')
    return f'<li>{"".join(parts)}<p class="key">{place_of(flip.key, flip.path)}</p></li>'


def _reason(reason: dict[str, object]) -> str:
    rule, score, limit = text.esc(reason["rule"], 60), reason["score"], reason["threshold"]
    if reason["rule"] == OVERRIDE:
        return f"a person decided {text.esc(reason['band'], 20)}"
    if reason["band"] == "escalate":
        return f"escalated by {rule}: on a list of known pictures"
    if reason["band"] == "tighten":
        return f"{rule} tightens thresholds"
    if not isinstance(score, float) or not isinstance(limit, float):
        return f"{rule} could not be evaluated"
    said = f"{reason['band']} by {rule}, {text.score(score, limit)} beyond {text.score(limit, score)}"
    return said + (f", nearest “<bdi>{text.esc(reason['nearest'], 60)}</bdi>”" if reason["nearest"] else "")


def _example(flip: Flip) -> Example:
    # Shown clearly only when both policies keep it, which a flip never is: "blur" blurs every one.
    return Example(
        flip.commit, flip.path, flip.row, flip.key, flip.caption, flip.sha256, None, None, [], hidden=flip.hidden
    )


def _chip(decision: str) -> str:
    return f'<span class="chip {decision}">{decision}</span>'


def _signed(change: int) -> str:
    return f"{change:+,}".replace("-", "−") if change else "0"
