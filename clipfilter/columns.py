"""The names of the columns that clipfilter adds to rows; `from clipfilter import columns as cf`, then `cf.KEY`.

What each holds, and its type: docs/reference/run-directory.md; the schemas are in clipfilter/sources/schema.py and
clipfilter/runs/columns.py. Names that begin with the prefix are reserved for clipfilter.
"""

from __future__ import annotations

PREFIX = "cf_"
#: Before the names that an earlier run's columns get when its output is a source.
EARLIER = "cf_prev_"

# A row and where it comes from.
SHARD = "cf_shard"
ROW = "cf_row"
KEY = "cf_key"
UID = "cf_uid"
SOURCE_JSON = "cf_source_json"

# Its image and captions.
IMAGE = "cf_image"
SHA256 = "cf_sha256"
WIDTH = "cf_width"
HEIGHT = "cf_height"
FORMAT = "cf_format"
CAPTION = "cf_caption"
CAPTIONS = "cf_captions"

# Why it failed.
ERROR_CLASS = "cf_error_class"
ERROR = "cf_error"

# Facts about its pixels.
BRIGHTNESS = "cf_brightness"
CONTRAST = "cf_contrast"
BLUR = "cf_blur"
ENTROPY = "cf_entropy"
COLOURFULNESS = "cf_colourfulness"
PHASH = "cf_phash"

# What a policy says, and labels.
SIMILARITY = "cf_similarity"
SCORE = "cf_score."
DECISION = "cf_decision"
REASONS = "cf_reasons"
SEVERITY = "cf_severity"
ACTION = "cf_action"
OVERRIDE = "cf_override"
KEPT_AS = "cf_kept_as"
LABEL = "cf_label"
LABEL_SCORE = "cf_label_score"
LABELS = "cf_labels"

# What it is among the other rows.
CLUSTER = "cf_cluster"
DUPLICATE = "cf_duplicate"
DUPLICATE_OF = "cf_duplicate_of"
DUPLICATE_KIND = "cf_duplicate_kind"
DUPLICATE_COSINE = "cf_duplicate_cosine"
DUPLICATE_BITS = "cf_duplicate_bits"
NEGCLIP = "cf_negclip"
NORMSIM = "cf_normsim"
BALANCED = "cf_balanced"


def score(rule: str) -> str:
    """The column of a rule's raw score."""
    return f"{SCORE}{rule}"
