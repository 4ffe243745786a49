"""Progress bars that suit a log file: where the output is no terminal, one line every 10% instead of a redrawn bar."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Progress(tqdm):
    """A `tqdm` bar; arguments as there.

    On a terminal it is tqdm's own. Elsewhere (a file, a pipe, CI) it prints a line at each tenth of `total` and one at
    its end; without a total, the one at its end.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        stream = options.get("file") or sys.stderr
        self._as_lines = not stream.isatty()
        self._tenth, self._printed = -1, -1
        super().__init__(*args, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or print its line if it has reached another tenth."""
        if not self._as_lines:
            return super().display(msg, pos)
        tenth = int(10 * self.n / self.total) if self.total else -1
        if tenth > self._tenth:
            self._tenth = tenth
            self._print()
        return False

    def clear(self, nolock: bool = False) -> None:
        """Remove the bar from the terminal; printed lines stay."""
        if not self._as_lines:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar, with a last line where it prints lines."""
        if self._as_lines and not self.disable:
            self.leave = False
            if self.n != self._printed:
                self._print()
            self._tenth = 10  # no more lines
        super().close()

    def _print(self) -> None:
        self._printed = self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()
