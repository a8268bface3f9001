"""Shards shared out among the processes of a Dask cluster: the same bytes as one process makes, whatever dies."""

import json
import os
import signal
import threading
import time

import pytest
from test_runner import assert_same_files, fastdtd, folder, model, shards, small_model  # noqa: F401  # fixtures

from fastdtd import Explainer, results, runner, sources
from fastdtd.warmup import warm_up

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client():
    warm_up()
    with (distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
          distributed.Client(cluster) as client):
        yield client


def without_model(out):
    (out / "model.h5").unlink()
    return out


def test_the_same_bytes(client, folder, tmp_path):  # noqa: F811
    (folder / "5.png").write_bytes(b"no picture")
    explainer, entries = Explainer(small_model(), threads=1), sources.find([folder])
    lines, steps = [], []
    with client.get_executor(pure=False) as executor:
        summary = runner.run(explainer, entries, tmp_path / "out", shard=2, executor=executor, on_line=lines.append,
                             on_progress=steps.append)
    assert (summary.explained, len(summary.failed), sum(steps), len(lines)) == (9, 1, 10, 9)
    assert summary.seconds["explain"] > 0
    runner.run(explainer, entries, tmp_path / "whole", shard=2)
    assert_same_files(without_model(tmp_path / "out"), tmp_path / "whole")


def test_a_worker_that_is_killed(client, folder, tmp_path):  # noqa: F811
    explainer = Explainer(small_model(), threads=1)
    entries = [runner.replace_fields(entry, name=f"{i}-{entry.name}")
               for i in range(40) for entry in sources.find([folder])]
    runner.run(explainer, entries, tmp_path / "whole", shard=4, draw=0)
    out, killed = tmp_path / "out", []

    def kill():
        while len(shards(out)) < 5:
            time.sleep(0.002)
        pid = next(iter(client.run(os.getpid).values()))
        killed.append(pid)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with client.get_executor(pure=False, retries=3) as executor:
        summary = runner.run(explainer, entries, out, shard=4, draw=0, executor=executor)
    killer.join()
    assert summary.explained == 400
    assert results.verify(out).troubles == []
    assert_same_files(without_model(out), tmp_path / "whole")


def test_on_the_command_line(folder, model, tmp_path):  # noqa: F811
    run = fastdtd("explain", model, folder, "--shard", "4", "-o", tmp_path / "out", "--dask", "local", "--workers", "2")
    assert (run.returncode, run.stdout.splitlines()[-1]) == (0, f"10 explained; see {tmp_path / 'out'}/"), run.stderr
    assert len(json.loads((tmp_path / "out" / results.MANIFEST).read_text())["rules"]) == 3
    run = fastdtd("explain", model, folder, "-o", tmp_path / "other", "--dask", "tcp://127.0.0.1:1")
    assert run.returncode == 1
    assert "fastdtd: no scheduler of Dask answers at 'tcp://127.0.0.1:1'" in run.stderr
