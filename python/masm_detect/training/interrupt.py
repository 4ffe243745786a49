"""Ctrl-C or SIGTERM in a training run: honoured after the current step, when its checkpoint is written."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM in training: the checkpoint of the last step is written."""


class CtrlC:
    """A context in which the first Ctrl-C only sets `pressed`; the second one raises KeyboardInterrupt.

    SIGTERM counts as the first Ctrl-C, however often it comes: batch systems and launchers send it some seconds before
    they kill, and a process may get it from both. A signal is left as it is if `wait` is false, outside the main thread
    (which alone receives signals), or if the caller has a handler of its own for it.
    """

    def __init__(self, wait: bool) -> None:
        self.pressed = False
        self._process = os.getpid()
        main = threading.current_thread() is threading.main_thread()
        defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
        self._defaults = {
            number: handler
            for number, handler in defaults.items()
            if wait and main and signal.getsignal(number) is handler
        }

    def __enter__(self) -> CtrlC:
        for number in self._defaults:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._defaults.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if os.getpid() != self._process:  # a worker that was forked with this handler and has not started yet
            return
        if self.pressed:
            if number == signal.SIGTERM:  # of SLURM, and passed on by torchrun
                return
            raise KeyboardInterrupt
        self.pressed = True
        with suppress(OSError):  # the reader may be gone: `2>&1 | tee` is stopped by the same Ctrl-C
            # os.write: the handler may run in the middle of a print
            os.write(2, b"\nstopping with a checkpoint after this step, or after the validation that it leads to; "
                     b"Ctrl-C again stops at once\n")  # fmt: skip

    def raise_if_pressed(self, step: int) -> None:
        """Raise Interrupted if Ctrl-C was pressed; `step` is the number of completed steps."""
        if self.pressed:
            raise Interrupted(f"interrupted after step {step}, whose checkpoint is written")
