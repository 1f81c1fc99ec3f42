"""Runs the quick tests with the lowest versions that pyproject.toml names.

    python tests/lowest.py                          # on this Python
    python tests/lowest.py --python python3.10      # on another one
    python tests/lowest.py -- tests/test_config.py  # other arguments of pytest

Makes a new environment in a temporary folder, installs exactly these versions of what the package
and its extra `test` need (of what those need in turn, pip chooses), and runs pytest, whose closing
line is the last. Exits as pytest does. Needs the network for pip.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings this along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
EXTRA = "test"
QUICK = ["-m", "quick"]
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,\s-]+)\])?\s*([^;]*)")  # name, extras, versions


def list_requirements(project, extra=None):
    """Yields name and versions of all requirements, also those of extras that an extra names."""
    group = project["optional-dependencies"][extra] if extra else project["dependencies"]
    for requirement in group:
        name, extras, versions = REQUIREMENT.match(requirement).groups()
        if name == project["name"]:
            for other in extras.split(","):
                yield from list_requirements(project, other.strip())
        else:
            yield name, versions.strip()


def find_lowest(versions):
    """Returns the lowest version that is allowed, or None if there is no lower bound."""
    bound = re.search(r"(?:>=|==|~=)\s*([\w.]+)", versions)
    return bound and bound[1]


def list_constraints(project):
    """Returns lines for pip: each requirement with a lower bound, at exactly this version."""
    requirements = [*list_requirements(project), *list_requirements(project, EXTRA)]
    lowest = {name: find_lowest(versions) for name, versions in requirements}
    return [f"{name}=={version}" for name, version in sorted(lowest.items()) if version]


def main(argv=None):
    """Runs the command line; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="default: the one that runs this")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest (default: -m quick)")
    args = parser.parse_args(argv)
    with open(ROOT / "pyproject.toml", "rb") as file:
        constraints = list_constraints(tomllib.load(file)["project"])
    print(*constraints, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "constraints.txt").write_text("\n".join(constraints) + "\n")
        subprocess.run([args.python, "-m", "venv", work / "venv"], check=True)
        python = work / "venv" / "bin" / "python"
        install = ["-m", "pip", "install", "--quiet", "-c", work / "constraints.txt"]
        subprocess.run([python, *install, "-e", f"{ROOT}[{EXTRA}]"], check=True)
        tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(args.pytest or QUICK)]
        return subprocess.run([python, *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
