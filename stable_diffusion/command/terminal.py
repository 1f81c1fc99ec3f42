"""What the commands print, and their exit status."""

import gc
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

DONE, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130  # exit statuses; 130 is a shell's for Ctrl-C


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
        interrupted: the message after Ctrl-C.

    Returns:
        The exit status: 0 done, 1 failed, 2 arguments that cannot be used, 130 interrupted. A
        message of one line says why it is not 0.
    """
    try:
        status = work(argv) or DONE
    except KeyboardInterrupt:
        print_message(name, interrupted)
        return INTERRUPTED
    except ValueError as error:
        print_message(name, error)
        return UNUSABLE
    except (OSError, ImportError, MemoryError) as error:
        print_message(name, f"{type(error).__name__}: {error}")
        return FAILED
    if argv is None:
        gc.freeze()  # otherwise Python looks for garbage at its end, which takes seconds
    return status
