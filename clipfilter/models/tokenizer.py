"""Tokenizers of CLIP models: texts to untruncated ids, exactly as open_clip and transformers make them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfilter.errors import RefusedError, reason
from clipfilter.models import hub

# CLIP's tokenizer is plain Python and quadratic in the length of a word. Nothing beyond these bounds can reach
# a context of 77 tokens as words do, so they change no embedding of a caption that a person wrote.
_MAX_CHARACTERS = 20_000
_LONG_RUN = re.compile(r"(\S{1000})(?=\S)")
_MAX_CACHED_WORDS = 200_000


@dataclass(frozen=True)
class TextTokenizer:
    """How a model's texts become ids.

    encode: texts -> untruncated ids, special tokens included. A text beyond `context_length` is cut there and its last
    id becomes `end_id`; a shorter one is filled up with `pad_id`, on the left if `pad_left`.
    sha256: names what it does, whatever files it came from; None for CLIP's own.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    context_length: int
    pad_id: int
    end_id: int
    pad_left: bool = False
    sha256: str | None = None


def bounded(text: str) -> str:
    """`text` without what no context can hold."""
    return _LONG_RUN.sub(r"\1 ", text[:_MAX_CHARACTERS])


def encode_with(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """CLIP's byte-pair tokenizer (open_clip's SimpleTokenizer) without truncation, with bounds on a text's cost."""
    specials = dict(tokenizer.cache)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        if len(tokenizer.cache) > _MAX_CACHED_WORDS:  # it never forgets; millions of captions would fill the memory
            tokenizer.cache = dict(specials)
        return [[tokenizer.sot_token_id, *tokenizer.encode(bounded(text)), tokenizer.eot_token_id] for text in texts]

    return encode


def open_clip_tokenizer(text_config: dict[str, Any], beside: Path | None) -> TextTokenizer:
    """The tokenizer of an open_clip model (`text_cfg` of its config).

    beside: folder of the checkpoint, where the files of a tokenizer other than CLIP's are looked for first; then the
    hub's cache, then the hub. Raises RefusedError naming the file where none can be had.
    """
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer, get_clean_fn

    context_length = int(text_config.get("context_length", DEFAULT_CONTEXT_LENGTH))
    options = dict(text_config.get("tokenizer_kwargs") or {})
    options.pop("reduction_mask", None)  # drops words at random in training; here the end of a long text goes
    repo = text_config.get("hf_tokenizer_name")
    unknown = sorted(set(options) - _OPTIONS)
    if unknown or options.get("clean", "lower") not in _CLEANING:
        wrong = f"the option {unknown[0]}" if unknown else f"clean={options['clean']!r}"
        raise RefusedError(
            f"the tokenizer of this model wants {wrong}, which is not supported: use a checkpoint without it"
        )
    if not repo:
        simple = SimpleTokenizer(context_length=context_length, **options)
        return TextTokenizer(encode_with(simple), context_length, 0, simple.eot_token_id)
    if text_config.get("tokenizer_mode"):
        raise RefusedError(
            f"the tokenizer mode {text_config['tokenizer_mode']!r} of this model is not supported: use a checkpoint without it"
        )
    clean = get_clean_fn(options.pop("clean", "whitespace"))
    strip_separator = bool(options.pop("strip_sep_token", False))
    language = options.pop("language", None)
    tokenizer = _load(_family(repo), repo, beside, options)
    if language is not None:
        tokenizer.set_src_lang_special_tokens(language)
    return hf_tokenizer(
        tokenizer,
        context_length,
        int(text_config.get("vocab_size") or 0),
        clean=clean,
        zero_id=tokenizer.sep_token_id if strip_separator else None,
    )


def transformers_tokenizer(folder: Path, context_length: int, vocabulary: int, shown: str) -> TextTokenizer:
    """The tokenizer of a transformers model from the files in `folder`; RefusedError where they are missing."""
    if not any((folder / file).is_file() for file in FILES):
        raise RefusedError(f"{shown} has no tokenizer: put its {', '.join(FILES[:3])} (what it has) beside config.json")
    return hf_tokenizer(tokenizer_from_folder(folder, None, {}), context_length, vocabulary)


#: What `tokenizer_kwargs` may hold. Configs are written by strangers, and transformers takes paths and more as options.
_OPTIONS = {"clean", "strip_sep_token", "language", "additional_special_tokens", "add_bos_token", "add_eos_token"}
_OPTIONS |= {"padding_side", "src_lang", "model_max_length", "do_lower_case"}
_CLEANING = ("lower", "whitespace", "canonicalize")


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Family:
    """A kind of tokenizer and the one file that defines it where tokenizer.json is missing.

    kind: transformers' class, for folders that do not name it. pad: its padding token where the folder does not say.
    """

    kind: str
    file: str
    pad: str
    options: dict[str, Any]


_GEMMA: dict[str, Any] = {"padding_side": "right", "add_bos_token": False, "add_eos_token": True}
_FAMILIES = (
    (r"SigLIP2", _Family("GemmaTokenizer", "tokenizer.model", "<pad>", _GEMMA)),
    (r"SigLIP", _Family("T5Tokenizer", "spiece.model", "</s>", {"extra_ids": 0})),
    (r"mt5|t5", _Family("T5Tokenizer", "spiece.model", "<pad>", {"extra_ids": 0})),
    (r"xlm", _Family("XLMRobertaTokenizer", "sentencepiece.bpe.model", "<pad>", {})),
    (r"nllb", _Family("NllbTokenizer", "sentencepiece.bpe.model", "<pad>", {})),
    (r"roberta", _Family("RobertaTokenizer", "vocab.json", "<pad>", {})),
    (r"bert", _Family("BertTokenizer", "vocab.txt", "[PAD]", {})),
)
#: Files that make a folder one with a tokenizer, and those that complete them.
FILES = (
    "tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt", "vocab.json",
)  # fmt: skip
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def _family(repo: str) -> _Family | None:
    return next((family for pattern, family in _FAMILIES if re.search(pattern, repo, re.IGNORECASE)), None)


def fetch_tokenizer(repo: str, family_file: str | None = None, revision: str | None = None) -> Path | None:
    """The folder with a hub repository's tokenizer, or None where it has none. Raises hub.Unavailable."""
    found = hub.fetch_first(repo, ("tokenizer.json", *([family_file] if family_file else FILES[1:])), revision)
    if found is None:
        return None
    revision = revision or found.parent.name  # the folder of a snapshot is named by its commit
    for file in COMPANIONS:
        hub.fetch_optional(repo, file, revision)
    return found.parent


def _load(family: _Family | None, repo: str, beside: Path | None, options: dict[str, Any]) -> Any:
    """transformers' tokenizer of `repo` from the first place that has its files."""
    if beside is not None and any((beside / file).is_file() for file in FILES):
        return tokenizer_from_folder(beside, family, options)
    wanted = "tokenizer.json and tokenizer_config.json"
    where = (
        f"{beside}, beside the checkpoint" if beside else "one folder with the weights (--model ARCH=/folder/weights)"
    )
    try:
        folder = fetch_tokenizer(repo, family.file if family else None)
    except hub.Unavailable as error:
        raise RefusedError(
            f"the tokenizer of this model cannot be had ({error}): download {wanted} from https://huggingface.co/{repo} "
            f"and put them into {where}"
        ) from None
    if folder is None:
        raise RefusedError(f"https://huggingface.co/{repo} has no tokenizer: put its {wanted} into {where}")
    return tokenizer_from_folder(folder, family, options)


def tokenizer_from_folder(folder: Path, family: _Family | None, options: dict[str, Any]) -> Any:
    """The tokenizer in a local folder; nothing is downloaded and no code from the folder is run."""
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    refuse_remote_code(folder / "tokenizer_config.json")
    try:
        import transformers
    except ImportError:
        raise RefusedError(f"this model's tokenizer needs the package transformers: {hub.INSTALL}") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are the engine's to give
    described = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    bare = family is not None and not described and (folder / family.file).is_file()
    try:
        with quiet_transformers():
            if bare:
                assert family is not None
                kind = getattr(transformers, family.kind)
                tokenizer = kind.from_pretrained(str(folder), **{"pad_token": family.pad, **family.options, **options})
            else:
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    str(folder), local_files_only=True, trust_remote_code=False, **options
                )
    except Exception as error:  # a damaged file raises anything from a KeyError to a Rust panic's text
        raise RefusedError(
            f"the tokenizer in {folder} cannot be loaded ({reason(error)}): put the repository's tokenizer.json and "
            "tokenizer_config.json there"
        ) from None
    if tokenizer.pad_token_id is None and family is not None and family.pad in tokenizer.get_vocab():
        tokenizer.pad_token = family.pad
    return tokenizer


def refuse_remote_code(path: Path) -> dict[str, Any]:
    """A repository's JSON file ({} where there is none); RefusedError when it asks for code of its own."""
    if not path.is_file():
        return {}
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise RefusedError(f"{path} is damaged (it is not a JSON object): download it again") from None
    if "auto_map" in config:
        raise RefusedError(
            f"{path} asks to run code from the repository (auto_map), which clipfilter never does: use another model"
        )
    return config


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from reporting, on its own loggers, what it is about to do; failures raise."""
    from transformers.utils import logging as its

    before = its.get_verbosity()
    its.set_verbosity_error()
    try:
        yield
    finally:
        its.set_verbosity(before)


# --- ids --------------------------------------------------------------------------------------------------------------


def hf_tokenizer(
    tokenizer: Any,
    context_length: int,
    vocabulary: int,
    *,
    clean: Callable[[str], str] = lambda text: text,
    zero_id: int | None = None,
) -> TextTokenizer:
    """A transformers tokenizer as open_clip's HFTokenizer uses it, but without truncation and padding.

    vocabulary: ids the text tower knows, 0 where unknown. zero_id: the id that this model was trained to see as 0.
    """
    _check_tokenizer(tokenizer, vocabulary)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        cleaned = [clean(text[:_MAX_CHARACTERS]) for text in texts]
        # verbose=False: it would warn of every text longer than the context, which is truncated and counted later
        ids = tokenizer(cleaned, padding=False, truncation=False, verbose=False)["input_ids"]
        if zero_id is not None:
            ids = [[0 if token == zero_id else token for token in row] for row in ids]
        return [list(row) for row in ids]

    end_id = int(tokenizer("a", padding=False, truncation=False)["input_ids"][-1])
    return TextTokenizer(
        encode,
        context_length,
        int(tokenizer.pad_token_id),
        0 if zero_id is not None and end_id == zero_id else end_id,
        pad_left=tokenizer.padding_side == "left",
        sha256=_sha256(tokenizer, encode(_PROBES)),
    )


def _check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    shown = type(tokenizer).__name__
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if vocabulary and size > vocabulary:
        raise RefusedError(
            f"the tokenizer has {size:,} tokens and the model knows {vocabulary:,}: put this model's own tokenizer files there"
        )
    if getattr(tokenizer, "truncation_side", "right") != "right":
        raise RefusedError("the tokenizer cuts long texts at their beginning, which is not supported")
    if tokenizer.pad_token_id is None:
        raise RefusedError(
            f"the tokenizer ({shown}) names no padding token: put its tokenizer_config.json beside tokenizer.json"
        )
    if len(tokenizer("", padding=False, truncation=False)["input_ids"]) == 0:
        raise RefusedError(
            f"the tokenizer ({shown}) adds no end token, so it is not set up for this model: put the repository's "
            "tokenizer.json and tokenizer_config.json into the folder"
        )


#: Texts on which tokenizers with one vocabulary and different rules differ: case, spaces, punctuation, scripts.
_PROBES = ("A photo, of  a DOG!", " l'été naïve_2024\t", "日本語 собака 😀", "")


def _sha256(tokenizer: Any, ids: list[list[int]]) -> str:
    facts = [sorted(tokenizer.get_vocab().items()), ids, tokenizer.pad_token_id, tokenizer.padding_side]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
