"""Notes the longest steps of a daemon's event loop. A daemon loads this module if its PYTHONPATH begins with
this folder.

A step is what one task does between two checkpoints. No other task runs meanwhile. The time of a step is the
CPU time of the loop's thread, so that a busy machine makes no step longer. The time of Python's cycle
collector within a step is left out and noted separately: it grows with the number of live objects, whatever
the step does. `tests.looptime.steps` starts such daemons and reads what they note.
"""

import gc
import os
import sys
import threading
import time
import traceback
from typing import Any

import trio

FILE = os.environ.get("IPFSFUSE_TEST_STEPS", "")
"""Each step that takes longer than NOTED and longer than all steps before it gets a line in this file:
seconds, task, and where the step was, if that was seen. Each pass of the collector gets a line by the same
rule."""
NOTED = 0.02


class LongestStep(trio.abc.Instrument):
    def __init__(self) -> None:
        self._last = self._collecting = self._collected = 0.0
        self._longest = self._longest_collection = NOTED
        self._seen = ""

    def before_run(self) -> None:
        self._thread = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True).start()
        gc.callbacks.append(self._collector)

    def _collector(self, phase: str, info: dict[str, int]) -> None:
        if threading.get_ident() != self._thread:
            return
        if phase == "start":
            self._collecting = time.thread_time()
            return
        took = time.thread_time() - self._collecting
        self._collected += took
        if took > self._longest_collection:
            self._longest_collection = took
            self._note(f"collector {took:.4f} generation {info['generation']}")

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._collected = 0.0
        self._last = time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        took = time.thread_time() - self._last - self._collected
        if took > self._longest:
            self._longest = took
            self._note(f"step {took:.4f} {task.name} {self._seen}")
        self._last, self._seen = 0.0, ""

    def _note(self, line: str) -> None:
        with open(FILE, "a") as out:
            out.write(line + "\n")

    def _watch(self) -> None:
        """Looks again and again where the loop is. A step that is seen twice is a long one."""
        before = 0.0
        while True:
            time.sleep(0.01)
            if (
                self._last
                and self._last == before
                and (frame := sys._current_frames().get(self._thread)) is not None
            ):
                places = reversed(traceback.extract_stack(frame)[-12:])
                self._seen = " < ".join(
                    f"{place.filename.rsplit('/', 1)[-1]}:{place.lineno}" for place in places
                )
            before = self._last


if FILE and "ipfsfuse" in " ".join(sys.orig_argv):
    _run = trio.run

    def run(*args: Any, instruments: Any = (), **options: Any) -> Any:
        return _run(*args, instruments=[*instruments, LongestStep()], **options)

    trio.run = run
