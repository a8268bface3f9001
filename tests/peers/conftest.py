import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def photographs():
    folder = Path(os.environ.get("FASTDTD_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "images"
    return sorted(folder.iterdir())
