"""The command line: `numpyesm COMMAND …`. Results go to stdout or `-o`, talk to stderr."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence

from ..errors import InvalidOption, NumpyesmError
from .parser import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for a failure, 2 for wrong use."""
    arguments = build_parser().parse_args(argv)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets ? for what it cannot show
    if threading.current_thread() is threading.main_thread():
        # As an exception, so that half-written files are removed on the way out.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (head, less) has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("numpyesm: interrupted", file=sys.stderr)
        return 130
    except (NumpyesmError, OSError, MemoryError) as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"numpyesm: error: {error or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, InvalidOption) else 1


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"numpyesm: warning: {message}", file=sys.stderr)
