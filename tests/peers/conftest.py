"""Peers are compared where they are installed: `make test-peers` has them, `make test` has not."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- table by tests/peers/test_whole_networks.py -->\n", "<!-- end of networks -->"
HEADER = """\
| network | from | scores | conserved | zennit | absorbed |
| --- | --- | ---: | ---: | ---: | ---: |
"""
_rows = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--readme", action="store_true", help="write the table of networks in README.md from what the tests found")


def pytest_configure(config):
    config.stash[_rows] = []


@pytest.fixture(scope="session")
def rows(request):
    """Of the table of networks; a test adds its own."""
    return request.config.stash[_rows]


def pytest_sessionfinish(session, exitstatus):
    rows = session.config.stash[_rows]
    if session.config.getoption("--readme") and rows and exitstatus == 0:
        text = README.read_text()
        before, _, rest = text.partition(BEGIN)
        README.write_text(before + BEGIN + HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows) + END + rest.partition(END)[2])
