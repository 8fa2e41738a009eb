"""From a list of URLs to webdataset shards: img2dataset's downloader with a state for every URL and no second fetch."""

from __future__ import annotations

from clipfilter.ingest.job import IngestRequest, IngestResult, ingest, plan_ingest

__all__ = ["IngestRequest", "IngestResult", "ingest", "plan_ingest"]
