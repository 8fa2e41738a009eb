"""What a policy says about a row, and what a rule says, as they stand in rows, counts and commands."""

from __future__ import annotations

from typing import Literal, get_args

Decision = Literal["keep", "review", "reject"]
#: From the mildest to the hardest.
DECISIONS: tuple[str, ...] = get_args(Decision)

#: What a rule can have a threshold for.
Limit = Literal["review", "reject"]
LIMITS: tuple[str, ...] = get_args(Limit)

#: What a rule says of a picture on a list of known ones: rejected, never shown.
ESCALATE = "escalate"
#: What a rule says that moved another one's threshold.
TIGHTEN = "tighten"
#: What a rule says that has no score.
MISSING = "missing"
