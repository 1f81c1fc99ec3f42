"""Damaged files of every kind: what is read is what the file says, or one clear error.

pytest tests/faults/test_mutations.py --cases 1000          # of each kind
pytest tests/faults/test_mutations.py --case "lora peft 17"  # one, as a failed test names it
"""

import pytest
from children import Child, ChildDiedError
from kinds import KINDS, run_case

CASES = 3  # of each kind, unless `--cases` says another number
MAX_SHOWN = 20  # faults
NEVER_REFUSED = {"log", "cache"}  # what is damaged is made anew


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def run_cases(kind, numbers, folder):
    """Runs cases in one child process, and in another one when it dies; returns their results."""
    results, child = [], Child(run_case)
    try:
        for number in numbers:
            try:
                results.append(child.call(kind, number, folder))
            except ChildDiedError as error:
                results.append({"number": number, "outcome": "fault", "message": str(error)})
                child = Child(run_case)
    finally:
        child.kill()
    return results


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.large] * (kind == "openvino")) for kind in KINDS],
)
def test_damaged_files(kind, folder, request):
    number, case = (request.config.getoption(name) for name in ("--cases", "--case"))
    numbers = range(number or CASES)
    if case:
        wanted, _, number = case.rpartition(" ")
        numbers = [int(number)] if wanted == kind else []
    results = run_cases(kind, numbers, folder)
    faults = [result for result in results if result["outcome"] == "fault"]
    shown = [
        f'--case "{kind} {fault["number"]}": {fault.get("what")}\n    {fault["message"]}'
        for fault in faults[:MAX_SHOWN]
    ]
    assert not faults, f"{len(faults)} of {len(results)} cases:\n" + "\n".join(shown)
    outcomes = {result["outcome"] for result in results}
    expected = {"right"} if kind in NEVER_REFUSED else {"right", "refused"}
    assert case or len(numbers) < 100 or outcomes == expected
    counts = {o: sum(r["outcome"] == o for r in results) for o in sorted(outcomes)}
    print(f"{kind}: {len(results)} cases, {counts}")
