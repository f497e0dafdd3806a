"""Checkpoints: whole or not there, damage is noticed, any number of ranks reads what any number wrote."""

import errno
import json
import os
import subprocess
import sys
import threading
from itertools import pairwise

import h5py
import numpy as np
import pytest

from launch import finish, start
from mpiclip import checkpoint, disk
from mpiclip.checkpoint import Piece, load, save
from mpiclip.comm import Comm
from mpiclip.errors import InputError

ALONE = Comm()


class Thread(Comm):
    """A rank that is a thread of this process."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self._board, self._barrier = rank, size, board, barrier

    def all(self, item):
        self._board[self.rank] = item
        self._barrier.wait(20)
        items = list(self._board)
        self._barrier.wait(20)
        return items

    def gather(self, item):
        items = self.all(item)
        return items if self.rank == 0 else None

    def same(self, item):
        return self.all(item)[0]


def on_ranks(size, function):
    """function(comm) of every rank; what a rank raised stands in the place of its result."""
    board, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def body(rank):
        try:
            results[rank] = function(Thread(rank, size, board, barrier))
        except InputError as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def arrays(round):
    """The state of a run with 7 workers and 11 coordinates; `long` has more than one block, cut between the ranks."""
    rng = np.random.default_rng(round)
    return {"v_i": rng.standard_normal((7, 11), np.float32), "m_i": rng.standard_normal((7, 2, 3)),
            "clipped_i": rng.random(7) < 0.5, "x": rng.random(11), "past": rng.random((3, 11)),
            "none": np.empty((0, 4)), "k": np.array(round), "long": rng.standard_normal(600_000)}


def pieces(comm, round):
    """What a rank holds of it: rows of names in _i, columns of others, rank 0 the number."""
    result = {}
    for name, array in arrays(round).items():
        axis = 0 if name.endswith("_i") else array.ndim - 1
        if axis < 0:
            parts = [(0, array)] if comm.rank == 0 else []
        else:
            cuts = [array.shape[axis] * r // comm.size for r in range(comm.size + 1)]
            first, last = list(pairwise(cuts))[comm.rank]
            if name.endswith("_i"):
                parts = [(first * array[0].size, array[first:last])]
            else:
                rows = array.reshape(-1, array.shape[-1])
                parts = [(i * array.shape[-1] + first, row[first:last]) for i, row in enumerate(rows)]
        result[name] = Piece(array.shape, array.dtype, parts)
    return result


def store(dir, ranks, *rounds, keep=9):
    for round in rounds:
        result = on_ranks(ranks, lambda comm, k=round: save(dir, comm, k, pieces(comm, k), {"k": k, "name": "é"}, keep))
        assert result == [None] * ranks


def is_state(found, round):
    """Whether a checkpoint holds the state after this round, bit for bit."""
    expected = arrays(round)
    return (found.round == round and found.header == {"k": round, "name": "é"} and found.names == sorted(expected)
            and all(found.shape(name) == array.shape and found.dtype(name) == array.dtype
                    and found.read(name).tobytes() == array.tobytes() for name, array in expected.items()))


def files(dir):
    return sorted(path.name for path in (dir / "checkpoints").iterdir())


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers, readers):
    store(tmp_path, writers, 5)
    for found in on_ranks(readers, lambda comm: load(tmp_path, comm)):
        assert is_state(found, 5) and found.warnings == []
        assert found.read("past", 9, 5).tolist() == arrays(5)["past"].ravel()[9:14].tolist()
        assert found.read("none", 0, 0).size == 0
        for first, count in [(-1, 2), (0, 34), (33, 1), (3, -1)]:
            with pytest.raises(ValueError, match="past: elements"):
                found.read("past", first, count)
        found.close()


def test_it_is_an_ordinary_hdf5_file(tmp_path):
    store(tmp_path, 3, 5)
    with h5py.File(tmp_path / "checkpoints" / "round-00000005.h5") as f:
        assert json.loads(f.attrs["header"]) == {"k": 5, "name": "é"}
        for name, array in arrays(5).items():
            np.testing.assert_array_equal(f["arrays"][name], array)


def test_same_state_same_bytes(tmp_path):
    store(tmp_path / "a", 3, 5)
    store(tmp_path / "b", 3, 5)
    a, b = ((tmp_path / name / "checkpoints" / "round-00000005.h5").read_bytes() for name in "ab")
    assert a == b


def test_the_newest_are_kept(tmp_path):
    store(tmp_path, 3, 1, 2, 10, 100_000_000, keep=2)
    assert files(tmp_path) == ["round-00000010.h5", "round-100000000.h5"]
    assert is_state(load(tmp_path, ALONE), 100_000_000)


def test_an_older_one_stands_in_for_a_damaged_one(tmp_path):
    store(tmp_path, 3, 10, 20, 30)
    newest, middle = (tmp_path / "checkpoints" / f"round-000000{k}.h5" for k in (30, 20))
    whole = newest.read_bytes()
    middle.write_bytes(b"")
    for content in [b"", whole[:-1], whole[:len(whole) // 2], whole[:60], b"nonsense", b"nonsense" * 9999,
                    whole[:3000] + bytes(len(whole) - 3000)]:
        newest.write_bytes(content)
        for found in on_ranks(2, lambda comm: load(tmp_path, comm)):
            assert is_state(found, 10)
            assert [str(newest) in found.warnings[0], str(middle) in found.warnings[1]] == [True, True]
            assert not any("\n" in text for text in found.warnings)
            found.close()
    store(tmp_path, 2, 15, keep=1)                 # the damaged ones are not taken for successors of round 15
    assert files(tmp_path) == ["round-00000015.h5"]
    assert is_state(load(tmp_path, ALONE), 15)


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Also one in HDF5's own structures, the header and the table of segments."""
    small = {"x": Piece((5,), np.float64, [(0, np.arange(5.0))]), "k": Piece((), np.int64, [(0, np.array(7))])}
    for round in (1, 2):
        save(tmp_path, ALONE, round, small, {"k": round}, 9)
    path = tmp_path / "checkpoints" / "round-00000002.h5"
    whole = bytearray(path.read_bytes())
    data = bytes(whole).index(np.arange(5.0).tobytes())
    data = set(range(data, data + 40))
    noticed = set()
    for position in data | set(range(0, len(whole), 9)):
        whole[position] ^= 0x10
        path.write_bytes(whole)
        whole[position] ^= 0x10
        found = load(tmp_path, ALONE)
        if found.round == 1:
            noticed.add(position)
        assert (found.header, found.shape("x"), found.shape("k")) == ({"k": found.round}, (5,), ())
        assert found.read("x").tolist() == [0, 1, 2, 3, 4] and found.read("k") == 7
        found.close()
    assert noticed >= data
    assert len(noticed) > len(data) + 40           # and much else: what is left is unused space


def test_a_flipped_byte_of_a_long_header_is_noticed(tmp_path):
    """HDF5 has no checksum for an attribute of this length."""
    for round in (1, 2):
        save(tmp_path, ALONE, round, {}, {"text": "x" * 100_000}, 9)
    path = tmp_path / "checkpoints" / "round-00000002.h5"
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"xxyx", 1))
    assert load(tmp_path, ALONE).round == 1


def test_one_flipped_byte_of_many_is_noticed_whoever_reads_it(tmp_path):
    store(tmp_path, 3, 10, 20)
    path = tmp_path / "checkpoints" / "round-00000020.h5"
    with open(path, "r+b") as f:
        f.seek(3_000_000)
        byte = f.read(1)[0]
        f.seek(3_000_000)
        f.write(bytes([byte ^ 1]))
    for ranks in (1, 2, 3, 5):
        for found in on_ranks(ranks, lambda comm: load(tmp_path, comm)):
            assert is_state(found, 10) and "checksum of 'long'" in found.warnings[0]
            found.close()


def test_none_is_a_clear_error(tmp_path):
    for error in on_ranks(2, lambda comm: load(tmp_path, comm)):
        assert str(error) == f"{tmp_path}: no checkpoint to go on from" and error.agreed
    store(tmp_path, 1, 10)
    (tmp_path / "checkpoints" / "round-00000010.h5").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint to go on from; .*round-00000010\.h5: damaged"):
        load(tmp_path, ALONE)


def test_the_name_is_given_last(tmp_path, monkeypatch):
    store(tmp_path, 1, 10)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(disk, "replace", killed)
        save(tmp_path, ALONE, 20, pieces(ALONE, 20), {"k": 20}, 9)
    assert files(tmp_path) == ["round-00000010.h5", "round-00000020.tmp"]
    found = load(tmp_path, ALONE)
    assert is_state(found, 10) and found.warnings == []


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path):
    store(tmp_path, 2, 10)
    (tmp_path / "checkpoints" / "round-00000020.tmp").write_bytes(b"begun")
    assert is_state(load(tmp_path, ALONE), 10)
    store(tmp_path, 2, 30)
    assert files(tmp_path) == ["round-00000010.h5", "round-00000030.h5"]


def test_parts_that_do_not_cover_an_array_once_are_refused(tmp_path):
    x = np.arange(10.0)
    for parts in ([(0, x[:9])], [(0, x), (9, x[9:])], [(1, x)], []):
        with pytest.raises(InputError, match="cover"):
            save(tmp_path, ALONE, 1, {"x": Piece((10,), float, parts), "y": Piece((9,), float, [(0, x[:9])])}, {}, 1)
    with pytest.raises(TypeError):
        save(tmp_path, ALONE, 1, {"x": Piece((10,), np.float32, [(0, x)])}, {}, 1)
    assert files(tmp_path) == []


def test_what_does_not_come_back_as_written_is_not_committed(tmp_path, monkeypatch):
    store(tmp_path, 3, 10)

    def forgets(fd, data, offset, write=disk.write_at):     # a disk that loses a bit of the long array
        write(fd, bytes([data[0] ^ 1]) + bytes(data[1:]) if len(data) > 1_000_000 else data, offset)

    monkeypatch.setattr(disk, "write_at", forgets)
    for error in on_ranks(3, lambda comm: save(tmp_path, comm, 20, pieces(comm, 20), {}, 1)):
        assert "checksum of 'long'" in str(error) and "the newest checkpoint is of round 10" in str(error)
    assert files(tmp_path) == ["round-00000010.h5"]


def test_a_rank_with_a_full_disk_stops_all_and_loses_nothing(tmp_path, monkeypatch):
    store(tmp_path, 3, 10)
    write = disk.write_at

    def full(fd, data, offset):
        if len(data) > 1000 and threading.current_thread() is victim:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(fd, data, offset)

    def body(comm):
        nonlocal victim
        if comm.rank == 2:
            victim = threading.current_thread()
        save(tmp_path, comm, 20, pieces(comm, 20), {}, 1)

    victim = None
    monkeypatch.setattr(disk, "write_at", full)
    for error in on_ranks(3, body):
        assert str(error) == (f"{tmp_path}/checkpoints/round-00000020.h5: cannot be written: No space left on device "
                              "(rank 2); the newest checkpoint is of round 10") and error.agreed
    assert files(tmp_path) == ["round-00000010.h5"]


PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import *
from mpiclip.comm import world
comm = world()
what, dir = sys.argv[2:4]
if what == "full":
    save(dir, comm, 10, pieces(comm, 10), {}, 2)
    if comm.rank == comm.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
    try:
        save(dir, comm, 20, pieces(comm, 20), {}, 2)
    except InputError as error:
        print(comm.rank, error, flush=True)
    comm.barrier()
else:
    for round in range(1, 10_000):
        save(dir, comm, round, pieces(comm, round), {"k": round, "name": "é"}, 2)
        if comm.rank == 0: print(round, flush=True)
"""


@pytest.mark.parametrize("ranks, limit", [(3, 2_000_000), (0, 2_000_000), (0, 1000)])
def test_a_full_disk_of_real_ranks(tmp_path, ranks, limit):
    """The limit on the size of a file stands for the disk: of the last of the ranks, or of the only one, where HDF5's
    structures behind the arrays, or any at all, are too much."""
    done = finish(start(ranks, "-c", PROGRAM, os.path.dirname(__file__), "full", tmp_path, limit))
    said = sorted(done.stdout.splitlines())
    assert done.returncode == 0, done.stderr
    where = " (rank 2)" if ranks else ""
    assert said == [f"{r} {tmp_path}/checkpoints/round-00000020.h5: cannot be written: File too large{where}; "
                    "the newest checkpoint is of round 10" for r in range(max(ranks, 1))]
    assert files(tmp_path) == ["round-00000010.h5"]


def test_a_killed_writer_leaves_the_newest_complete_one(tmp_path):
    for attempt, delay in enumerate([0.01, 0.1]):
        dir = tmp_path / str(attempt)
        writer = start(0, "-c", PROGRAM, os.path.dirname(__file__), "on", dir)
        said = writer.stdout.readline()
        try:
            writer.wait(delay)
        except subprocess.TimeoutExpired:
            writer.kill()
        said += writer.communicate()[0]
        newest = int(said.split()[-1])
        found = load(dir, ALONE)
        assert found.round in (newest, newest + 1) and is_state(found, found.round) and found.warnings == []
        found.close()


def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    store(tmp_path, 2, 1, 2)
    (tmp_path / "checkpoints" / "round-00000002.h5").write_bytes(b"")
    load(tmp_path, ALONE).close()
    assert sys.platform != "linux" or len(os.listdir("/proc/self/fd")) == before


def test_block_boundaries(tmp_path, monkeypatch):
    """Segments never exceed a block, and blocks of any size give back the same arrays."""
    x = np.arange(301.0)
    ranges = [(0, 1), (1, 150), (150, 301)]

    def body(comm):
        first, last = ranges[comm.rank]
        save(tmp_path, comm, 1, {"x": Piece((301,), float, [(first, x[first:last])])}, {}, 1)

    for block in (8, 24, 1 << 10):
        monkeypatch.setattr(checkpoint, "BLOCK", block)
        on_ranks(3, body)
        with h5py.File(tmp_path / "checkpoints" / "round-00000001.h5") as f:
            assert f["segments"]["bytes"].max() <= block and f["segments"]["bytes"].sum() == 301 * 8
        found = load(tmp_path, ALONE)
        assert found.read("x").tolist() == x.tolist()
        found.close()
