"""The names that stand in every run: decisions, bands, and the columns that a policy adds to its rows."""

from __future__ import annotations

from typing import Literal

Decision = Literal["keep", "review", "reject"]
#: The decisions, from the mildest; their position is their code.
DECISIONS: tuple[Decision, ...] = ("keep", "review", "reject")
KEEP, REVIEW, REJECT = range(3)
#: What a rule may say of a row.
BANDS = ("review", "reject", "missing")
#: The band of a picture on a list of known ones: rejected, never shown.
ESCALATE = "escalate"
#: The band of a rule that moved another one's threshold.
TIGHTEN = "tighten"
#: Every word that may stand as the band of a reason; keep is only said by people.
ALL_BANDS = (*BANDS, ESCALATE, TIGHTEN, "keep")
#: The name under which a person's decision stands among the reasons of a row; no rule may have it.
OVERRIDE_RULE = "override"

SIMILARITY = "cf_similarity"
DECISION = "cf_decision"
REASONS_COLUMN = "cf_reasons"
SEVERITY = "cf_severity"
ACTION = "cf_action"
CAPTION = "cf_caption"
UID = "cf_uid"


def score_column(rule: str) -> str:
    """The column of a rule's score."""
    return f"cf_score.{rule}"
