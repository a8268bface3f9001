import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault("NUMBA_ENABLE_CUDASIM",
                      "1")  # before anything imports Numba: kernels for GPUs run in its simulator
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background, children too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def simulator():
    """Numba's simulator of CUDA, or lockstep's in its place."""
    pytest.importorskip("numba_cuda")
    from numba import config
    if not config.ENABLE_CUDASIM:
        pytest.skip("NUMBA_ENABLE_CUDASIM is not 1; on a GPU, run benchmarks/gpu.py")
    import lockstep
    lockstep.install()


@pytest.fixture(autouse=True)
def _threads_share_small_networks_too(monkeypatch):
    """Users' threads do not, for it does not pay; but tests' networks are small, and sharing is to be tested."""
    monkeypatch.setattr("fastdtd.executor._SMALL_NETWORK", 0)


@pytest.fixture(scope="session")
def data():
    """The folder of trained nets and pictures that tests may use; they are too large for the repository."""
    folder = Path(os.environ.get("FASTDTD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        message = f"there is no test data in {folder}; FASTDTD_TEST_DATA says where else"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def photographs(data):
    return sorted((data / "images").iterdir())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("FASTDTD_TEST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu",
                                                                      "--disable-background-networking"])
        yield browser
        browser.close()
