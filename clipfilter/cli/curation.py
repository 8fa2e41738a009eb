"""`curate ...`, `import` and `forget`: dataset-level filters, runs from embeddings made elsewhere, removal of rows."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipfilter import defaults
from clipfilter.cli.options import Json, Run, Seed
from clipfilter.cli.printing import print_json
from clipfilter.errors import RefusedError

if TYPE_CHECKING:
    from clipfilter.runs import Totals

curate_app = typer.Typer(
    no_args_is_help=True,
    help="Dataset-level filters: duplicates, balancing, DataComp's baselines.",
    rich_markup_mode=None,
)

OutRun = Annotated[str, typer.Option("--out", "-o", help="Run directory to write: the same rows with further columns.")]


class BaselineName(enum.StrEnum):
    basic = "basic"
    clip_score = "clip-score"
    laion2b = "laion2b"
    image_based = "image-based"
    text_based = "text-based"


@curate_app.command("dedup")
def dedup(
    run: Run,
    out: OutRun,
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Equal bytes of the encoded image.")] = True,
    near: Annotated[
        int, typer.Option(help="Perceptual hashes that differ in at most so many of 64 bits; -1 for not at all.")
    ] = 4,
    semantic: Annotated[
        float | None, typer.Option(help="Embeddings whose cosine is at least this, 0.95 for example [default: none].")
    ] = None,
    prefer: Annotated[
        str, typer.Option(help="Number of which the highest is kept: a column, or pixels, min_side, ...; uid for none.")
    ] = "pixels",
    clusters: Annotated[
        int | None, typer.Option(min=1, help="Clusters within which embeddings are compared [default: rows / 1000].")
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Find duplicates in a run; a copy of the run has them in columns that policies can reject."""
    from clipfilter.curation import DedupOptions, find_duplicates

    options = DedupOptions(
        exact, None if near == -1 else near, semantic, None if prefer == "uid" else prefer, clusters, seed
    )
    found = find_duplicates(run, out, options)
    if as_json:
        print_json(found.to_json())
        return
    for kind, count in found.duplicates.items():
        typer.echo(f"{count:>12,}  {kind} duplicates")
    typer.echo(f"{found.to_json()['kept']:>12,}  of {found.rows:,} rows stay")
    typer.echo(f"run          {found.out}")


@curate_app.command("score")
def score(
    run: Run,
    out: OutRun,
    negclip: Annotated[bool, typer.Option("--negclip", help="negCLIPLoss against a fixed bank: cf_negclip.")] = False,
    normsim: Annotated[
        str | None, typer.Option(metavar="TARGET", help=".npy of embeddings by the run's model: cf_normsim.")
    ] = None,
    p: Annotated[Literal["2", "inf"], typer.Option("--p", help="Norm of NormSim.")] = "inf",
    bank: Annotated[int, typer.Option(min=1, help="Captioned rows in the bank of negCLIPLoss.")] = 32_768,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Add scores that compare a row with other rows; metadata and fraction rules can use them."""
    from clipfilter.curation import add_scores

    _print(add_scores(run, out, negclip=negclip, target=normsim, p=float(p), bank_size=bank, seed=seed), as_json)


@curate_app.command("balance")
def balance(
    run: Run,
    out: OutRun,
    entries: Annotated[str, typer.Option(help="Text file with one entry per line.")],
    t: Annotated[int, typer.Option("--t", min=1, help="Captions of an entry that are kept as they are.")] = 20_000,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Balance captions over a list of entries as MetaCLIP does: cf_balanced is true for what stays."""
    from clipfilter.curation import add_balance

    _print(add_balance(run, out, entries, t=t, seed=seed), as_json)


@curate_app.command("datacomp")
def datacomp(
    metadata: Annotated[str, typer.Argument(metavar="METADATA", help="Folder of DataComp's Parquet (and npz) files.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Subset file to write, .npy of u8,u8, sorted.")],
    baseline: Annotated[
        list[BaselineName], typer.Option(help="Which baseline; several are intersected.", show_default=False)
    ],
    arch: Annotated[Literal["l14", "b32"], typer.Option(help="Scores of clip-score.")] = "l14",
    threshold: Annotated[
        float | None, typer.Option(help="Threshold of clip-score [default: the published one].")
    ] = None,
    fraction: Annotated[float | None, typer.Option(help="Or: the best share of all rows, with ties.")] = None,
    centroids: Annotated[str | None, typer.Option(help="image-based: .npy of the pool's centroids.")] = None,
    target: Annotated[str | None, typer.Option(help="image-based: .npy of target embeddings.")] = None,
    wordnet: Annotated[str | None, typer.Option(help="text-based: WordNet's dict folder.")] = None,
    entities: Annotated[str | None, typer.Option(help="text-based: file of synset ids (ImageNet-21k).")] = None,
    language_column: Annotated[
        str, typer.Option(help="Column of ISO codes; detected from the text where it is missing or null.")
    ] = "language",
    as_json: Json = False,
) -> None:
    """Apply DataComp's baselines to DataComp's metadata and write the uid subset."""
    from clipfilter.curation import make_baselines, select, write_subset

    baselines = make_baselines(
        [str(name) for name in baseline], metadata, arch=arch, threshold=threshold, fraction=fraction,
        centroids=centroids, target=target, wordnet=wordnet, entities=entities, language_column=language_column,
    )  # fmt: skip
    chosen = select(metadata, baselines, language_column)
    path = write_subset(chosen.uids, out)
    if as_json:
        print_json({"out": path, "rows": chosen.rows, "kept": len(chosen.uids)})
    else:
        typer.echo(f"{len(chosen.uids):,} of {chosen.rows:,} uids in {path}")


@curate_app.command("reshard")
def reshard(
    tars: Annotated[str, typer.Argument(metavar="TARS", help="Folder of webdataset tars with uid in their json.")],
    subset: Annotated[str, typer.Option(help="Subset file, .npy of u8,u8, sorted.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder for the new tars.")],
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows per new tar.")] = defaults.ROWS_PER_SHARD,
    as_json: Json = False,
) -> None:
    """Reduce tars to the rows of a uid subset, as DataComp's resharder does."""
    from dataclasses import asdict

    from clipfilter.operations import reshard as run_reshard

    result = run_reshard(tars, subset, out, rows_per_shard)
    if as_json:
        print_json(asdict(result))
        return
    for problem in result.problems[:10]:
        typer.echo(f"note: {problem}", err=True)
    if len(result.problems) > 10:
        typer.echo(f"note: and {len(result.problems) - 10:,} more (all of them with --json)", err=True)
    typer.echo(f"{result.written:,} of {result.read:,} rows in {result.tars:,} tars at {out}")


def import_(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="clip-retrieval's embeddings folder, or DataComp's metadata with npz.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Run directory to write (path or URL).")],
    model: Annotated[str, typer.Option(help="The model that made the embeddings; only its texts are encoded later.")],
    arrays: Annotated[
        str | None, typer.Option(help="npz: prefix of the arrays, l14 or b32 [default: the one of the model's size].")
    ] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with captions [default: caption or text].")] = None,
    uid_column: Annotated[str | None, typer.Option(help="Column with uids [default: uid].")] = None,
    key_column: Annotated[
        str | None, typer.Option(help="Column with keys [default: key, image_path or url, else row numbers].")
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="Rows per shard of the run.")] = defaults.ROWS_PER_SHARD,
    as_json: Json = False,
) -> None:
    """Make a run of embeddings that exist already: filter, verify and search without images and without a GPU."""
    from clipfilter.operations import ImportOptions, import_embeddings

    options = ImportOptions(model, arrays, caption_column, uid_column, key_column, rows_per_shard)
    _print(import_embeddings(folder, out, options), as_json)


def forget(
    run: Run,
    uids: Annotated[
        str | None, typer.Option(help="Rows to remove: a .txt with one cf_uid per line, or a .npy of u8,u8.")
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(help="File or folder elsewhere (labels, exports, pages) to search too; repeatable."),
    ] = None,
    receipt: Annotated[
        str | None, typer.Option(help="File to write the receipt to, besides the one in RUN/receipts.")
    ] = None,
    check: Annotated[str | None, typer.Option(help="Forget nothing: check that this receipt holds of the run.")] = None,
    as_json: Json = False,
) -> None:
    """Remove rows from every file of a run for good, search all bytes for them, write a receipt; the source and other runs
    are left alone."""
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES
    from clipfilter.operations import check_receipt, forget_rows, read_receipt
    from clipfilter.report import jpeg_of
    from clipfilter.runs import Run as OpenRun

    if (uids is None) == (check is None):
        raise RefusedError("forget wants --uids FILE (rows to forget) or --check RECEIPT (what to prove), one of them.")
    if check is not None:
        problems = check_receipt(OpenRun.open(run), read_receipt(check), check)
        if as_json:
            print_json({"ok": not problems, "problems": problems})
        for problem in () if as_json else problems:
            typer.echo(f"FAIL {problem}")
        if not problems and not as_json:
            typer.echo(f"ok   {check} holds: nothing of it has come back, and nothing it names was changed")
        raise typer.Exit(1 if problems else 0)
    assert uids is not None

    def thumbnails(picture: bytes) -> list[bytes]:
        return [made for blurred in (False, True) if (made := jpeg_of(picture, blurred=blurred)) is not None]

    done = forget_rows(run, uids, also=also or (), receipt=receipt, thumbnails=thumbnails)
    if as_json:
        print_json(done.to_json())
    else:
        typer.echo(
            f"{done.rows:,} rows forgotten ({done.unknown:,} uids are not in the run), {done.shards:,} shards written anew, "
            f"{len(done.deleted):,} files deleted; version {done.version}"
        )
        typer.echo(f"{done.files:,} files ({done.bytes:,} bytes) searched for what is left of them")
        if done.receipt:
            typer.echo(f"receipt {done.receipt}")
        for note in done.notes:
            typer.echo(f"note: {note}", err=True)
        for place in done.left:
            typer.echo(f"left: {place}", err=True)
    raise typer.Exit(EXIT_FAILURES if done.left else EXIT_DONE)


def _print(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(summary)
    else:
        totals: Totals = summary["totals"]
        typer.echo(f"{totals.embedded:,} rows in {totals.shards:,} shards, {totals.failed:,} failed")
        typer.echo(f"run          {summary['out']}")
    if not summary["totals"].rows:
        from clipfilter.engine import EXIT_FAILURES

        typer.echo(summary["totals"].without_rows, err=True)
        raise typer.Exit(EXIT_FAILURES)
