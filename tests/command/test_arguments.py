"""What the commands share: types of arguments, names that are not Keras', messages, PNG files."""

import argparse
import os
import signal
import subprocess
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from stable_diffusion import __version__, noise, noise_scheduler, prompts, samplers, spacing
from stable_diffusion.adapters import lora
from stable_diffusion.checkpoints import FORMATS, tensors
from stable_diffusion.command import arguments, convert, explain, finetune, generate, png, terminal
from stable_diffusion.replacing import replace_file
from stable_diffusion.training import distribution, methods, optimizers

COMMANDS = [generate, convert, finetune, explain]
SMALL = {
    generate: ["a"],
    convert: ["in", "out"],
    finetune: ["f", "--method", "lora", "--out", "x"],
    explain: ["a", "--out", "x"],
}


def test_names_are_those_of_the_tables():
    assert arguments.SAMPLERS == tuple(samplers.SAMPLERS)
    assert arguments.SPACINGS == tuple(spacing.SPACINGS)
    assert arguments.NOISE_SOURCES == tuple(noise.NOISE_SOURCES)
    assert arguments.PROMPT_SYNTAXES == prompts.PROMPT_SYNTAXES
    assert arguments.DTYPES == tensors.DTYPES
    assert list(arguments.FORMATS.items()) == [(k, f.description) for k, f in FORMATS.items()]
    known = get_args(get_type_hints(noise_scheduler.NoiseScheduler)["prediction_type"])
    assert (*arguments.PREDICTION_TYPES, "sample") == known  # no checkpoint predicts samples
    assert arguments.TRAINED_PARAMETERS == tuple(methods.PARAMETERS)
    assert arguments.LORA_TARGETS == tuple(methods.TARGETS)
    assert arguments.LORA_KEYS == tuple(lora.WRITTEN)
    assert list(finetune.RATES) == [*methods.METHODS, "dreambooth"]
    assert arguments.RATE_SCHEDULES == tuple(optimizers.SCHEDULES)
    assert arguments.DISTRIBUTIONS == distribution.KINDS


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_are_parsed_before_keras_is_imported(command):
    """So `--help` answers at once. The process ends with the modules that it should not have."""
    code = (
        "import contextlib, io, sys; from stable_diffusion.command import {0}\n"
        "{0}.get_parser().parse_args({1!r})\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:\n"
        "    {0}.main(['--help'])\n"
        "assert 'usage: stable-diffusion' in said.getvalue()\n"
        "heavy = {{'keras', 'tensorflow', 'jax', 'numpy', 'PIL'}} & set(sys.modules)\n"
        "sys.exit(' '.join(heavy) or 0)"
    ).format(command.__name__.rpartition(".")[2], SMALL[command])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal(command):
    lines = command.get_parser().format_help().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: {command.NAME} ")
    assert any(line.startswith("exit status: 0 done, 1 failed, 2 ") for line in lines)
    assert not [line for line in lines if ".py" in line], "a wheel has no scripts"


@pytest.mark.parametrize("command", COMMANDS)
def test_version(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{command.NAME} {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_arguments_are_told_in_one_line(command, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main([*SMALL[command], "--stepz", "3"])
    assert ended.value.code == 2
    said = f"{command.NAME}: unrecognized arguments: --stepz 3 (see {command.NAME} --help)\n"
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("kind", "text", "value"), [(int, "1", 1), (int, "10", 10), (float, "2.5", 2.5)]
)
def test_numbers(kind, text, value):
    number = arguments.make_number_type(kind, 1, 10)(text)
    assert number == value and type(number) is kind


@pytest.mark.parametrize("text", ["0", "11", "x", "", "nan", "inf", "1e1000"])
@pytest.mark.parametrize("kind", [int, float])
def test_numbers_outside_a_range(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not an? .* from 1 to 10"):
        arguments.make_number_type(kind, 1, 10)(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"from 1$"):
        arguments.make_number_type(kind, 1)("0.5")


def test_colours():
    assert arguments.parse_colour("#ff8000") == (255, 128, 0)
    assert arguments.parse_colour("#ff800010") == (255, 128, 0), "without its transparency"
    with pytest.raises(argparse.ArgumentTypeError, match="'bleu' is not a colour"):
        arguments.parse_colour("bleu")


# Exit status


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("steps must\n be 1"), 2, "steps must be 1"),
        (OSError(28, "No space left"), 2, "OSError: [Errno 28] No space left"),
        (ImportError("no jax"), 1, "ImportError: no jax"),
        (MemoryError("too large"), 1, "MemoryError: too large"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_errors_end_all_commands_alike(command, error, status, message, capsys, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(command, "get_parser", fail)
    assert command.main(SMALL[command]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"{command.NAME}: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_sigterm_ends_all_commands_and_leaves_nothing_half_written(
    command, tmp_path, capsys, monkeypatch
):
    def write():
        with replace_file(tmp_path / "out.png") as written:
            written.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)

    monkeypatch.setattr(command, "get_parser", write)
    assert command.main(SMALL[command]) == 143
    assert capsys.readouterr().err.startswith(f"{command.NAME}: interrupted")
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as before


def test_a_program_keeps_its_own_handler_of_sigterm():
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        work = lambda argv: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        assert terminal.run_command("x", work, []) == 0 and got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(terminal.run_command, "x", lambda argv: 3, []).result() == 3


def test_other_errors_are_not_hidden():
    def fail(argv):
        raise KeyError("a mistake in the program")

    with pytest.raises(KeyError):
        terminal.run_command("x", fail, [])


def test_a_status_is_passed_on(capsys):
    assert terminal.run_command("x", lambda argv: 130, []) == 130
    assert terminal.run_command("x", lambda argv: None, []) == 0
    assert capsys.readouterr() == ("", "")


# PNG files

TEXT = {"prompt": "a cät", "seed": "3"}


def write_image(path, text=TEXT):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), "uint8")
    png.write_png(path, pixels, text)
    return pixels


def test_png_holds_pixels_and_text(tmp_path):
    pixels = write_image(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.array(image), pixels)
    assert png.read_text(tmp_path / "a.png") == TEXT
    assert png.is_generated(tmp_path / "a.png", TEXT)
    assert not png.is_generated(tmp_path / "a.png", TEXT | {"seed": "4"})
    assert not png.is_generated(tmp_path / "a.png", TEXT | {"steps": "4"})


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "text", "jpeg", "changed"])
def test_damaged_files_were_not_generated(kind, tmp_path):
    path = tmp_path / "a.png"
    write_image(path)
    data = path.read_bytes()
    if kind == "jpeg":
        Image.new("RGB", (8, 8)).save(path, "jpeg")
    elif kind == "missing":
        path.unlink()
    else:
        middle = data[:200] + bytes([data[200] ^ 255]) + data[201:]
        path.write_bytes({"cut": data[:-100], "empty": b"", "text": b"x", "changed": middle}[kind])
    with pytest.raises(ValueError, match="a.png is not an intact PNG"):
        png.read_text(path)
    assert not png.is_generated(path, TEXT)


def test_text_after_the_pixels_is_read_too(tmp_path):
    """Other programs may write it there."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    data, chunk = (tmp_path / "a.png").read_bytes(), b"tEXtseed\0003"
    end = data.index(b"IEND") - 4
    chunk = (6).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data[:end] + chunk + data[end:])
    assert png.read_text(tmp_path / "a.png") == {"seed": "3"}


def test_a_warning_is_one_line(capsys):
    def work(argv):
        warnings.simplefilter("always")
        warnings.warn("values that are\nnot finite", stacklevel=1)

    shown = warnings.showwarning
    assert terminal.run_command("stable-diffusion", work) == terminal.DONE
    assert capsys.readouterr().err == "stable-diffusion: values that are not finite\n"
    assert warnings.showwarning is shown
