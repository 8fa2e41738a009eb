"""The child process of the local executor: a `Worker` that answers JSON lines.

Tasks come on stdin, answers leave on the file descriptor given as argument. When stdin closes, the driver is gone,
and so is this process.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipfilter.engine.executors.interface import TASKS_PER_WORKER, error_outcome
from clipfilter.errors import RefusedError

_HEARTBEAT_SECONDS = 0.5


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver decides
    answers = os.fdopen(int(sys.argv[1]), "w")
    lock = threading.Lock()

    def answer(message: dict[str, Any]) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    worker: Any = None

    def report() -> None:
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            answer({"heartbeat": worker.heartbeat().to_json() if worker else None})

    threading.Thread(target=report, daemon=True).start()
    lines = iter(sys.stdin.readline, "")
    try:
        from clipfilter.engine.worker import JobSpec, Task, Worker

        worker = Worker(JobSpec(**json.loads(next(lines))))
        answer({"ready": worker.describe()})
    except RefusedError as error:
        answer({"refused": str(error)})
        return
    except StopIteration:
        return
    except Exception:
        answer({"broken": traceback.format_exc()})
        return

    def run(ticket: int, task: Task) -> None:
        try:
            answer({"ticket": ticket, "done": worker.process(task).to_json()})
        except Exception as error:
            traceback.print_exc()
            outcome = error_outcome(ticket, error)
            answer({"ticket": ticket, outcome.kind: outcome.message, "permanent": outcome.permanent})

    pool = ThreadPoolExecutor(TASKS_PER_WORKER)
    for line in lines:
        message = json.loads(line)
        pool.submit(run, message["ticket"], Task.from_json(message["task"]))
    worker.close()
    os._exit(0)


if __name__ == "__main__":
    main()
