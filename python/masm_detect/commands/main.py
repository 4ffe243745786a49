"""The command `masm`: reads the arguments, runs one command, and reports a user's mistake in one line.

A new command is one module with `HELP`, `add_arguments(parser)` and `run(values)`, and one line in `COMMANDS`. `run`
may return an exit code (None: 0). A module may also define `complete(arguments)`, which returns the arguments to parse.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from masm_detect.errors import UserError
from masm_detect.launch import is_first, is_launched

from .arguments import instantiate, one_line

# This module must not import torch, directly or through others: the import takes a second, and Ctrl-C during it would
# end in a traceback. It is imported inside the try of `main`.

#: Name of a command -> its module, in the order of the help.
COMMANDS: dict[str, str] = {
    "env": "masm_detect.commands.env",
    "doctor": "masm_detect.commands.doctor",
    "prepare": "masm_detect.commands.prepare",
    "train": "masm_detect.commands.train",
    "eval": "masm_detect.commands.eval",
    "predict": "masm_detect.commands.predict",
    "calibrate": "masm_detect.commands.calibrate",
    "analyze": "masm_detect.commands.analyze",
    "app": "masm_detect.commands.app",
    "compare": "masm_detect.commands.compare",
    "robustness": "masm_detect.commands.robustness",
    "report": "masm_detect.commands.report",
    "export": "masm_detect.commands.export",
    "demo": "masm_detect.commands.demo",
}

#: Commands that divide their work among the processes of a launcher.
IN_PROCESSES = ("train", "eval", "predict")

#: Exit code of a mistake that the user can correct.
USER_ERROR = 2
#: Exit code of a command that is done, but had to skip some of the files.
FILES_SKIPPED = 3
#: Exit code after Ctrl-C, as of a shell.
INTERRUPTED = 130
#: Exit code when the reader of the output has gone (`masm compare ... | head -1`), as of a shell after SIGPIPE.
CLOSED_PIPE = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `masm` with `arguments` (None: those of the process); returns the exit code."""
    try:
        try:
            return _main(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is handled, not when the interpreter ends
    except BrokenPipeError:
        if not _discard_unread_output():
            raise  # the pipe of a worker process: a bug
        return CLOSED_PIPE


def _main(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # transformers warns of unknown model types and missing chat templates; its progress bars hide ours.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):  # at import: of libraries for other GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _one_line_warning
    if is_launched() and not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends): one process prints
    command = values = None
    try:
        if "--version" in arguments[:1]:
            print(_version())
            return 0
        parser, commands = build_parser()
        if not arguments:
            parser.print_help()
            return 0
        try:
            values = parser.parse_args(completed(arguments, commands))
        except ArgumentError as error:
            print(f"masm: error: {one_line(str(error))}", file=sys.stderr)
            return USER_ERROR
        command = values.subcommand
        if is_launched() and command not in IN_PROCESSES:
            print(
                f"masm {command}: error: it runs in one process; start it without torchrun or accelerate launch (in "
                f"several processes run {', '.join(IN_PROCESSES)})",
                file=sys.stderr,
            )
            return USER_ERROR
        try:
            return commands[command].run(instantiate(parser, values)[command]) or 0
        except Exception as error:
            if not isinstance(error, _user_errors()) and not _is_full(error):
                raise
            print(f"masm {command}: error: {' '.join(str(error).split())}{_if_full(error)}", file=sys.stderr)
            return USER_ERROR
    except BaseException as error:
        # A module whose import is interrupted may raise an error of its own, with the interrupt as its cause.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        what = str(error) if isinstance(error, KeyboardInterrupt) else ""
        hint = _after_interrupt(command, values)
        print(f"masm: {what or 'interrupted'}{hint}", file=sys.stderr)
        return INTERRUPTED


def _discard_unread_output() -> bool:
    """Redirect standard streams whose reader has gone to the null device; whether there was one."""
    unread = [stream for stream in (sys.stdout, sys.stderr) if stream is not None and _is_unread(stream)]
    for stream in unread:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    return bool(unread)


def _is_unread(stream: Any) -> bool:
    """Whether the stream is a pipe whose reader has gone."""
    try:
        stream.flush()
    except BrokenPipeError:
        return True
    # A write that failed may have left nothing to flush.
    if not hasattr(select, "poll"):
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file of the system
        return False


def _one_line_warning(message: Any, category: type[Warning], filename: str, lineno: int, line: Any = None) -> str:
    """A warning of ours without the place in the source, which means nothing to a user."""
    if issubclass(category, UserWarning):
        return f"masm: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def build_parser() -> tuple[ArgumentParser, dict[str, ModuleType]]:
    """The parser of `masm`, and the module of each command."""
    # exit_on_error would print the usage, 60 lines for train, before the error. allow_abbrev would take a mistyped name
    # for another setting.
    options: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
    parser = ArgumentParser(
        prog="masm", description="Deepfake detection with multi-artifact subspace fine-tuning.", **options
    )
    parser.add_argument("--version", action="store_true", default=SUPPRESS, help="print the versions and exit")
    subcommands = parser.add_subcommands(required=True, dest="subcommand")
    commands = {name: import_module(module) for name, module in COMMANDS.items()}
    for name, command in commands.items():
        child = ArgumentParser(description=command.HELP[0].upper() + command.HELP[1:] + ".", **options)
        command.add_arguments(child)
        subcommands.add_subcommand(name, child, help=command.HELP)
    return parser, commands


def _after_interrupt(command: str | None, values: Any) -> str:
    """What to do after Ctrl-C in a command with these values."""
    if command in ("prepare", "predict", "robustness"):
        return "; repeat the command to continue"
    if command != "train":
        return ""
    if os.path.isfile(os.path.join(values.train.out, "config.yaml")):
        return "; continue the run with --resume"
    return " before the first step: nothing was written, start it again"


def completed(arguments: list[str], commands: dict[str, ModuleType]) -> list[str]:
    """The arguments after the command's own `complete`, if it has one."""
    complete = getattr(commands.get(arguments[0]), "complete", None)
    return arguments if complete is None else [arguments[0], *complete(arguments[1:])]


def _version() -> str:
    import torch

    from masm_ext import __version__

    return f"masm_ext {__version__} (torch {torch.__version__})"


def _is_full(error: BaseException) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _if_full(error: BaseException) -> str:
    return "; make room and repeat the command" if _is_full(error) else ""


def _user_errors() -> tuple[type[BaseException], ...]:
    """Errors whose message contains what to do: settings, data, files, checkpoints. Any other error is a bug."""
    from masm_ext.adapter import AdapterError

    files = (FileNotFoundError, PermissionError, NotADirectoryError, FileExistsError, IsADirectoryError)
    return (UserError, AdapterError, *files)
