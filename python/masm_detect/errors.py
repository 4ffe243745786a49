"""The base of every error whose message is for the person at the keyboard."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend. The message says what arrived and what to do; the command `masm` prints it
    as one line and ends with code 2. Anything else that is raised is a bug and keeps its traceback.
    """
