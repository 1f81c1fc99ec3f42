"""Skips this folder, with the reason, where KerasCV can't be the reference."""

import pytest

from stable_diffusion.parity import keras_cv as compare_keras_cv

REASON = compare_keras_cv.explain_absence()


class SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return SkippedModule.from_parent(parent, path=module_path) if REASON else None
