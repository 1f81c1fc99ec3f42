"""The lessons run, their solutions are right, and wrong answers are told why."""

import os
import re
import subprocess
import sys
import time

import check
import numpy as np
import pytest
from lesson import Wrong, save_picture, save_plot, where
from helpers import ROOT
from PIL import Image

from stable_diffusion.noise_scheduler import ddim

LESSONS = sorted((ROOT / "scripts" / "lessons").glob("[0-9][0-9]_*.py"))
NUMBERS = [path.name[:2] for path in LESSONS]
MOST_LINES, MOST_SECONDS = 120, 60
LONG = {"11": 180}  # seconds that a longer lesson may take


@pytest.fixture(params=LESSONS, ids=[path.stem for path in LESSONS])
def lesson(request):
    return request.param


def make_environment():
    """Returns that of a new user: TensorFlow prints what it prints by itself."""
    kept = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def load_checks(number):
    return check.import_file(ROOT / "scripts" / "lessons" / "checks" / f"lesson_{number}.py")


def list_exercises():
    """Returns the number and name of each exercise."""
    return [(number, name) for number in NUMBERS for name in check.list_checks(number)]


def test_there_are_ten_lessons_and_one():
    assert NUMBERS == [f"{n:02}" for n in range(1, 12)]


def test_a_lesson_is_short_and_has_exercises(lesson):
    text = lesson.read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= 100
    assert "where(" in text and "https://arxiv.org/abs/" in text
    exercises = text.partition("# --- Exercises")[2]
    checks = check.list_checks(lesson.name[:2])
    assert 2 <= len(checks) <= 3
    for name in checks:
        assert re.search(rf"^# \d\. {name}\(", exercises, re.MULTILINE), name


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_is_right(number, capsys):
    (solution,) = (ROOT / "scripts" / "lessons" / "solutions").glob(f"{number}_*.py")
    assert solution.name == next(path.name for path in LESSONS if path.name.startswith(number))
    assert check.main([number, str(solution)]) == 0
    out = capsys.readouterr().out.splitlines()
    names = check.list_checks(number)
    count = len(names)
    assert out == [*(f"{name}: right" for name in names), f"{count} of {count} are right."]


@pytest.mark.parametrize(("number", "name"), list_exercises())
def test_wrong_answers_are_told_why(number, name):
    wrong = load_checks(number).WRONG[name]
    assert len(wrong) >= 2
    for answer, part in wrong:
        why = check.check_answer(check.list_checks(number)[name], answer)
        assert why is not None, f"a wrong answer was right: {part}"
        assert part in why, why


@pytest.mark.large
def test_a_lesson_runs(lesson, tmp_path):
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, lesson, "--out", "pictures"],
        cwd=tmp_path,
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    seconds = time.perf_counter() - start
    assert run.returncode == 0, run.stderr[-3000:]
    print(f"{lesson.stem}: {seconds:.0f} s")
    assert seconds < 3 * LONG.get(lesson.name[:2], MOST_SECONDS)  # other work may run beside it
    assert len(run.stdout.splitlines()) > 8 and "TensorFlow" not in run.stderr
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [*tmp_path.iterdir()] == [tmp_path / "pictures"] and pictures
    for path in pictures:
        assert path.name.startswith(lesson.name[:2]) and path.suffix == ".png"
        with Image.open(path) as picture:
            assert np.array(picture.convert("RGB")).std() > 5


# The command that checks


def run_check(tmp_path, text, capsys, number="03"):
    (tmp_path / "my_answer.py").write_text(text)
    status = check.main([number, str(tmp_path / "my_answer.py")])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("", 1, "there is no function {name} in "),
        (
            "def {name}(*x):\n    return 1 / 0\n",
            1,
            "it ended with ZeroDivisionError: division by zero",
        ),
        ("def {name}(*x):\n    return 1 / 0\n", 1, "(line 2: return 1 / 0)"),
        ("1 / 0\n", 2, "my_answer.py ended with ZeroDivisionError: division by zero"),
        ("\nint('x')\n", 2, "(line 2: int('x'))"),
        ("{name} = 3\n", 1, "it is no function, but of the type int"),
        ("def {name}(): 1\n", 1, "it ended with TypeError: {name}() takes 0 positional"),
        (
            "from stable_diffusion.noise_scheduler import diffuse\n\n\n"
            "def {name}(x0, noise, alpha):\n    return diffuse(x0, noise[:3], alpha)\n",
            1,
            "(line 5: return diffuse(x0, noise[:3], alpha))",
        ),
        ("def f(:\n", 2, "my_answer.py ended with SyntaxError: "),
    ],
)
def test_answers_that_fail(tmp_path, capsys, text, status, message):
    name = next(iter(check.list_checks("03")))
    found, out, err = run_check(tmp_path, text.replace("{name}", name), capsys)
    assert found == status
    assert message.replace("{name}", name) in (out[0] if status == 1 else err[0])
    assert len(err) == (status == 2)


def test_wrong_arguments(tmp_path, capsys):
    assert check.main(["03", str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err == f"check.py: There is no file {tmp_path / 'none.py'}.\n"
    assert run_check(tmp_path, "", capsys, "99")[2][0].startswith(
        "check.py: LESSON must be one of 01, 02"
    )
    assert run_check(tmp_path, "", capsys, "3")[0] == 1  # as 03
    with pytest.raises(SystemExit) as error:
        check.main([])
    assert error.value.code == 2


def test_the_command_prints_nothing_else(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "lessons" / "check.py", "03", "none.py"]
    options = {"cwd": tmp_path, "env": make_environment(), "capture_output": True, "text": True}
    run = subprocess.run(command, **options, timeout=300)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "check.py: There is no file none.py.\n"


def test_an_error_of_the_checks_own_names_the_answers_line():
    def answer(x):
        return x.shape[5]

    def check_it(answer):
        if answer(np.ones(2)):
            raise Wrong("never")

    why = check.check_answer(check_it, answer)
    assert why.startswith("it ended with IndexError: ") and "return x.shape[5])" in why


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it returned None: is there a return?"),
        ("x", "it returned 'x' (str), which does not fit"),
        (np.ones(3), "it returned an array of shape (3,) and type float64, which does not fit"),
    ],
)
def test_what_a_check_cannot_use_is_named(value, message):
    def check_it(answer):
        np.ones((2, 2)) - answer()

    assert check.check_answer(check_it, eval("lambda: value", {"value": value})) == message


def test_an_answer_that_changes_an_array_is_wrong_and_spoils_nothing():
    array = np.zeros(3)

    def answer(scale, x):
        x += scale
        return x

    why = check.check_answer(lambda answer: answer(2, array), answer)
    assert why == "it changes its arguments in place (number 2): copy first."
    assert (array == 0).all()


# Pictures


def test_pictures(tmp_path, capsys):
    image = np.zeros((16, 16, 3), "uint8")
    image[:, 8:] = 255, 0, 0
    rows = [[("one", image), ("grey", np.linspace(0, 1, 256).reshape(16, 16))], [("x", image)]]
    save_picture(tmp_path / "x.png", rows)
    assert capsys.readouterr().out == f"-> {tmp_path / 'x.png'}\n"
    picture = np.array(Image.open(tmp_path / "x.png").convert("RGB"))
    assert picture.shape == (2 * (192 + 38) + 12, 2 * (192 + 12) + 12, 3)
    assert (picture == (255, 0, 0)).all(-1).sum() == 2 * 192 * 96
    assert (picture < 100).all(-1)[:26].any()  # the labels


def test_plots(tmp_path):
    x = np.linspace(0, 10, 50)
    save_plot(tmp_path / "x.png", {"up": (x, x**2), "down": (x, -x)}, "time", "height")
    save_plot(tmp_path / "y.png", {"cloud": (x, np.sin(x))}, "x", "y", points=True)
    save_plot(tmp_path / "z.png", {"flat": (x, 0 * x)}, "x", "y")
    for name in "xyz":
        assert np.array(Image.open(tmp_path / f"{name}.png").convert("RGB")).std() > 5


def test_where():
    assert re.fullmatch(r"stable_diffusion/noise_scheduler\.py:\d+", where(ddim))
