"""Peers are compared where they are installed: `make test-peers` has them, `make test` has not."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

ROOT = Path(__file__).parents[2]
TABLES_FILE, README = ROOT / "docs" / "networks.md", ROOT / "README.md"
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
HEADLINE = [
    "VGG-16", "ResNet-50", "DenseNet-121", "MobileNet v2", "Inception v3", "EfficientNet-B0", "MobileNet v3 small",
    "ConvNeXt-Tiny", "U-Net", "DeepLab v3, MobileNet v3", "PP-OCR v5, text detection, trained",
    "YOLOX, captchas, trained",
    "EfficientNet-Lite0, trained", "SqueezeNet 1.1, trained",
    "ResNet-20 (CIFAR-10), trained", "LeNet (MNIST), trained", "cifar10_full, LRN, trained"
]  # the networks that README.md has
_rows = pytest.StashKey()


def marks(table):
    """What is before and after a table."""
    return f"<!-- table of {table}, by tests/peers -->\n", f"<!-- end of {table} -->"


def table_in(path, table):
    """The lines of a table in docs/networks.md or README.md."""
    begin, end = marks(table)
    return path.read_text().partition(begin)[2].partition(end)[0]


def write_table(path, table, rows):
    """Rows in place of those of the same name and source; others stay."""
    begin, end = marks(table)
    before = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_in(path, table).splitlines()[2:]]
    found = {tuple(row[:2]): row for row in rows}
    rows = [found.pop(tuple(row[:2]), row) for row in before] + list(found.values())
    rows.sort(key=lambda row: row[0].endswith("trained"))  # these last
    text_before, _, rest = path.read_text().partition(begin)
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    path.write_text(text_before + begin + TABLES[table] + lines + end + rest.partition(end)[2])


def pytest_addoption(parser):
    parser.addoption("--readme", action="store_true",
                     help="write docs/networks.md's tables, and README.md's, from what the tests found")


def pytest_configure(config):
    config.stash[_rows] = {table: [] for table in TABLES}


@pytest.fixture(scope="session")
def rows(request):
    """Of the tables of docs/networks.md; a test adds its own."""
    return request.config.stash[_rows]


def pytest_sessionfinish(session, exitstatus):
    found = session.config.stash[_rows]
    if not session.config.getoption("--readme") or exitstatus != 0:
        return
    for table, rows in found.items():
        if rows:
            write_table(TABLES_FILE, table, rows)
    if found["networks"]:
        write_table(README, "networks", [row for row in found["networks"] if row[0] in HEADLINE and row[1] != "Keras"])
