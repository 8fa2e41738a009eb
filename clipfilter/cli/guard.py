"""How errors become one sentence and an exit code, for the command line and for pipelines."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from clipfilter.errors import ClipfilterError, RefusedError


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived: leave at once; everything committed stays."""


def guard(call: Callable[[], object]) -> None:
    """Call it; what it raises becomes one sentence and an exit code. SIGTERM and SIGINT stop it at once."""

    arrived: list[int] = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            call()
        except BaseException:
            if not arrived:
                raise
            # Whatever became of it on its way: Ray's C code makes a SystemError of what a handler raises.
            _say("stopped; what is committed stays, run the same command again to resume.")
            sys.stdout.flush()
            os._exit(128 + arrived[0])  # at once: a thread that hangs, or a library's own farewell, is not waited for
    except RefusedError as error:
        _stop(str(error), 2)
    except ClipfilterError as error:
        _stop(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) or str(error) == "can't start new thread":
            _stop(
                f"stopped by the system: {str(error) or 'no memory is left'}; run the same command again to resume.", 1
            )
        traceback.print_exc()
        _stop(f"crashed: {type(error).__name__}: {error} (a bug: please report it with the lines above)", 1)


def _stop(sentence: str, code: int) -> None:
    _say(sentence)
    sys.exit(code)


def _say(sentence: str) -> None:
    print(f"clipfilter: {sentence}", file=sys.stderr, flush=True)
