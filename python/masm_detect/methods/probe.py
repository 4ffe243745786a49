"""Linear probe: the head alone is trained, on the features of the frozen backbone."""

from __future__ import annotations

from .method import MethodSpec, Rates


class Probe(MethodSpec):
    """Trains the head."""

    rates = Rates(lr=1e-3)
