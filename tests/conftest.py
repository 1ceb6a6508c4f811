"""Plain `pytest` runs the fast tests, `pytest -m slow` the others."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than seconds: the 124M shape, whole training runs")
    config.addinivalue_line("markers", "real_assessment: train_ppo.py ends with its assessment, which other tests leave out")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture(scope="session", autouse=True)
def clean_up(request, tmp_path_factory):
    """pytest keeps the files of three sessions; at the 124M shape those are tens of gigabytes."""
    yield
    if not request.session.testsfailed:
        shutil.rmtree(tmp_path_factory.getbasetemp(), ignore_errors=True)
