"""What options can be, and what they are when nobody says otherwise.

The command line, the configs of pipelines, the requests of the packages and the pages that repeat a command all take
them from here. Nothing is imported: the command line's help needs these and must not wait for anything else.
"""

from __future__ import annotations

from typing import Literal

#: How images are decoded: fast uses JPEG's scaled decoding, exact is open_clip's own transform.
Decode = Literal["fast", "exact"]
#: Embedded ICC profiles: ignored, as in the models' training, or applied, so that colours are what a browser shows.
Color = Literal["ignore", "managed"]
#: Where images are decoded: in threads of the workers, or in child processes with limits of memory and time.
DecodeIn = Literal["threads", "processes"]
#: Which caption counts when a row has several; none ignores them.
Captions = Literal["first", "max", "mean", "none"]
#: Which pictures of a sample that has several are rows.
Pictures = Literal["all", "first"]
Dtype = Literal["fp32", "bf16", "fp16"]
Engine = Literal["auto", "local", "ray"]
#: How a page shows pictures that were not kept.
Thumbnails = Literal["none", "blur", "show"]

MODEL = "nano"
ENGINE: Engine = "auto"
DEVICE = "auto"
DECODE: Decode = "fast"
COLOR: Color = "ignore"
DECODE_IN: DecodeIn = "threads"
#: Seconds that decoding one image may take.
DECODE_TIMEOUT = 60.0
CAPTIONS: Captions = "first"
PICTURES: Pictures = "all"
THUMBNAILS: Thumbnails = "blur"
#: Pixels of an image above which its header is refused: Pillow's own limit for a decompression bomb.
MAX_PIXELS = 178_956_970
#: Share of rows that may fail before the exit code says so.
MAX_FAILURES = 0.01
#: Rows of a new shard, where it is not cut as the source is.
ROWS_PER_SHARD = 10_000
#: Where pages and metrics are served: this machine alone.
LOOPBACK = "127.0.0.1"
