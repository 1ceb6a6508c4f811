"""Plain `pytest` runs the fast tests, `pytest -m slow` the others."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: more than seconds: the 124M shape, whole training runs")
    config.option.markexpr = config.option.markexpr or "not slow"
