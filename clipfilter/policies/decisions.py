"""What a policy says about a row, from the mildest to the hardest."""

from __future__ import annotations

from typing import Literal, get_args

Decision = Literal["keep", "review", "reject"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
