"""The command line: `numpyesm COMMAND …`. Results go to stdout or `-o`, messages to stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from ..errors import InvalidOption, NumpyesmError
from ..printable import in_words, printable
from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for a failure, or 2 for wrong use."""
    arguments = build_parser().parse_args(argv)
    return guarded(partial(arguments.run, arguments), arguments.debug)


def guarded(run: Callable[[], int], debug: bool = False) -> int:
    """Return the exit code of `run`; errors and warnings become lines on stderr, with `debug` tracebacks too."""
    warnings.showwarning = _show_warning
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller (>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? instead
    if threading.current_thread() is threading.main_thread():
        # Raised as an exception, so that half-written files are removed.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code = run()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, less) has gone
        _silence_stdout()
        return 1
    except KeyboardInterrupt:
        print("numpyesm: interrupted", file=sys.stderr)
        return 130
    except (NumpyesmError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        print(f"numpyesm: error: {printable(in_words(error))}", file=sys.stderr)
        if isinstance(error, OSError) and error.filename is None:
            _silence_stdout()
        return 2 if isinstance(error, InvalidOption) else 1


def _silence_stdout() -> None:
    """Keep the interpreter from complaining at exit about unwritten output."""
    with suppress(OSError, ValueError):  # a stream without a descriptor, as in notebooks and tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"numpyesm: warning: {printable(str(message))}", file=sys.stderr)
