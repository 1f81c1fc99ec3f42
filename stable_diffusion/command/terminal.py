"""What the commands print, and their exit status."""

import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager

DONE, FAILED, UNUSABLE = 0, 1, 2  # exit statuses
SIGNALLED = 128  # a shell's exit status for a signal is 128 and its number, 130 for Ctrl-C


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: nothing half-written is left."""


def print_message(name, message):
    """Prints a message of the command `name` to standard error, as one line."""
    show_progress("")
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)


def show_progress(message):
    """Shows `message` in place of the last one, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


@contextmanager
def silence_tensorflow():
    """Drops what TensorFlow's C++ code prints when Python imports it, for the time of the block.

    Where the user has set TF_CPP_MIN_LOG_LEVEL, nothing is dropped. To set it here is not enough:
    TensorFlow prints its first lines before it reads the variable.
    """
    if "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def raise_on_sigterm():
    """Raises `Terminated` at the signal SIGTERM, for the time of the block.

    In other threads than the main thread, or if the program has its own handler, it does nothing.
    """

    def stop(number, frame):
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_command(
    name: str,
    work: Callable[[list[str] | None], int | None],
    argv: list[str] | None = None,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command: what every `main` does.

    Args:
        name: of the command, with which its messages begin.
        work: function of `argv` that does all; it returns the exit status, or None for 0.
        argv: the arguments; None is those of this process, which is about to end.
        interrupted: the message after Ctrl-C and SIGTERM.

    Returns:
        The exit status: 0 done, 1 failed, 2 arguments or files that cannot be used, 130
        interrupted, 143 ended by SIGTERM. A message of one line says why it is not 0.
    """

    def show_warning(message, *place):
        print_message(name, message)

    try:
        with raise_on_sigterm(), warnings.catch_warnings():
            warnings.showwarning = show_warning  # without the line of the program
            status = work(argv) or DONE
    except KeyboardInterrupt as error:
        print_message(name, interrupted)
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        return SIGNALLED + number
    except ValueError as error:
        print_message(name, error)
        return UNUSABLE
    except OSError as error:  # a path that can't be read or written, or a full disk
        print_message(name, f"{type(error).__name__}: {error}")
        return UNUSABLE
    except (ImportError, MemoryError) as error:
        print_message(name, f"{type(error).__name__}: {error}")
        return FAILED
    if argv is None:
        gc.freeze()  # otherwise Python looks for garbage at its end, which takes seconds
    return status
