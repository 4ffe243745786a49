"""Shows that a test run is alive: names the tests that are running whenever none has finished for a while."""

from __future__ import annotations

import threading
import time

#: Seconds without a finished test after which a line is printed.
QUIET = 30.0


class Heartbeat:
    """A pytest plugin. It runs in the process that prints: under pytest-xdist the one that starts the workers."""

    def __init__(self, config) -> None:
        self.config = config
        self.running: dict[str, float] = {}  # test -> when it started
        self.last = time.monotonic()  # when anything was printed
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    def pytest_sessionstart(self) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def pytest_sessionfinish(self) -> None:
        self.stopped.set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        with self.lock:
            self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        with self.lock:
            self.running.pop(nodeid, None)
            self.last = time.monotonic()

    def _watch(self) -> None:
        while not self.stopped.wait(1.0):
            with self.lock:
                now = time.monotonic()
                if now - self.last < QUIET:
                    continue
                self.last = now
                tests = [f"{name} ({now - start:.0f} s)" for name, start in self.running.items()]
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            if reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(f"running: {', '.join(tests) or 'between tests'}")
