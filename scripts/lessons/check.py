"""Checks answers to the exercises of a lesson, and says what is wrong with them.

    python scripts/lessons/check.py 03 my_answer.py

Exit status: 0 if all are right, 1 if one is wrong or missing, 2 if nothing could be checked. The
answer is a Python file, and it is run: check answers of your own only.
"""

import argparse
import functools
import importlib.util
import sys
import traceback
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the checks import lesson.py

from lesson import Wrong  # noqa: E402


def import_file(path):
    """Runs a Python file and returns it as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_checks(number):
    """Returns the checks of a lesson: a dict from the name of an exercise to its function.

    Raises:
        ValueError: no such lesson, or one without exercises.
    """
    files = {path.stem.removeprefix("lesson_"): path for path in HERE.glob("checks/lesson_*.py")}
    if number.zfill(2) not in files:
        raise ValueError(f"LESSON must be one of {', '.join(sorted(files))}, not {number!r:.50}.")
    module = import_file(files[number.zfill(2)])
    names = (name for name in vars(module) if name.startswith("check_"))
    return {name.removeprefix("check_"): getattr(module, name) for name in names}


def check_answer(check, answer):
    """Returns None if an answer is right, otherwise why not.

    Args:
        check: function of the answer, which raises `lesson.Wrong`.
        answer: the reader's function. One that changes an array which it was given is wrong: it
            would spoil what the check compares with.
    """
    if not callable(answer):
        return f"it is no function, but of the type {type(answer).__name__}"
    returned = []

    @functools.wraps(answer)
    def call(*args, **kwargs):
        returned.clear()
        arrays = [(n, given) for n, given in enumerate(args) if isinstance(given, np.ndarray)]
        kept = [given.copy() for _, given in arrays]
        returned.append(answer(*args, **kwargs))
        for (n, given), before in zip(arrays, kept, strict=True):
            if given.tobytes() != before.tobytes():
                given[...] = before
                raise Wrong(f"it changes its arguments in place (number {n + 1}): copy first.")
        return returned[0]

    try:
        check(call)
    except Wrong as error:
        return str(error)
    except Exception as error:
        file = getattr(getattr(answer, "__code__", None), "co_filename", None)
        if returned and not _find_line(error, file):  # the check could not use what it got
            return f"it returned {_describe_value(returned[0])}"
        return f"it ended with {describe_error(error, file)}"
    return None


def describe_error(error, file):
    """Returns an exception in one line, with the last line of the reader's file that led to it."""
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line:.300}{_find_line(error, file)}"


def _find_line(error, file):
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    return f" (line {own[-1].lineno}: {own[-1].line})" if own else ""


def _describe_value(value):
    if value is None:
        return "None: is there a return?"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}, which does not fit"
    return f"{value!r:.60} ({type(value).__name__}), which does not fit"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lesson", metavar="LESSON", help="its number, such as 03")
    parser.add_argument("answer", metavar="FILE", type=Path, help="your Python file")
    args = parser.parse_args(argv)
    try:
        checks = list_checks(args.lesson)
        if not args.answer.is_file():
            raise ValueError(f"There is no file {args.answer}.")
    except ValueError as error:
        print(f"check.py: {error}", file=sys.stderr)
        return 2
    try:
        answers = import_file(args.answer)
    except Exception as error:
        why = describe_error(error, args.answer)
        print(f"check.py: {args.answer} ended with {why}", file=sys.stderr)
        return 2
    wrong = 0
    for name, check in checks.items():
        answer = getattr(answers, name, None)
        if answer is None:
            why = f"there is no function {name} in {args.answer}"
        else:
            why = check_answer(check, answer)
        wrong += why is not None
        print(f"{name}: " + ("right" if why is None else f"wrong: {why}"))
    print(f"{len(checks) - wrong} of {len(checks)} are right.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
