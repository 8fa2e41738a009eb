"""Policies: plain-text rules, loaded strictly, compiled once per model, evaluated on columns."""

from __future__ import annotations

from clipfilter.policies.arithmetic import bent, sigmoid, similarity
from clipfilter.policies.captions import language_detector
from clipfilter.policies.compile import CompiledPolicy, compile_policy, matching_calibration
from clipfilter.policies.deciding import REASONS, escalated
from clipfilter.policies.fraction import (
    BUCKETS,
    Threshold,
    dataset_thresholds,
    fraction_threshold,
    fraction_thresholds,
    high_histogram,
    key_score,
    locate,
    low_histogram,
    wanted_rank,
)
from clipfilter.policies.kinds.base import Measure, Words, Written, joined
from clipfilter.policies.kinds.registry import measure_in, measure_of
from clipfilter.policies.labels import LABEL_COLUMNS, LabelScorer, LabelSet, label_names, parse_labels
from clipfilter.policies.language.about import Expectation, RuleExpectation
from clipfilter.policies.language.extends import read_document, resolve
from clipfilter.policies.language.json_schema import policy_schema
from clipfilter.policies.language.load import load_policy, pack_names, packs_folder, parse_policy, policy_file
from clipfilter.policies.language.rule import Rule
from clipfilter.policies.language.schema import Policy, json_sha256, rule_prompts_sha256
from clipfilter.policies.language.scores import ScorePolicy, named_scores, scores_of
from clipfilter.policies.language.yaml_nodes import Node, read_yaml, read_yaml_file, scalar
from clipfilter.policies.parts import attachments
from clipfilter.policies.parts.attachments import ATTACHMENTS_FOLDER, Attachments
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.columns import BUILTINS, check_metadata, metadata_values
from clipfilter.policies.parts.conditions import in_words
from clipfilter.policies.parts.fields import suggest
from clipfilter.policies.parts.overrides import OVERRIDE_RULE
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, TEMPLATES, fill
from clipfilter.policies.texts import COSINE_BLOCK, class_vectors, cosine_blocks, padded_blocks

__all__ = [
    "ATTACHMENTS_FOLDER",
    "BUCKETS",
    "BUILTINS",
    "COSINE_BLOCK",
    "DEFAULT_TEMPLATES",
    "LABEL_COLUMNS",
    "OVERRIDE_RULE",
    "REASONS",
    "TEMPLATES",
    "Attachments",
    "Band",
    "CompiledPolicy",
    "Expectation",
    "LabelScorer",
    "LabelSet",
    "Measure",
    "Node",
    "Policy",
    "Rule",
    "RuleExpectation",
    "ScorePolicy",
    "Threshold",
    "Words",
    "Written",
    "attachments",
    "bent",
    "check_metadata",
    "class_vectors",
    "compile_policy",
    "cosine_blocks",
    "dataset_thresholds",
    "escalated",
    "fill",
    "fraction_threshold",
    "fraction_thresholds",
    "high_histogram",
    "in_words",
    "joined",
    "json_sha256",
    "key_score",
    "label_names",
    "language_detector",
    "load_policy",
    "locate",
    "low_histogram",
    "matching_calibration",
    "measure_in",
    "measure_of",
    "metadata_values",
    "named_scores",
    "pack_names",
    "packs_folder",
    "padded_blocks",
    "parse_labels",
    "parse_policy",
    "policy_file",
    "policy_schema",
    "read_document",
    "read_yaml",
    "read_yaml_file",
    "resolve",
    "rule_prompts_sha256",
    "scalar",
    "scores_of",
    "sigmoid",
    "similarity",
    "suggest",
    "wanted_rank",
]
