"""Tokenizers other than CLIP's: the ids of open_clip's own wrapper, from whatever files lie beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    TEXTS,
    sentencepiece_model,
    siglip_tokenizer_files,
    write_files,
)

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from clipfilter.errors import RefusedError
from clipfilter.models import hub
from clipfilter.models.tokenizer import TextTokenizer, open_clip_tokenizer

SIGLIP = {
    "context_length": 64,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}
SIGLIP2 = {**SIGLIP, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2"}
XLM = {"hf_tokenizer_name": "xlm-roberta-base"}
CLIPA = {"context_length": 32, "hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}


def fill(folder: Path, family: str) -> dict[str, Any]:
    """Write a family's tokenizer as its repository has it; returns its text_cfg."""
    import transformers

    if family == "siglip":
        write_files(siglip_tokenizer_files(), folder)
        return SIGLIP
    if family == "siglip2":
        sentencepiece_model(folder / "tokenizer.model", "gemma")
        options = {"padding_side": "right", "add_bos_token": False, "add_eos_token": True}
        transformers.GemmaTokenizer.from_pretrained(str(folder), **options).save_pretrained(folder)
        return SIGLIP2
    if family == "xlm-roberta":
        sentencepiece_model(folder / "sentencepiece.bpe.model", "xlm-roberta")
        transformers.XLMRobertaTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
        return XLM
    words = sorted({"a", "photo", "of", "dog", "the", "##s", "##o", "!", ".", *"abcdefghijklmnopqrstuvwxyz日本語"})
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]), encoding="utf-8"
    )
    transformers.BertTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    return CLIPA


def padded(tokenizer: TextTokenizer) -> list[list[int]]:
    """The ids of TEXTS as the text tower gets them."""
    rows = []
    for ids in tokenizer.encode(TEXTS):
        row = ids if len(ids) <= tokenizer.context_length else [*ids[: tokenizer.context_length - 1], tokenizer.end_id]
        padding = [tokenizer.pad_id] * (tokenizer.context_length - len(row))
        rows.append(padding + row if tokenizer.pad_left else row + padding)
    return rows


@pytest.mark.parametrize("family", ["siglip", "siglip2", "xlm-roberta", "clipa"])
def test_ids_are_those_of_open_clips_own_tokenizer(family: str, tmp_path: Path) -> None:
    config = fill(tmp_path, family)
    mine = open_clip_tokenizer(config, tmp_path)
    options = config.get("tokenizer_kwargs", {})
    theirs = HFTokenizer(str(tmp_path), context_length=config.get("context_length", 77), **options)
    assert padded(mine) == theirs(list(TEXTS)).tolist()
    assert mine.context_length == theirs.context_length
    assert mine.encode([]) == []
    truncated = sum(len(ids) > mine.context_length for ids in mine.encode(TEXTS))
    assert truncated >= 1


@pytest.mark.parametrize(
    ("family", "file"),
    [
        ("siglip", "spiece.model"),
        ("siglip2", "tokenizer.model"),
        ("xlm-roberta", "sentencepiece.bpe.model"),
        ("clipa", "vocab.txt"),
    ],
)
def test_the_vocabulary_alone_is_enough(family: str, file: str, tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    whole.mkdir()
    alone.mkdir()
    config = fill(whole, family)
    (alone / file).write_bytes((whole / file).read_bytes())
    a, b = open_clip_tokenizer(config, alone), open_clip_tokenizer(config, whole)
    assert padded(a) == padded(b)
    assert a.sha256 == b.sha256


@pytest.mark.parametrize("family", ["siglip", "xlm-roberta"])
def test_tokenizer_json_alone_is_enough(family: str, tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    whole.mkdir()
    alone.mkdir()
    config = fill(whole, family)
    (alone / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    assert padded(open_clip_tokenizer(config, alone)) == padded(open_clip_tokenizer(config, whole))


def test_another_vocabulary_or_rule_has_another_hash(tmp_path: Path) -> None:
    config = fill(tmp_path, "siglip")
    one = open_clip_tokenizer(config, tmp_path).sha256
    cased = open_clip_tokenizer({**config, "tokenizer_kwargs": {}}, tmp_path).sha256
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(content.replace('"▁the"', '"▁THE"'), encoding="utf-8")
    assert len({one, cased, open_clip_tokenizer(config, tmp_path).sha256}) == 3


def test_clips_own_tokenizer_follows_the_config() -> None:
    mine = open_clip_tokenizer({"context_length": 32, "tokenizer_kwargs": {"clean": "canonicalize"}}, None)
    theirs = SimpleTokenizer(context_length=32, clean="canonicalize")
    usual = [text for text in TEXTS if len(text) < 1000]
    rows = [ids if len(ids) <= 32 else [*ids[:31], mine.end_id] for ids in mine.encode(usual)]
    assert [row + [0] * (32 - len(row)) for row in rows] == theirs(usual).tolist()


# --- refusals


def offline(repo: str, file: str, revision: str | None = None) -> None:
    raise hub.Unavailable("it is not in the cache and the hub cannot be reached")


def test_a_tokenizer_that_cannot_be_had_says_what_to_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "fetch", offline)
    says = r"tokenizer\.json and tokenizer_config\.json from https://huggingface\.co/timm/ViT-B-16-SigLIP "
    with pytest.raises(RefusedError, match=says):
        open_clip_tokenizer(SIGLIP, tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "siglip")
    with pytest.raises(RefusedError, match="900 tokens and the model knows 500"):
        open_clip_tokenizer({**SIGLIP, "vocab_size": 500}, tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "siglip")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(RefusedError, match="cannot be loaded"):
        open_clip_tokenizer(SIGLIP, tmp_path)


def test_code_of_a_tokenizers_repository_is_never_run(tmp_path: Path) -> None:
    fill(tmp_path, "siglip")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.T", None]}})
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(RefusedError, match="auto_map"):
        open_clip_tokenizer(SIGLIP, tmp_path)


def test_a_tokenizer_mode_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="tokenizer mode 'clips'"):
        open_clip_tokenizer({**XLM, "tokenizer_mode": "clips"}, tmp_path)
