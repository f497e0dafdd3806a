"""show and plot: the right words and numbers, and curves where they belong."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from mpiclip.errors import InputError
from mpiclip.plot import COLORS, plot
from mpiclip.record import Record
from mpiclip.show import labels, show

COLUMNS = ["round", "seconds", "loss", "grad_norm", "accuracy", "bytes", "epsilon", "seconds_grad", "seconds_comm"]


def run(dir, name="clip21", tau=0.1, rounds=100, lines=101, **metrics):
    """A run with made-up metrics: each a function of the round, by default as below."""
    config = {"data": {"file": "/sets/a9a.h5"}, "problem": {"name": "logistic", "regularizer": "nonconvex", "lam": 0.1},
              "method": {"name": name, "stepsize": "theory", "tau": tau}, "run": {"rounds": 100, "seed": 1}}
    record = Record.create(dir, {"config": json.dumps(config), "version": "0.1.0", "workers": 20, "ranks": 4,
                                 "dimension": 123, "constants": {"stepsize": 0.25, "tau": tau}}, COLUMNS)
    metrics = {"seconds": lambda k: k / 10, "loss": lambda k: 0.5, "bytes": lambda k: 1e6 * k, "seconds_grad":
               lambda k: k / 20, "seconds_comm": lambda k: k / 40, "grad_norm": lambda k: 10 ** (-k / 25)} | metrics
    for k in np.linspace(0, rounds, lines).round():
        record.append({"round": k} | {metric: f(k) for metric, f in metrics.items()})
    record.close()
    return dir


def test_json(tmp_path):
    found = json.loads(show([run(tmp_path / "a", loss=lambda k: math.nan, grad_norm=lambda k: math.inf)], as_json=True))
    assert {"config", "rounds", "workers", "ranks", "final", "seconds", "bytes_sent"} <= found.keys()
    assert found["config"]["method"] == {"name": "clip21", "stepsize": "theory", "tau": 0.1}
    assert (found["rounds"], found["workers"], found["ranks"]) == (100, 20, 4)
    assert (found["seconds"], found["bytes_sent"]) == (10, 1e8)
    assert found["final"] == {"round": 100, "seconds": 10, "loss": None, "grad_norm": None, "accuracy": None,
                              "bytes": 1e8, "epsilon": None, "seconds_grad": 5, "seconds_comm": 2.5}
    both = json.loads(show([tmp_path / "a", run(tmp_path / "b", "clip_gd")], as_json=True))
    assert [one["config"]["method"]["name"] for one in both] == ["clip21", "clip_gd"]


def test_show_one(tmp_path):
    text = show([run(tmp_path / "a", epsilon=lambda k: 1.5, rounds=80)])
    lines = {line.split("  ")[0].strip(): " ".join(line.split("  ")[1:]).split() for line in text.splitlines()}
    assert " ".join(lines["method"]) == "clip21, stepsize = 0.25 (theory), τ = 0.1"
    assert " ".join(lines["problem"]) == "logistic (nonconvex, λ = 0.1) on a9a.h5, d = 123"
    assert " ".join(lines["workers"]) == "20 on 4 ranks"
    assert " ".join(lines["rounds"]) == "80 of 100"
    assert " ".join(lines["privacy spent"]) == "ε = 1.5"
    assert " ".join(lines["sent per rank"]) == "80.0 MB"
    shares = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words[-1:] == ["%"]}
    assert shares == {"grad": ["4.00", "50", "%"], "comm": ["2.00", "25", "%"], "other": ["2.00", "25", "%"],
                      "all": ["8.00", "100", "%"]}
    assert "accuracy" not in text


@pytest.mark.parametrize("ranks", [1, 4])
def test_show_a_run_that_has_no_line_yet(tmp_path, ranks):
    Record.create(tmp_path, {"workers": 1, "ranks": ranks}, COLUMNS)
    assert ("1 on 1 rank\n" if ranks == 1 else "1 on 4 ranks\n") in show([tmp_path])
    found = json.loads(show([tmp_path], as_json=True))
    assert (found["rounds"], found["final"], found["seconds"], found["config"]) == (0, {}, None, {})


def test_show_several_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    dirs = [run("runs-a"), run("runs-b", tau=10.0, lines=3), run("runs-c", "clip_gd", grad_norm=lambda k: 0.1234567)]
    text = show(dirs)
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.split()[:1]}
    assert rows["runs-b"][:3] == ["runs-b", "clip21,", "τ"]
    assert rows["runs-a"][-6:] == ["100", "0.5", "0.0001", "10", "100.0", "MB"]
    assert "0.1235" in rows["runs-c"]
    for width in ("40", "200"):                             # numbers are never cut
        monkeypatch.setenv("COLUMNS", width)
        assert show(dirs).count("100.0 MB") == 3


def test_labels_say_what_differs():
    def config(**method):
        return {"method": {"name": "clip21", "stepsize": 1.0} | method, "run": {"seed": 1}}
    assert labels([config()], ["a"]) == ["clip21"]
    assert labels([config(tau=1.0), config(tau=0.001)], ["a", "b"]) == ["clip21, τ = 1", "clip21, τ = 0.001"]
    assert labels([config(tau=1.0), config(name="gd")], ["a", "b"]) == ["clip21, τ = 1", "gd"]
    assert labels([config(), config()], ["x/a", "x/b"]) == ["clip21 (a)", "clip21 (b)"]
    assert labels([{"aggregate": {"rules": rules}} | config() for rules in ([], ["arc", "median"])], ["a", "b"]) == [
        "clip21, mean", "clip21, arc → median"]
    many = {f"constant_{letter}": 1.0 for letter in "abcde"}
    assert labels([config(**many), config()], ["x/a", "x/b"]) == ["clip21 (a)", "clip21"]


def pixels(picture, color):
    """Where a picture has a curve's colour: (column, row) of the middle of each column."""
    rgb = np.array([int(color[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    rows, columns = np.nonzero((np.abs(imread(picture)[..., :3] - rgb) < 0.01).all(axis=2))
    return np.array([(c, rows[columns == c].mean()) for c in np.unique(columns)])


def test_an_exponential_is_a_line_and_ends_where_it_ends(tmp_path):
    whole = run(tmp_path / "a", grad_norm=lambda k: math.nan if k == 30 else 10 ** (-k / 25))
    half = run(tmp_path / "b", rounds=50, grad_norm=lambda k: 0.1)
    path = plot([whole, half], y="grad_norm", out=tmp_path / "picture.png")
    first, second = (pixels(path, color) for color in COLORS[:2])
    descent = first[50:, 1] - first[:-50, 1]                          # in 50 columns; rows count downwards
    assert np.median(descent) > 10
    assert np.mean(np.abs(descent - np.median(descent)) < 2) > 0.7    # but for the crossing and the legend's sample
    pieces = np.split(second[:, 0], np.nonzero(np.diff(second[:, 0]) > 1)[0] + 1)      # curve, legend's sample
    assert max(map(len, pieces)) / (first[:, 0].max() - first[:, 0].min()) == pytest.approx(0.5, abs=0.02)
    assert len(pixels(path, COLORS[2])) == 0


def test_linear_where_a_logarithm_would_not_do(tmp_path):
    run(tmp_path / "a", loss=lambda k: 0.03 * k - 1)                                 # also negative
    curve = pixels(plot([tmp_path / "a"], x="bytes", out=tmp_path / "p.png"), COLORS[0])
    curve = curve[curve[:, 0] > 300][:-20]
    slope, middle = np.polyfit(*curve.T, 1)
    assert slope < -0.3 and np.abs(curve[:, 1] - slope * curve[:, 0] - middle).max() < 2


def test_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dirs = [run(f"run-{i}", tau=float(i)) for i in range(8)]
    assert plot(dirs[:1]).read_bytes().startswith(b"\x89PNG")
    pdf = plot(dirs, x="seconds", y="grad_norm", out="c.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    svg = plot(dirs, x="seconds", y="grad_norm", out="c.svg").read_bytes()
    assert b"<svg" in svg and svg == plot(dirs, x="seconds", y="grad_norm", out="d.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["c.pdf", "c.svg", "d.svg", "loss.png"]


def test_what_cannot_be_drawn(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(InputError, match="a: no metric 'gradnorm'; this run has round, seconds, loss"):
        plot([tmp_path / "a"], y="gradnorm")
    with pytest.raises(InputError, match="no metric 'accuracy'"):                    # a column, but never a number
        plot([tmp_path / "a"], y="accuracy")
    with pytest.raises(InputError, match=r"expected a name that ends in \.png, \.svg or \.pdf"):
        plot([tmp_path / "a"], out=tmp_path / "picture.jpg")
    with pytest.raises(InputError, match=r"picture\.png: cannot be written: No such file or directory"):
        plot([tmp_path / "a"], out=tmp_path / "nowhere" / "picture.png")
    with pytest.raises(InputError, match=r"no run\.h5 there"):
        plot([tmp_path / "b"])
