"""Times the lessons and the command stable-diffusion-explain, each as a whole process.

    python scripts/measure/time_lessons.py [--runs 3]

Printed are the medians in seconds. The lessons take turns, so that a slow minute of the machine
falls on all of them.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LESSONS = Path(__file__).parents[1] / "lessons"
PROMPT = "a red apple on a blue background"


def time_command(command, folder):
    """Returns the seconds that a command takes in a folder."""
    start = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    explain = [sys.executable, "-m", "stable_diffusion.command.explain", PROMPT, "--out", "apple"]
    commands = {"explain": explain}
    commands |= {path.stem: [sys.executable, path] for path in sorted(LESSONS.glob("[01]*.py"))}
    seconds = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.runs):
            for name, command in commands.items():
                seconds[name].append(time_command(command, folder))
    for name, some in seconds.items():
        print(f"{name:20} {statistics.median(some):4.0f} s")


if __name__ == "__main__":
    main()
