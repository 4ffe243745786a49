"""Chooses among a kernel's few tiles by timing them once on the GPU at hand; the choice is kept on disk.

The key is the Triton version and GPU (the file), the kernel, its dtypes, N, D, R and the power of two above M. Nothing
is timed during CUDA graph capture, in a backward pass (other ranks may be waiting), or after ``set_enabled(False)``: an
earlier choice is used, or the first tile. Tiles differ in the order of additions, so two machines agree to rounding
only; with ``torch.use_deterministic_algorithms(True)`` the first tile is always used, and they agree to the bit.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import triton

from ..files import write_atomically
from .launch import Target, Tile, next_power_of_2, precision, recording
from .launch_plan import forget
from .tiles import tiles

_enabled = True
_chosen: dict[Path, dict[str, Tile]] = {}


def set_enabled(enabled: bool) -> None:
    """Set whether tiles without a time on this GPU are timed at their first use (the default)."""
    global _enabled
    _enabled = enabled
    forget()


@lru_cache
def cache_file(target: Target, folder: Path | None = None) -> Path:
    """The file of the choices for a GPU, in ``$XDG_CACHE_HOME/masm_ext/triton`` (``~/.cache/...``) or `folder`."""
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "masm_ext" / "triton"
    name = re.sub(r"[^a-z0-9]+", "-", f"{triton.__version__} {target.name} sm{target.capability}".lower())
    return folder / f"{name.strip('-')}.json"


def key_of(kernel: str, M: int, *rest: object) -> str:
    """The key of a choice. M is rounded up to a power of two, so that one image more is not timed again."""
    return " ".join(map(str, (kernel, next_power_of_2(max(M, 1)), *rest)))


def choose(
    target: Target, key: str, candidates: Sequence[Tile], launch: Callable[[Tile], object], folder: Path | None = None
) -> Tile:
    """The fastest of `candidates`; `launch(tile)` runs the kernel. Synchronises the GPU if it has to time.

    Raises RuntimeError if no candidate runs, from the error of the first.
    """
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return candidates[0]
    path = cache_file(target, folder)
    if path not in _chosen:
        _chosen[path] = _read(path)
    known = _chosen[path].get(key)
    if known in candidates:
        return known
    if not _enabled or not torch.cuda.is_available():
        return candidates[0]
    if torch._C._current_graph_task_id() != -1:  # a backward pass, and so are its later calls
        return candidates[0]
    plan = recording()
    if plan is not None:
        plan.reject("its tiles are not chosen yet", again=True)
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    best = measure(key, candidates, launch)
    _chosen[path][key] = best
    _write(path, key, best)
    return best


def run_tuned(
    launch: Callable[[Tile], None],
    kernel: str,
    target: Target,
    dtype: torch.dtype,
    tile: Tile | None,
    M: int,
    *key: object,
) -> None:
    """Launch with the given tile, or with the one chosen for (kernel, M, key)."""
    if tile is None:
        candidates = tiles(kernel, target, dtype, precision(dtype))
        tile = choose(target, key_of(kernel, M, dtype, precision(dtype), *key), candidates, launch)
    launch(tile)


def measure(key: str, candidates: Sequence[Tile], launch: Callable[[Tile], object]) -> Tile:
    """The fastest of those that compile and run: some fail with another Triton, or less shared memory."""
    times: dict[Tile, float] = {}
    failures: list[Exception] = []
    for tile in candidates:
        try:
            times[tile] = triton.testing.do_bench(lambda t=tile: launch(t), warmup=5, rep=25, return_mode="median")
        except Exception as error:  # compilers raise many types
            failures.append(error)
    if not times:
        kernel, _, shape = key.partition(" ")
        raise RuntimeError(
            f"masm_ext: none of {len(candidates)} tiles of kernel {kernel!r} runs here ({shape}): {failures[0]}"
        ) from failures[0]
    return min(times, key=times.__getitem__)


def _read(path: Path) -> dict[str, Tile]:
    try:
        entries = json.loads(path.read_text())
        return {key: Tile(*map(int, tile)) for key, tile in entries.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"the tuning cache {path} cannot be read ({error}); tiles are timed again", stacklevel=3)
        return {}


def _write(path: Path, key: str, tile: Tile) -> None:
    # keeps entries of other processes; of two that write at once, the later wins and the other times again
    entries = {**_read(path), key: tile}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(entries, indent=0, sort_keys=True).encode())
    except OSError as error:
        warnings.warn(f"the tuning cache {path} cannot be written ({error}); tiles are timed anew", stacklevel=3)
