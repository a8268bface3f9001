"""Peers are compared where they are installed: `make test-peers` has them, `make test` has not."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

README = Path(__file__).parents[2] / "README.md"
TABLES = {
    "networks": """\
| network | from | scores | conserved | zennit | absorbed |
| --- | --- | ---: | ---: | ---: | ---: |
""",
    "presets": """\
| preset | original | relevance |
| --- | --- | ---: |
""",
}
_rows = pytest.StashKey()


def marks(table):
    """What is before and behind a table in README.md."""
    return f"<!-- table of {table}, by tests/peers -->\n", f"<!-- end of {table} -->"


def table_in_readme(table):
    begin, end = marks(table)
    return README.read_text().partition(begin)[2].partition(end)[0]


def pytest_addoption(parser):
    parser.addoption("--readme", action="store_true",
                     help="write README.md's tables of networks and presets from what the tests found")


def pytest_configure(config):
    config.stash[_rows] = {table: [] for table in TABLES}


@pytest.fixture(scope="session")
def rows(request):
    """Of the tables of README.md; a test adds its own."""
    return request.config.stash[_rows]


def pytest_sessionfinish(session, exitstatus):
    for table, rows in session.config.stash[_rows].items():
        if session.config.getoption("--readme") and rows and exitstatus == 0:
            begin, end = marks(table)
            before, _, rest = README.read_text().partition(begin)
            lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
            README.write_text(before + begin + TABLES[table] + lines + end + rest.partition(end)[2])
