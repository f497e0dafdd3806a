"""Data files: what was imported is what is read, by any number of ranks; every split has its property; bad input ends
in one line. The reference is a LIBSVM parser of a few lines, in plain Python."""

import bz2
import gzip
import lzma
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpiclip import data, importers, splits
from mpiclip.errors import InputError
from mpiclip.importers import import_file

SPLITS = [
    ("iid", {}),
    ("contiguous", {}),
    ("label", {}),
    ("similarity", {"similarity": 0.3}),
    ("dirichlet", {"alpha": 0.5}),
    ("dirichlet_worker", {"alpha": 0.5}),
]
PARTITIONS = [case for case in SPLITS if case[0] != "dirichlet_worker"]


def parse(text, features):
    """The reference: LIBSVM text -> dense (rows, features) and labels."""
    lines = text.splitlines()
    x, y = np.zeros((len(lines), features)), np.zeros(len(lines))
    for i, line in enumerate(lines):
        label, *pairs = line.split()
        y[i] = float(label)
        for pair in pairs:
            index, value = pair.split(":")
            x[i, int(index) - 1] = float(value)
    return x, y


def dense(x):
    if isinstance(x, np.ndarray):
        return x
    out = np.zeros(x.shape, x.data.dtype)
    for row in range(x.shape[0]):
        own = slice(x.indptr[row], x.indptr[row + 1])
        out[row, x.indices[own]] = x.data[own]
    return out


@pytest.fixture(scope="session")
def libsvm():
    folder = os.environ.get("MPICLIP_DATA")
    if not folder:
        pytest.skip("MPICLIP_DATA does not name a folder with libsvm/a9a and others")
    return Path(folder) / "libsvm"


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The same 60 rows of 7 features, 4 classes, as text (a third of it zeros dropped), sparse file and dense file."""
    folder = tmp_path_factory.mktemp("small")
    random = np.random.default_rng(0)
    x = np.round(random.normal(size=(60, 7)) * (random.random((60, 7)) < 0.35), 3)
    x[7] = 0
    y = random.integers(0, 4, 60).astype(float)
    lines = [
        f"{label:g} " + " ".join(f"{j + 1}:{value}" for j, value in enumerate(row) if value)
        for row, label in zip(x, y, strict=True)
    ]
    (folder / "small").write_text("\n".join(lines) + "\n")
    np.savez(folder / "small.npz", X=x, y=y)
    import_file([str(folder / "small")], str(folder / "sparse.h5"), features=7)
    import_file([str(folder / "small.npz")], str(folder / "dense.h5"))
    return folder, x, y


def refused(call, *expected):
    """The call ends in an InputError of one line that says all of `expected`."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in expected:
        assert part in message, message


# Importing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "features", "counts", "sparse", "dtype"),
    [
        ("a9a", 32561, 123, {-1: 24720, 1: 7841}, True, "float32"),
        ("a9a.t", 16281, 123, {-1: 12435, 1: 3846}, True, "float32"),
        ("mushrooms", 8124, 112, {1: 3916, 2: 4208}, True, "float32"),
        ("phishing", 11055, 68, {0: 4898, 1: 6157}, True, "float64"),
        ("ijcnn1.bz2", 49990, 22, {-1: 45137, 1: 4853}, False, "float64"),
        ("splice", 1000, 60, {-1: 483, 1: 517}, False, "float32"),
        ("australian", 690, 14, {-1: 383, 1: 307}, False, "float64"),
        ("abalone_scale", 4177, 8, None, False, "float64"),
        ("bodyfat_scale", 252, 14, None, False, "float64"),
    ],
)
def test_known_sets_come_back_number_for_number(libsvm, tmp_path, name, rows, features, counts, sparse, dtype):
    source, file = libsvm / name, str(tmp_path / "set.h5")
    import_file([str(source)], file, features=123 if name == "a9a.t" else None)
    shard = data.read_train(file, "contiguous", 1, [0], 0, "float64")
    content = source.read_bytes()
    x, y = parse((bz2.decompress(content) if name.endswith(".bz2") else content).decode(), features)
    assert len(y) == rows == shard.total and shard.features == features
    assert isinstance(shard.x, data.Csr) == sparse
    assert np.array_equal(dense(shard.x), x) and np.array_equal(shard.y, y)
    with h5py.File(file) as f:
        assert f["train/data" if sparse else "train/x"].dtype == dtype
    if counts:
        assert dict(zip(*np.unique(shard.y, return_counts=True), strict=True)) == counts
        assert list(shard.classes) == sorted(counts)


def idx(array):
    """The bytes of an idx file, as its inventors describe it: a magic number, the sizes, the numbers."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def images(tmp_path):
    """Two idx files of 9 images of 4 × 3 with their labels, and a test set of 5: (folder, pixels, labels)"""
    random = np.random.default_rng(4)
    x, y = random.integers(0, 256, (23, 4, 3), np.uint8), random.integers(0, 10, 23, np.uint8)
    for name, at in (("a", slice(9)), ("b", slice(9, 18)), ("t", slice(18, 23))):
        (tmp_path / f"{name}-images").write_bytes(idx(x[at]))
        (tmp_path / f"{name}-labels.gz").write_bytes(gzip.compress(idx(y[at])))
    return tmp_path, x, y


@pytest.mark.parametrize("order", [
    ["a-images", "a-labels.gz", "b-images", "b-labels.gz"], ["b-labels.gz", "a-labels.gz", "b-images", "a-images"]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [25, 1 << 21])
def test_images_are_kept_as_bytes_and_read_as_numbers_from_0_to_1(images, monkeypatch, order, dtype, block):
    monkeypatch.setattr(data, "BLOCK", block)
    folder, x, y = images
    file = str(folder / "images.h5")
    import_file([str(folder / s) for s in order], file, test=[str(folder / s) for s in ("t-images", "t-labels.gz")])
    rows = np.arange(18) if order[0][0] == "a" else np.roll(np.arange(18), 9)
    with h5py.File(file) as f:
        for name, at in (("train", rows), ("test", slice(18, 23))):
            assert f[name]["x"].dtype == np.uint8 and np.array_equal(f[name]["x"], x[at].reshape(-1, 12))
            assert f[name].attrs["image"].tolist() == [4, 3]
        assert f.attrs["version"] == 2
    shard, test = data.read_train(file, "contiguous", 2, [1], 0, dtype), data.read_test(file, 0, 1, dtype)
    for found, at in ((shard, rows[9:]), (test, slice(18, 23))):
        assert found.x.dtype == dtype and np.array_equal(found.x, x[at].reshape(-1, 12).astype(dtype) / 255)
        assert np.array_equal(found.y, y[at])
    assert shard.classes.tolist() == np.unique(y).tolist()
    scattered = data.read_train(file, "iid", 3, [2, 0], 5, dtype)
    split = splits.split("iid", y[rows], 3, 5)
    expected = x[rows[np.concatenate([split[2], split[0]])]].reshape(-1, 12)
    assert np.array_equal(scattered.x, expected.astype(dtype) / 255)
    assert "18 rows, 12 features, uint8, images of 4 × 3, scaled to [0, 1] when read" in data.info(file)


@pytest.mark.parametrize("name, average, deviation", [("mnist", 0.1307, 0.3081), ("fashion-mnist", 0.2860, 0.3530)])
def test_known_images(datasets, tmp_path, name, average, deviation):
    """Mean and standard deviation of the pixels, as everybody quotes them; and how many rows a digit has."""
    sources = [str(datasets / name / f"{part}-{kind}-ubyte.gz") for part in ("train", "t10k")
               for kind in ("images-idx3", "labels-idx1")]
    file = str(tmp_path / "images.h5")
    import_file(sources[:2], file, test=sources[2:])
    assert os.path.getsize(file) < 784 * 70000 * 1.02
    shard, test = data.read_train(file, "contiguous", 2, [0, 1], 0, "float32"), data.read_test(file, 0, 1, "float32")
    assert shard.x.shape == (60000, 784) and test.x.shape == (10000, 784) and shard.x.min() == 0 and shard.x.max() == 1
    assert shard.x.mean(dtype=float) == pytest.approx(average, abs=6e-5)
    assert shard.x.std(dtype=float) == pytest.approx(deviation, abs=6e-5)
    counts = np.bincount(shard.y.astype(int)).tolist()
    assert counts == ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949] if name == "mnist" else [6000] * 10)
    assert np.bincount(test.y.astype(int))[:3].tolist() == ([980, 1135, 1032] if name == "mnist" else [1000] * 3)


def cifar(random, count, fine=False, low=0):
    """(the bytes of `count` made-up records, their pixels, their classes)"""
    y, x = random.integers(low, 100 if fine else 10, count, np.uint8), random.integers(0, 256, (count, 3072), np.uint8)
    coarse = [random.integers(0, 20, count, np.uint8)] if fine else []
    return np.column_stack([*coarse, y, x]).tobytes(), x, y


@pytest.mark.parametrize("fine", [False, True], ids=["CIFAR-10", "CIFAR-100"])
@pytest.mark.parametrize("archive", [False, True], ids=["files", "archive"])
def test_cifar(tmp_path, fine, archive):
    random = np.random.default_rng(5)
    parts = {name: cifar(random, count, fine) for name, count in (("data_batch_1.bin", 7), ("data_batch_2.bin", 4),
                                                                  ("test_batch.bin", 3))}
    for name, (content, *_) in parts.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as file:
        (tmp_path / "readme.html").write_text("nothing of interest")
        for name in ("test_batch.bin", "data_batch_2.bin", "readme.html", "data_batch_1.bin"):
            file.add(tmp_path / name, f"cifar-binary/{name}")
    first, second, test = [[str(tmp_path / "all.tar.gz")]] * 3 if archive else [[str(tmp_path / n)] for n in parts]
    file = str(tmp_path / "cifar.h5")
    import_file(first if archive else first + second, file, test=test)
    shard, tested = data.read_train(file, "contiguous", 1, [0], 0, "float32"), data.read_test(file, 0, 1, "float32")
    for found, names in ((shard, list(parts)[:2]), (tested, ["test_batch.bin"])):
        assert np.array_equal(found.y, np.concatenate([parts[name][2] for name in names]))
        assert np.array_equal(found.x, np.concatenate([parts[name][1] for name in names]).astype("float32") / 255)
        assert found.image == (3, 32, 32)
    assert "11 rows, 3072 features, uint8, images of 3 × 32 × 32" in data.info(file)


def test_cifar_that_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(6)

    def trial(content, name="bad.bin", **options):
        Path(name).write_bytes(content)
        import_file([name], "d.h5", **options)

    expected = "expects records of a byte for the class, 0 to 9, and 3072 for the image, or of bytes"
    for content in (b"", cifar(random, 2)[0][:-1], b"\x0a" + cifar(random, 1)[0][1:], cifar(random, 1)[0] + b"x",
                    b"\x14" + cifar(random, 1, True)[0][1:], b"\0\x64" + bytes(3072)):
        refused(lambda content=content: trial(content), f"bad.bin: found {len(content)} bytes that are no", expected)
    with monkeypatch.context() as patch:                # records of 5 or 6 bytes
        patch.setattr(importers, "CIFAR_IMAGE", (1, 2, 2))
        refused(lambda: trial(bytes(30)), "bad.bin: found 30 bytes that are records of either kind")
        trial(bytes(5) + b"\x09\x14" + bytes(23))       # a class and a pixel, but no coarse class
        assert data.read_train("d.h5", "contiguous", 1, [0], 0, "float32").y.tolist() == [0, 9, 0, 0, 0, 0]
    refused(lambda: trial(cifar(random, 2)[0], label="1"), "label: found '1', but bad.bin is cifar, not csv")
    refused(lambda: trial(b"no archive", "bad.tar.gz"), "bad.tar.gz: not an archive that tar can read")
    with tarfile.open("empty.tar", "w"):
        pass
    refused(lambda: import_file(["empty.tar"], "e.h5"), "empty.tar: no file in it is called data_batch_*.bin or train")
    trial(cifar(random, 2)[0], "noname", format="cifar")
    refused(lambda: import_file(["noname"], "e.h5"), "noname")


@pytest.mark.parametrize("block", [40, 1 << 21])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_standardized(tmp_path, monkeypatch, block, channels):
    """By the training rows of the file, whoever has them: each feature, or all pixels of a channel."""
    monkeypatch.setattr(data, "BLOCK", block)
    random, file = np.random.default_rng(7), str(tmp_path / "set.h5")
    if channels is None:
        x = 1e6 + random.standard_normal((25, 12)) * np.geomspace(1e-4, 1e3, 12)
        x[:, 4] = 0.1                                   # a constant feature, which float64 does not hold exactly
        columns = x[:20]
    else:
        x = random.integers(0, 256, (25, channels, 12 // channels)) // np.arange(1, channels + 1)[:, None]
        x = x.astype(np.uint8)
        columns = np.repeat(x[:20].transpose(0, 2, 1).reshape(-1, channels), 12 // channels, 1) / 255
    image = None if channels is None else (3, 4) if channels == 1 else (3, 2, 2)
    x = x.reshape(25, 12)
    y = np.arange(25.0) % 2
    data.write(file, ["made up"], (x[:20], y[:20]), (x[20:], y[20:]), image)
    mean, deviation = columns.mean(0), columns.std(0)
    if channels is None:
        mean[4], deviation[4] = 0.1, 1
    expected = (x / (1 if channels is None else 255) - mean) / deviation
    standard = data.moments(file)
    np.testing.assert_allclose(standard[0], mean, rtol=1e-12)
    np.testing.assert_allclose(standard[1], deviation, rtol=1e-6 if channels is None else 1e-12)
    for dtype in ("float32", "float64"):
        own = data.read_train(file, "contiguous", 3, [0, 2], 0, dtype, standard=standard)
        test = data.read_test(file, 1, 2, dtype, standard)
        for found, rows in ((own, [*range(7), *range(14, 20)]), (test, [23, 24])):
            np.testing.assert_allclose(found.x, expected[rows], rtol=3e-5, atol=1e-6)
            assert found.x.dtype == dtype and found.image == image and (channels or not found.x[:, 4].any())


def test_sparse_rows_are_not_standardized(tmp_path):
    (tmp_path / "a").write_text("1 3:1\n2 9:1\n")
    import_file([str(tmp_path / "a")], str(tmp_path / "a.h5"))
    refused(lambda: data.moments(str(tmp_path / "a.h5")), "a.h5: the features are sparse", "data.standardize = true")


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_a_deviation_that_is_no_number(tmp_path, size):
    data.write(tmp_path / "a.h5", ["made"], (size * np.arange(6.0).reshape(3, 2), np.zeros(3)))
    refused(lambda: data.moments(str(tmp_path / "a.h5")), "a.h5: the squares of a feature", "data.standardize = true")


def test_images_that_do_not_fit_are_named(images, monkeypatch):
    folder, x, y = images
    monkeypatch.chdir(folder)

    def trial(*names, test=(), **options):
        import_file(list(names), "d.h5", test=list(test), **options)

    def written(content, name="bad"):
        Path(name).write_bytes(content)
        return name

    refused(lambda: trial("a-images"), "a-images: images without labels", "00 00 08 01")
    refused(lambda: trial("a-labels.gz"), "a-labels.gz: labels without images", "00 00 08 03")
    refused(lambda: trial("a-images", "a-labels.gz", "b-images"), "b-images: images without labels")
    refused(lambda: trial("a-images", "t-labels.gz"), "t-labels.gz: 5 labels, expected 9", "of a-images")
    refused(lambda: trial("a-images", written(idx(y[:9])[:-1])), "bad: found 8 bytes for 9; idx expects")
    refused(lambda: trial(written(idx(x[:9]) + b"1"), "a-labels.gz"), "bad: found 109 bytes for 9 × 4 × 3")
    refused(lambda: trial(written(b"\0\0\x08\3\0\0"), "a-labels.gz"), "bad: the first bytes are 00 00 08 03")
    refused(lambda: trial(written(b"\0\0\x0d\1\0\0\0\0"), format="idx"), "bad: the first bytes are 00 00 0d 01")
    refused(lambda: trial(written(b""), format="idx"), "bad: the first bytes are missing")
    refused(lambda: trial(written(gzip.compress(idx(x[:9]))[:-30], "bad.gz"), "a-labels.gz"), "bad.gz: Compressed file")
    refused(lambda: trial("a-images", "a-labels.gz", written(idx(x[:9, :, :2])), "b-labels.gz"), "bad: 8 features")
    turned = written(idx(x[:9].reshape(9, 3, 4)))
    refused(lambda: trial("a-images", "a-labels.gz", turned, "b-labels.gz"), "bad: found 3 × 4, expected 4 × 3 as")
    refused(lambda: trial(written(idx(x[:0])), written(idx(y[:0]), "none")), "bad: found 0 rows")
    refused(lambda: trial("a-images", "a-labels.gz", label="1"), "label: found '1', but a-images is idx, not csv")
    np.savez("n.npz", x=x.reshape(23, 12), y=y)
    refused(lambda: trial("a-images", "a-labels.gz", test=["n.npz"]), "n.npz: found numbers, expected 4 × 3")
    refused(lambda: trial("a-images", "a-labels.gz", "n.npz"), "a-images: found 4 × 3, expected numbers as in n.npz")
    assert not Path("d.h5").exists()
    trial("n.npz")                                      # bytes that nobody calls an image stay as they are
    assert np.array_equal(data.read_train("d.h5", "contiguous", 1, [0], 0, "float32").x, x.reshape(23, 12))


def test_classes_are_integers_and_few(libsvm, tmp_path):
    for name, count in (("bodyfat_scale", None), ("abalone_scale", 28)):
        file = str(tmp_path / name)
        import_file([str(libsvm / name)], file)
        classes = data.read_train(file, "iid", 2, [0], 0, "float32").classes
        assert (classes if count is None else len(classes)) == count
    for count in (1000, 1001):
        np.savez(tmp_path / "many.npz", x=np.ones((count, 1)), y=np.arange(count))
        import_file([str(tmp_path / "many.npz")], file)
        assert (data.read_test(file, 0, 1, "float32") is None) and (
            (data.read_train(file, "iid", 2, [0], 0, "float32").classes is None) == (count == 1001)
        )


def test_every_format_and_compression_is_the_same_set(small, tmp_path):
    folder, x, y = small
    text = (folder / "small").read_bytes()
    table = np.column_stack([y, x])
    csv = "\n".join(",".join(map(repr, row.tolist())) for row in table) + "\n"
    last = "\n".join(",".join(map(repr, row.tolist())) for row in np.roll(table, -1, axis=1))
    header = ",".join(["class", *(f"f{j}" for j in range(7))]) + "\n"
    cases = [
        ("a.gz", gzip.compress(text), {}),
        ("a.bz2", bz2.compress(text), {}),
        ("a.xz", lzma.compress(text), {}),
        ("a.txt", b"# a comment\n\n" + text.replace(b"\n", b"\r\n"), {}),
        ("b.csv", last.encode(), {}),
        ("b.csv.gz", gzip.compress(csv.encode()), {"label": "1"}),
        ("c.csv", (header + csv).encode(), {"label": "1"}),
        ("d.csv", ("\ufeff" + header + csv).encode(), {"label": "class"}),
        ("e.dat", last.encode(), {"format": "csv"}),
    ]
    for name, content, options in cases:
        (tmp_path / name).write_bytes(content)
        import_file([str(tmp_path / name)], str(tmp_path / "set.h5"), **options)
        shard = data.read_train(tmp_path / "set.h5", "contiguous", 1, [0], 0, "float64")
        assert isinstance(shard.x, np.ndarray) == ("csv" in (name + str(options))), name
        assert np.array_equal(dense(shard.x), x) and np.array_equal(shard.y, y), name


def test_libsvm_is_stored_dense_from_half_full_on(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 4)
    for text, is_dense in (("1 1:1 2:1\n0 3:1 4:1\n0 1:2 3:1\n", True), ("1 1:1 2:1\n0 3:1 4:1\n0 1:2\n", False)):
        (tmp_path / "a").write_text(text)
        import_file([str(tmp_path / "a")], str(tmp_path / "a.h5"))
        x = data.read_train(tmp_path / "a.h5", "contiguous", 1, [0], 0, "float32").x
        assert isinstance(x, np.ndarray) == is_dense
        assert np.array_equal(dense(x), parse(text, 4)[0])


def test_several_sources_and_a_narrower_test_set(tmp_path):
    texts = "1 2:3\n0 1:1\n", "1 9:0.5\n", "0 3:7\n1 1:2\n"
    for name, text in zip("abt", texts, strict=True):
        (tmp_path / name).write_text(text)
    file = tmp_path / "ab.h5"
    import_file([str(tmp_path / "a"), str(tmp_path / "b")], str(file), test=[str(tmp_path / "t")])
    train, test = data.read_train(file, "contiguous", 3, range(3), 0, "float64"), data.read_test(file, 0, 1, "float64")
    for shard, text in ((train, texts[0] + texts[1]), (test, texts[2])):
        x, y = parse(text, 9)
        assert np.array_equal(dense(shard.x), x) and np.array_equal(shard.y, y) and shard.features == 9
    assert "train  3 rows, 9 features" in data.info(file) and "test   2 rows, 9 features" in data.info(file)
    (tmp_path / "c.csv").write_text("1,2,0\n")
    import_file([str(tmp_path / "c.csv"), str(tmp_path / "a")], str(file))  # dense beside sparse
    x = dense(data.read_train(file, "contiguous", 1, [0], 0, "float64").x)
    assert np.array_equal(x, [[1, 2], [0, 3], [1, 0]])


def test_reimport_replaces_whole_and_fingerprint_tells(small, tmp_path):
    folder, x, y = small
    file = str(tmp_path / "a.h5")
    prints = set()
    for scale in (1, 1, 2):  # labels and sizes stay
        np.savez(tmp_path / "a.npz", X=scale * x, y=y)
        import_file([str(tmp_path / "a.npz")], file)
        prints.add(data.fingerprint(file))
        assert sorted(os.listdir(tmp_path)) == ["a.h5", "a.npz"]
    assert len(prints) == 2
    with h5py.File(file, "r+") as f:
        f["train/y"][3] += 1
    assert data.fingerprint(file) not in prints
    refused(lambda: import_file([str(folder / "none")], file), "none: No such file")
    assert data.read_train(file, "iid", 1, [0], 0, "float32").total == 60  # the old file is still there


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 60, 500])
@pytest.mark.parametrize(("name", "options"), SPLITS)
def test_splits_use_each_row_once_and_leave_no_worker_without(name, options, n):
    labels = np.random.default_rng(1).integers(0, 4, 500) * 2.0 - 3
    parts = splits.split(name, labels, n, 5, **options)
    assert len(parts) == n and all(len(part) and np.all(np.diff(part) > 0) for part in parts)
    assert all(np.array_equal(a, b) for a, b in zip(parts, splits.split(name, labels, n, 5, **options), strict=True))
    if name != "dirichlet_worker":
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(500))
    if not name.startswith("dirichlet"):
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if name not in ("contiguous", "label") and n == 7:
        other = splits.split(name, labels, n, 6, **options)
        assert any(not np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_iid_parts_have_the_labels_of_the_whole():
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    for part in splits.split("iid", labels, 5, 0):
        assert np.allclose(np.bincount(labels[part]) / 2000, [0.6, 0.3, 0.1], atol=0.05)


def test_contiguous_is_file_order():
    parts = splits.split("contiguous", np.zeros(10), 3, 0)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_label_is_a_stable_sort_in_equal_parts():
    parts = splits.split("label", np.array([2, 1, 1, 2, -1, 1, 2]), 3, 0)
    assert [part.tolist() for part in parts] == [[1, 2, 4], [0, 5], [3, 6]]


def test_similarity_lies_between_label_and_iid():
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(10), 100))

    def equal(a, b):
        return all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))

    for n in (10, 7):  # 7 cut through classes
        assert equal(splits.split("similarity", labels, n, 3, similarity=0), splits.split("label", labels, n, 3))
        assert equal(splits.split("similarity", labels, n, 3, similarity=1), splits.split("iid", labels, n, 3))
    for i, part in enumerate(splits.split("similarity", labels, 10, 3, similarity=0.4)):
        # 40 of a worker's 100 rows are drawn from all classes, the others come from class i and its neighbours
        assert 50 <= np.sum(abs(labels[part] - i) <= 1) <= 85


def test_dirichlet_shares_follow_alpha():
    """Dir(α·1_k): the mean share is 1/k, its variance (1/k)(1 − 1/k)/(kα + 1)."""
    k, n = 20, 40
    labels = np.repeat(np.arange(k), 1000)
    for alpha in (0.3, 10.0):
        parts = splits.split("dirichlet", labels, n, 0, alpha=alpha)
        shares = np.array([np.bincount(labels[part], minlength=k) for part in parts]) / 1000
        assert np.allclose(shares.sum(axis=0), 1)
        assert shares.var() == pytest.approx((1 / n) * (1 - 1 / n) / (n * alpha + 1), rel=0.25)
        parts = splits.split("dirichlet_worker", np.repeat(np.arange(k), 10 * n), n, 0, alpha=alpha)
        shares = np.array([np.bincount(part // (10 * n), minlength=k) for part in parts]) / (10 * k)
        assert np.all((1 - k / (10 * k) < shares.sum(axis=1)) & (shares.sum(axis=1) <= 1))  # counts are rounded down
        assert shares.var() == pytest.approx((1 / k) * (1 - 1 / k) / (k * alpha + 1), rel=0.25)


def test_dirichlet_worker_overlaps_but_repeats_nothing_and_caps():
    labels = np.repeat([0, 1], [5, 995])
    parts = splits.split("dirichlet_worker", labels, 10, 0, alpha=0.5)
    assert len(np.unique(np.concatenate(parts))) < sum(map(len, parts)) <= 1000
    assert all(len(np.unique(part)) == len(part) for part in parts)
    assert len({part.tobytes() for part in parts}) == 10
    assert max(np.sum(labels[part] == 0) for part in parts) == 5


def test_dirichlet_draws_the_rows_of_a_class_at_random():
    for part in splits.split("dirichlet", np.zeros(300), 3, 0, alpha=100.0):
        assert np.sum(np.diff(part) > 1) > 50  # neighbours are few: about a third of the rows


def test_tiny_alpha_still_gives_each_worker_a_row():
    labels = np.repeat([0, 1], 100)
    for name in ("dirichlet", "dirichlet_worker"):
        sizes = [len(part) for part in splits.split(name, labels, 20, 0, alpha=0.001)]
        assert min(sizes) >= 1
    assert sorted(sizes)[0] == 10  # nearly one class per worker


# Reading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 40, 1 << 21])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize(("name", "options"), SPLITS)
def test_any_number_of_ranks_reads_the_same_rows(small, monkeypatch, name, options, kind, block):
    folder, x, y = small
    monkeypatch.setattr(data, "BLOCK", block)
    n = 7
    parts = splits.split(name, y, n, 11, **options)
    for ranks in (1, 2, 3):
        for ids in np.array_split(np.arange(n), ranks):
            shard = data.read_train(folder / f"{kind}.h5", name, n, ids, 11, "float64", **options)
            rows = np.concatenate([parts[i] for i in ids])
            assert np.array_equal(dense(shard.x), x[rows]) and np.array_equal(shard.y, y[rows])
            assert np.array_equal(shard.offsets, np.cumsum([0, *(len(parts[i]) for i in ids)]))
            assert np.array_equal(shard.ids, ids) and shard.n == n and shard.features == 7
            assert shard.total == sum(map(len, parts)) and np.array_equal(shard.classes, [0, 1, 2, 3])


def test_types_are_those_promised(small):
    folder, _, _ = small
    for dtype in ("float32", "float64"):
        sparse = data.read_train(folder / "sparse.h5", "iid", 3, [1], 0, dtype)
        full = data.read_train(folder / "dense.h5", "iid", 3, [1], 0, np.dtype(dtype))
        assert full.x.dtype == sparse.x.data.dtype == dtype and full.x.flags.c_contiguous
        assert np.array_equal(dense(sparse.x), full.x)
        assert (sparse.x.indptr.dtype, sparse.x.indices.dtype) == (np.int64, np.int32)
        assert sparse.offsets.dtype == sparse.ids.dtype == np.int64 and sparse.y.dtype == np.float64


def test_a_rank_or_worker_may_have_no_rows(small):
    folder, _, _ = small
    for kind in ("sparse", "dense"):
        nobody = data.read_train(folder / f"{kind}.h5", "iid", 3, [], 0, "float32")
        assert nobody.x.shape == (0, 7) and nobody.offsets.tolist() == [0]
        attacker = data.read_train(folder / f"{kind}.h5", "iid", 3, [2, 3], 0, "float32")
        assert attacker.offsets.tolist() == [0, 20, 20] and attacker.total == 60


def test_test_rows_are_shared_out_evenly(small, tmp_path):
    folder, x, y = small
    file = tmp_path / "t.h5"
    import_file([str(folder / "small.npz")], str(file), test=[str(folder / "small.npz")])
    shards = [data.read_test(file, part, 7, "float64") for part in range(7)]
    assert np.array_equal(np.concatenate([shard.x for shard in shards]), x)
    assert np.array_equal(np.concatenate([shard.y for shard in shards]), y)
    assert {len(shard.y) for shard in shards} == {8, 9}
    assert all(shard.offsets.tolist() == [0, len(shard.y)] and shard.total == 60 for shard in shards)
    assert data.read_test(folder / "dense.h5", 0, 1, "float64") is None


def test_locked_files_are_read(small):
    fcntl = pytest.importorskip("fcntl")
    with open(small[0] / "dense.h5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert data.read_train(small[0] / "dense.h5", "iid", 1, [0], 0, "float32").total == 60


@pytest.mark.parametrize("split", ["iid", "contiguous"])
def test_memory_holds_little_beyond_the_own_rows(tmp_path, monkeypatch, split):
    monkeypatch.setattr(data, "BLOCK", 1 << 14)
    x = np.random.default_rng(0).random((20000, 100)) + 1e-9
    np.savez(tmp_path / "x.npz", x=x, y=np.zeros(20000))
    import_file([str(tmp_path / "x.npz")], str(tmp_path / "x.h5"))
    tracemalloc.start()
    shard = data.read_train(tmp_path / "x.h5", split, 10, [3], 0, "float64")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shard.x.nbytes == 1_600_000 and peak < 3 * shard.x.nbytes < x.nbytes / 3


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a", b"1 1:2\n-1 1:3 2:x\n", ["a line 2:", "b'x'", "label index:value"]),
        ("a", b"1 1:2\n\n1 5\n", ["a line 3:"]),
        ("a", b"1 1:2\n1 0:5\n", ["a line 2:", "index 0"]),
        ("a", b"1 3:2 2:5\n", ["a line 1:", "sorted"]),
        ("a", b"1 99999999999:2\n", ["a line 1:"]),
        ("a", b"1 1:2\n<html>\n", ["a line 2:", "<html>"]),
        ("a", b"1 1:2\n1 1:3 4:nan\n", ["a: feature 4 of row 2 is nan"]),
        ("a", b"1 1:2\n1 1:3\n1 1:1 2:-inf\n", ["a: feature 2 of row 3 is -inf"]),
        ("a", b"1 1:2\nnan 1:3\n", ["a: the label of row 2 is nan"]),
        ("a", b"", ["a: found 0 rows"]),
        ("a.gz", gzip.compress(b"1 1:2\n" * 9999)[:-20], ["a.gz: Compressed file ended"]),
        ("a.bz2", bz2.compress(b"1 1:2\n" * 9999)[:-20], ["a.bz2: Compressed file ended"]),
        ("a.xz", lzma.compress(b"1 1:2\n" * 9999)[:-20], ["a.xz: Compressed file ended"]),
        ("a.gz", b"1 1:2\n", ["a.gz: Not a gzipped file"]),
        ("a.xz", b"1 1:2\n", ["a.xz: "]),
        ("a.csv", b"u,v\n1,2\n3,x\n", ["a.csv line 3:", "'x'"]),
        ("a.csv", b"1,,3\n4,5,6\n", ["a.csv line 1:"]),
        ("a.csv", b"1,2,3\n\n4,5\n", ["a.csv line 3:", "from 3 to 2"]),
        ("a.csv", b"u,v,w\n1,2\n", ["a.csv line 1:", "3 columns", "have 2"]),
        ("a.csv", b"1,2\n3,inf\nnan,1\n", ["a.csv: the label of row 2 is inf"]),
        ("a.csv", b"1,2\nnan,1\n", ["a.csv: feature 1 of row 2 is nan"]),
        ("a.csv", b"1,2\n\xff,1\n", ["a.csv line 2:"]),
        ("a.csv", b"1\n2\n", ["a.csv: found 2 rows and 0 features"]),
        ("a.csv", b"u,v\n", ["a.csv", "no rows"]),
        ("a.csv", b"", ["a.csv", "no rows"]),
        ("a.npz", b"PK\x03\x04 nonsense", ["a.npz"]),
        ("a.npz", b"", ["a.npz"]),
    ],
)
def test_bad_sources_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    refused(lambda: import_file([str(tmp_path / name)], str(tmp_path / "a.h5")), str(tmp_path), *expected)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"y": np.ones(2)}, ["no array named X or x or data"]),
        ({"x": np.ones((2, 1))}, ["no array named y or target or labels"]),
        ({"x": np.ones((2, 1)), "y": np.ones(3)}, ["(2, 1) and (3,)"]),
        ({"x": np.ones(2), "y": np.ones(2)}, ["(2,) and (2,)"]),
        ({"x": np.array([["a"]]), "y": np.ones(1)}, ["<U1"]),
        ({"x": np.array([[None]]), "y": np.ones(1)}, ["pickle"]),
    ],
)
def test_bad_archives_are_named(tmp_path, arrays, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(lambda: import_file([str(tmp_path / "a.npz")], str(tmp_path / "a.h5")), "a.npz", *expected)


def test_bad_import_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").write_text("1 1:1 4:1\n")
    Path("wide").write_text("1 1:1\n1 2:3 7:1\n")
    Path("a.csv").write_text("1,2,3\n")
    Path("b.csv").write_text("1,2\n")
    refused(lambda: import_file(["gone"], "d.h5"), "gone: No such file")
    refused(lambda: import_file(["."], "d.h5"), ".: Is a directory")
    refused(lambda: import_file(["a"], "d.h5", format="svm"), "'svm'", "libsvm, csv, npz, idx, cifar")
    refused(lambda: import_file(["a"], "d.h5", label="1"), "label", "a is libsvm, not csv")
    refused(lambda: import_file(["a.csv"], "d.h5", label="4"), "a.csv line 1", "label column '4'")
    refused(lambda: import_file(["a"], "d.h5", features=0), "found 0")
    refused(lambda: import_file(["a", "wide"], "d.h5", features=5), "wide: row 2 has feature 7, expected at most 5")
    refused(lambda: import_file(["a"], "d.h5", test=["wide"]), "wide: row 2 has feature 7", "--features 7")
    refused(lambda: import_file(["a.csv", "b.csv"], "d.h5"), "b.csv: 1 features, expected 2")
    refused(lambda: import_file(["a.csv"], "d.h5", test=["b.csv"]), "b.csv: 1 features, expected 2")
    refused(lambda: import_file(["a.csv"], "d.h5", features=3), "a.csv: 2 features, expected 3 as asked")
    refused(lambda: import_file(["a"], "no/d.h5"), "no/d.h5: no folder")
    refused(lambda: import_file(["a"], "."), ".: exists")
    refused(lambda: import_file(["a"], "wide"), "wide: exists", "not overwritten")  # a source too many, DEST forgotten
    assert Path("wide").read_text().startswith("1 1:1\n")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        refused(lambda: import_file(["a"], "d.h5"), "d.h5: cannot be written: No space left on device")
    Path("d.h5.tmp").mkdir()
    refused(lambda: import_file(["a"], "d.h5"), "d.h5: cannot be written: Is a directory")
    import_file(["a"], "e.h5", test=["wide"], features=7)
    assert sorted(os.listdir()) == ["a", "a.csv", "b.csv", "d.h5.tmp", "e.h5", "wide"]


def test_bad_data_files_are_named(small, tmp_path):
    folder, _, _ = small
    copy = tmp_path / "copy.h5"

    def read(file=copy, split="contiguous", workers=3, ids=(0,), dtype="float64", **options):
        return data.read_train(file, split, workers, ids, 0, dtype, **options)

    def fresh(kind="dense"):
        shutil.copy(folder / f"{kind}.h5", copy)
        return h5py.File(copy, "r+")

    refused(lambda: read(tmp_path / "gone.h5"), "gone.h5: No such file")
    refused(lambda: read(tmp_path), "Is a directory")
    refused(lambda: read(folder / "small"), "small: not an HDF5 file", "mpiclip data import")
    with h5py.File(copy, "w") as f:
        f["x"] = np.ones(3)
    refused(read, "copy.h5: not a data file of mpiclip")
    with fresh() as f:
        f.attrs["version"] = 99
    refused(read, "copy.h5: layout version 99, expected 1")
    size = (folder / "dense.h5").stat().st_size
    for length in (size - 1, size // 2, 100):
        fresh().close()
        os.truncate(copy, length)
        refused(read, "copy.h5: truncated or damaged")
    with fresh() as f:
        del f["train/y"]
    refused(read, "copy.h5: truncated or damaged")
    with fresh() as f:
        del f["train/y"]
        f["train/y"] = np.ones(3)
    refused(read, "3 labels for 60 rows of train")
    for name, value in (("indptr", -4), ("indptr", 10**9), ("indices", 7), ("indices", -1)):
        with fresh("sparse") as f:
            f["train"][name][3] = value
        refused(read, "copy.h5: truncated or damaged", name)
    with fresh("sparse") as f:
        row = int(np.flatnonzero(np.diff(f["train/indptr"][:]) > 1)[0])
        start = int(f["train/indptr"][row])
        f["train/indices"][start + 1] = f["train/indices"][start]
    refused(read, "copy.h5: truncated or damaged", "a feature of a row twice")


@pytest.mark.parametrize("block", [5, 1 << 21])
def test_bad_numbers_are_named_by_the_rank_that_reads_them(small, tmp_path, monkeypatch, block):
    monkeypatch.setattr(data, "BLOCK", block)
    folder, x, _ = small
    file = tmp_path / "copy.h5"
    row, column = 31, int(np.flatnonzero(x[31])[0])
    for kind in ("dense", "sparse"):
        shutil.copy(folder / f"{kind}.h5", file)
        with h5py.File(file, "r+") as f:
            k = (row, column) if kind == "dense" else int(f["train/indptr"][row])
            f["train/x" if kind == "dense" else "train/data"][k] = 1e300
            assert kind == "dense" or f["train/indices"][k] == column
        where = f"copy.h5: feature {column + 1} of train row 32 is inf in float32"
        refused(lambda: data.read_train(file, "contiguous", 3, [1], 0, "float32"), where)
        data.read_train(file, "contiguous", 3, [1], 0, "float64")
        data.read_train(file, "contiguous", 3, [0, 2], 0, "float32")
        refused(lambda: data.read_train(file, "iid", 3, range(3), 0, "float32"), where)
        with h5py.File(file, "r+") as f:
            f["train/y"][4] = np.nan
        refused(lambda: data.read_train(file, "contiguous", 3, [2], 0, "float64"), "label of train row 5 is nan")


def test_bad_splits_are_named(small, tmp_path):
    folder, x, y = small
    file, regression = folder / "dense.h5", tmp_path / "regression.h5"
    np.savez(tmp_path / "r.npz", x=x, y=y + 0.5)
    import_file([str(tmp_path / "r.npz")], str(regression))
    data.read_train(regression, "label", 3, [0], 0, "float64")
    for alpha in (None, 0.0, -1.0, np.nan, np.inf):
        refused(lambda alpha=alpha: data.read_train(file, "dirichlet", 3, [0], 0, "float64", alpha=alpha), "data.alpha")
    for s in (None, -0.1, 1.1, np.nan):
        refused(lambda s=s: data.read_train(file, "similarity", 3, [0], 0, "float64", similarity=s), "data.similarity")
    refused(lambda: data.read_train(file, "idd", 3, [0], 0, "float64"), "data.split: found 'idd'", "iid")
    refused(lambda: data.read_train(file, "iid", 61, [0], 0, "float64"), "dense.h5: 60 rows for 61 workers")
    refused(lambda: splits.split("iid", y, 61, 0), "run.workers", "61", "60")
    for name in splits.BY_CLASS:
        refused(
            lambda name=name: data.read_train(regression, name, 3, [0], 0, "float64", alpha=1), name, "class labels"
        )
