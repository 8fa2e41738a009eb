"""Lists that a policy holds itself, or in a file beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationInfo, model_serializer

from clipfilter.errors import RefusedError
from clipfilter.policies.parts.attachments import Attachment, Attachments, attach
from clipfilter.policies.parts.fields import Model, fail

#: Reads the list in a file of this sha256. Raises RefusedError.
Reader = Callable[[Path, str], tuple[str, ...]]


class Listed(Model):
    """A list written in the policy, or in a file beside it."""

    rows: tuple[str, ...] | None = None
    source: Attachment | None = None

    @model_serializer
    def _plain(self) -> Any:
        return list(self.rows) if self.rows is not None else {"sha256": self.source.sha256 if self.source else None}

    def read(self, files: Attachments, reader: Reader) -> tuple[str, ...]:
        """Its entries. Raises RefusedError."""
        if self.rows is not None:
            return self.rows
        assert self.source is not None
        return reader(files.path(self.source), self.source.sha256)


def filed(value: Any, info: ValidationInfo, read: Reader) -> Any:
    """The file's hash, after its content was found good where the file is here."""
    source = attach(value, info)
    if isinstance(value, str) or "file" in value:
        attachment = Attachment.model_validate(source)
        try:
            read(Attachments().path(attachment), attachment.sha256)
        except RefusedError as error:
            fail(str(error))
    return {"source": source}
