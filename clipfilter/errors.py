"""The errors clipfilter raises on purpose, and the classes a failed row can have."""

from __future__ import annotations

import re

# Kinds of row failure (column cf_error_class). Transient ones are worth trying again with `--retry-failed`.
DECODE_ERROR = "decode_error"
UNSUPPORTED = "unsupported_format"
IMAGE_TOO_LARGE = "image_too_large"
MISSING_IMAGE = "missing_image"
READ_ERROR = "read_error"
DECODER_CRASH = "decoder_crash"
DECODE_TIMEOUT = "decode_timeout"
ENCODE_ERROR = "encode_error"
UNEXPECTED_ERROR = "unexpected_error"
TRANSIENT = frozenset({READ_ERROR, DECODE_TIMEOUT, UNEXPECTED_ERROR})


_URL_USER = re.compile(r"://[^/?#\s@]*@")
_URL_PARAMETER = re.compile(r"([?&])([^=&\s]*)=([^&\s'\"]*)")
_SECRET_NAMES = ("sig", "token", "key", "secret", "password", "credential", "auth")


def hide(text: str) -> str:
    """`text` without the users and passwords of URLs in it, and without what signs them."""

    def without_value(found: re.Match[str]) -> str:
        secret = any(word in found[2].lower() for word in _SECRET_NAMES)
        return f"{found[1]}{found[2]}=..." if secret else found[0]

    return _URL_PARAMETER.sub(without_value, _URL_USER.sub("://", text)) if "://" in text else text


class ClipfilterError(Exception):
    """Base of everything clipfilter raises on purpose; its text is one sentence for the user, without credentials."""

    def __init__(self, text: str = "") -> None:
        super().__init__(hide(text))


class RefusedError(ClipfilterError):
    """The request was refused before any work was done (exit code 2); the text says how to fix it."""


class ShardError(ClipfilterError):
    """A whole shard cannot be read (for example a Parquet file without a readable footer)."""


class RowError(Exception):
    """One row cannot be used; it is recorded in `failed/` and costs only itself.

    `error_class` is one of the constants above.
    """

    def __init__(self, error_class: str, message: str) -> None:
        self.error_class = error_class
        self.message = hide(message)
        super().__init__(self.message)


def unexpected(error: BaseException) -> RowError:
    """An exception that nobody foresaw, as the failure of the row that caused it."""
    text = one_line(error)
    name = type(error).__name__
    return RowError(UNEXPECTED_ERROR, name if text == name else f"{name}: {text}")


def reason(error: BaseException) -> str:
    """The first line of an error, at most 200 characters, for use inside a sentence."""
    text = hide(str(error).strip())
    return text.splitlines()[0][:200] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """The whole text of an error on one line, at most 200 characters."""
    return hide(" ".join(str(error).split()) or type(error).__name__)[:200]
