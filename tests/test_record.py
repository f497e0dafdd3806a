"""run.h5 survives kills, full disks and resumes; the progress line."""

import io
import itertools
import json
import math
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

from mpiclip import record
from mpiclip.errors import InputError
from mpiclip.record import Progress, Record, read

COLUMNS = ["round", "seconds", "loss"]


def line(k):
    return {"round": k, "seconds": 0.5 * k, "loss": 1 / (k + 1)}


def is_lines(lines, rounds):
    """Whether these are the lines of these rounds, bit for bit."""
    expected = np.array([tuple(line(k).values()) for k in rounds], [(name, float) for name in COLUMNS])
    return lines.tobytes() == expected.tobytes() and lines.dtype.names == expected.dtype.names


def test_what_goes_in_comes_out_while_the_run_goes_on(tmp_path):
    header = {"config": '{"run": {"seed": 3}}' + " " * 100_000, "version": "1.2", "workers": 20, "share": 0.5,
              "flag": True, "list": [1, None, "é"], "table": {"a": {"b": 1}}}
    run = Record.create(tmp_path / "a" / "b", header, COLUMNS)
    for k in range(600):
        run.append(line(k))
        if k in (0, 255, 256, 599):
            found, lines = read(tmp_path / "a" / "b")
            assert found == header and is_lines(lines, range(k + 1))
    run.close()
    found, lines = read(tmp_path / "a" / "b")
    assert found == header and type(found["workers"]) is int and is_lines(lines, range(600))
    assert record.config(found) == {"run": {"seed": 3}}
    with h5py.File(tmp_path / "a" / "b" / "run.h5") as f:   # plain HDF5, with the names that people look for
        assert f.attrs["workers"] == 20 and f["metrics"]["loss"][1] == 0.5 and len(f["metrics"]) == 600


def test_missing_metrics_are_nan_and_unknown_ones_are_refused(tmp_path):
    run = Record.create(tmp_path, {}, COLUMNS)
    run.append({"round": 0})
    with pytest.raises(KeyError, match="lost"):
        run.append({"round": 1, "lost": 2})
    run.close()
    _, lines = read(tmp_path)
    assert len(lines) == 1 and math.isnan(lines["loss"][0])


def test_a_line_may_have_several_numbers_of_a_metric(tmp_path):
    run = Record.create(tmp_path, {}, ["round", ("suspicion", 3), "loss"])
    for k in range(300):                                    # more than there is room for at first
        run.append({"round": k, "suspicion": np.arange(3) + k, "loss": 0.5})
    run.append({"round": 300})
    run.close()
    run = Record.resume(tmp_path, 300)
    run.append({"round": 301, "suspicion": [7, 8, 9], "loss": 0.25})
    _, lines = read(tmp_path)
    assert lines["suspicion"].shape == (302, 3) and lines["suspicion"][299].tolist() == [299, 300, 301]
    assert np.isnan(lines["suspicion"][300]).all() and lines[301].tolist()[1].tolist() == [7, 8, 9]
    assert lines["loss"][301] == 0.25 and lines["round"].tolist() == list(range(302))


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.11])
def test_a_killed_writer_loses_at_most_the_last_line(tmp_path, delay):
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from test_record import *\n"
            "run = Record.create(sys.argv[1], {}, COLUMNS)\n"
            "for k in itertools.count(): run.append(line(k)); print(k, flush=True)")
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run", sys.path[0]], stdout=subprocess.PIPE)
    said = [writer.stdout.readline()]
    time.sleep(delay)
    writer.kill()
    said += writer.stdout.read().split()
    writer.wait()
    _, lines = read(tmp_path / "run")
    written = len(said)
    assert written <= len(lines) <= written + 1 and is_lines(lines, range(len(lines)))

    kept = len(lines) // 2
    run = Record.resume(tmp_path / "run", kept - 1, {"ranks": 4})
    for k in range(kept, kept + 300):
        run.append(line(k))
    run.close()
    header, lines = read(tmp_path / "run")
    assert header == {"ranks": 4} and is_lines(lines, range(kept + 300))


def test_a_line_that_was_begun_and_not_written_is_no_line(tmp_path):
    run = Record.create(tmp_path, {}, COLUMNS)
    run.append(line(0))
    with h5py.File(tmp_path / "run.h5", "r+") as f:
        f["metrics"][1] = (math.nan, 0.5, math.nan)
    assert is_lines(read(tmp_path)[1], [0])
    Record.resume(tmp_path, 5).append(line(1))
    assert is_lines(read(tmp_path)[1], [0, 1])


def test_resume_adds_the_columns_of_a_newer_version(tmp_path):
    """suspicion has three numbers."""
    old = Record.create(tmp_path, {}, ["round", "loss"])
    for k in range(3):
        old.append({"round": k, "loss": k / 2})
    old.close()
    new = Record.resume(tmp_path, 1, columns=["round", ("suspicion", 3), "loss", "epochs"])
    new.append({"round": 2, "loss": 5.0, "epochs": 7.0, "suspicion": np.arange(3.0)})
    new.close()
    _, lines = read(tmp_path)
    assert lines["loss"].tolist() == [0, 0.5, 5] and lines["epochs"][2] == 7 and np.isnan(lines["epochs"][:2]).all()
    assert lines["suspicion"][2].tolist() == [0, 1, 2] and np.isnan(lines["suspicion"][:2]).all()


def test_resume_keeps_the_old_file_until_the_new_one_is_whole(tmp_path, monkeypatch):
    run = Record.create(tmp_path, {"ranks": 1}, COLUMNS)
    for k in range(10):
        run.append(line(k))
    run.close()
    (tmp_path / "run.h5.tmp").write_bytes(b"left by a killed resume")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(record.disk, "replace", fail)
        with pytest.raises(InputError, match=r"run\.h5: cannot be written: No space left on device"):
            Record.resume(tmp_path, 3)
    assert is_lines(read(tmp_path)[1], range(10))
    assert [path.name for path in tmp_path.iterdir()] == ["run.h5"]


def test_nothing_is_overwritten(tmp_path):
    Record.create(tmp_path / "a", {}, COLUMNS).close()
    with pytest.raises(InputError, match="holds a run already"):
        Record.create(tmp_path / "a", {}, COLUMNS)
    (tmp_path / "b" / "checkpoints").mkdir(parents=True)
    (tmp_path / "b" / "checkpoints" / "round-00000010.h5").touch()
    with pytest.raises(InputError, match="holds a run already"):
        Record.create(tmp_path / "b", {}, COLUMNS)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        Record.create(tmp_path / "file" / "run", {}, COLUMNS)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """The limit on the size of a file stands for the disk; nor may HDF5 crash at the end of the process."""
    code = ("import resource, sys; sys.path.insert(0, sys.argv[2]); from test_record import *\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "run = Record.create(sys.argv[1], {}, COLUMNS)\n"
            "try:\n"
            "    for k in range(100_000): run.append(line(k))\n"
            "except InputError as error: print(k); print(error)\n"
            "run.close()\n")
    done = subprocess.run([sys.executable, "-c", code, tmp_path, sys.path[0]], capture_output=True, text=True,
                          timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    number, message = done.stdout.splitlines()
    assert int(number) > 1000 and is_lines(read(tmp_path)[1], range(int(number)))
    assert message == f"{tmp_path}/run.h5: cannot be written: File too large; its {number} lines are kept"
    resumed = Record.resume(tmp_path, 100)
    resumed.append(line(101))
    assert is_lines(read(tmp_path)[1], range(102))


def test_what_is_no_record_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no run\.h5 there"):
        read(tmp_path / "nowhere")
    run = Record.create(tmp_path, {}, COLUMNS)
    for k in range(1000):
        run.append(line(k))
    run.close()
    path = tmp_path / "run.h5"
    whole = path.read_bytes()
    for content in [b"", b"round,loss\n1,2\n", whole[:100], whole[:3000]]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"run\.h5: not a readable record") as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
    with h5py.File(path, "w", libver="latest") as f:
        f["other"] = 1
    with pytest.raises(InputError, match=r"run\.h5: not a readable record"):
        Record.resume(tmp_path, 1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(monkeypatch):
    clock = itertools.count(0, 0.01)                        # a round takes 0.01 s
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(stream):
        progress = Progress(2000, 500, stream)
        for k in range(501, 2001):
            progress.update(k, {"round": k, "loss": 0.25, "grad_norm": math.nan})
        progress.close()
        return stream.getvalue()

    log = run(io.StringIO())
    assert log.splitlines()[-1] == "round 2000/2000  loss 0.25  100 rounds/s"
    assert 2 <= len(log.splitlines()) <= 4 and "\r" not in log
    assert "100 rounds/s  13 s left" in log.splitlines()[0]
    live = run(Terminal())
    assert 50 <= live.count("\r") <= 80 and live.count("\n") == 1 and live.endswith("100 rounds/s\x1b[K\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\r" not in run(Terminal())


def test_config_travels_as_text(tmp_path):
    tables = {"method": {"name": "clip21", "tau": math.inf}}
    Record.create(tmp_path, {"config": json.dumps(tables)}, COLUMNS).close()
    assert record.config(read(tmp_path)[0]) == tables
