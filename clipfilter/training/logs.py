"""CSV logs that a resumed run continues without a doubled or missing step, and TensorBoard beside them."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipfilter.errors import RefusedError
from clipfilter.storage import replacing


class CsvLog:
    """One row per step, whole lines only; `continue_after` takes back what came after a checkpoint."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path = path
        self._columns = list(columns)
        self._handle: Any = None

    def continue_after(self, step: int) -> None:
        """Keep the rows whose `step` (the first column) is at most `step`, and open the file for more."""
        kept = [row for row in read_rows(self._path) if int(row[self._columns[0]]) <= step]
        with replacing(self._path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self._handle = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115

    def write(self, row: dict[str, Any]) -> None:
        csv.DictWriter(self._handle, self._columns, lineterminator="\n").writerow(row)
        self._handle.flush()

    def sync(self) -> None:
        """On disk before the checkpoint that counts on it."""
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log; a line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


class TensorBoardLog:
    """The same numbers as TensorBoard scalars. Raises RefusedError where the package is missing."""

    def __init__(self, folder: Path, after_step: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=after_step + 1)

    def write(self, prefix: str, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name not in ("step", "epoch") and value is not None:
                self._writer.add_scalar(f"{prefix}/{name}", float(value), int(row["step"]))

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raise RefusedError unless the tensorboard package can be imported."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise RefusedError(
            "--log tensorboard needs the tensorboard package: pip install 'clipfilter[train]', or leave it out."
        ) from None
