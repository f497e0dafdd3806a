"""show and plot: the right words and numbers, and curves where they belong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from mpiclip.errors import InputError
from mpiclip.plot import COLORS, plot
from mpiclip.record import Record, read
from mpiclip.show import folders, labels, show

COLUMNS = ["round", "seconds", "loss", "grad_norm", "accuracy", "bytes", "epsilon", "seconds_grad", "seconds_comm",
           "seconds_hidden"]


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
                              "bytes": 1e8, "epsilon": None, "seconds_grad": 5, "seconds_comm": 2.5,
                              "seconds_hidden": None}
    both = json.loads(show([tmp_path / "a", run(tmp_path / "b", "clip_gd")], as_json=True))
    assert [one["config"]["method"]["name"] for one in both] == ["clip21", "clip_gd"]


def test_show_one(tmp_path):
    text = show([run(tmp_path / "a", epsilon=lambda k: 1.5, seconds_hidden=lambda k: k / 100, rounds=80)])
    lines = {line.split("  ")[0].strip(): " ".join(line.split("  ")[1:]).split() for line in text.splitlines()}
    assert " ".join(lines["method"]) == "clip21, stepsize = 0.25 (theory), τ = 0.1"
    assert " ".join(lines["problem"]) == "logistic (nonconvex, λ = 0.1) on a9a.h5, d = 123"
    assert " ".join(lines["workers"]) == "20 on 4 ranks"
    assert " ".join(lines["rounds"]) == "80 of 100"
    assert " ".join(lines["privacy spent"]) == "ε = 1.5"
    assert " ".join(lines["sent per rank"]) == "80.0 MB"
    shares = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words[-1:] == ["%"]}
    assert shares == {"grad": ["4.00", "50", "%"], "comm": ["2.00", "25", "%"], "other": ["2.00", "25", "%"],
                      "all": ["8.00", "100", "%"], "exchanges": ["behind", "these", "0.80", "10", "%"]}
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
    chains = ["median"], [{"name": "clipping", "threshold": 2.0}, "nnm", "geometric_median"]
    assert labels([{"aggregate": {"rules": rules}} | config() for rules in chains], ["a", "b"]) == [
        "median", "clipping (threshold 2) → nnm → geometric_median"]
    attacks = [{"aggregate": {"rules": rules, "attack": {"name": attack}}} | config() for rules, attack in
               zip(chains, ["mimic", "sign_flip"], strict=True)]
    assert labels(attacks, ["x/a", "x/b"]) == [
        "median, attack mimic", "clipping (threshold 2) → nnm → geometric_median (b)"]
    many = [{f"constant_{letter}": value for letter in "abcde"} for value in (1.0, 2.0)]
    assert labels([config(**many[0]), config(**many[1])], ["x/a", "x/b"]) == ["clip21 (a)", "clip21 (b)"]


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


# ---- families: many runs, several panels


def a_family(folder, **more):
    """clip_gd and clip21 at three thresholds."""
    return [run(folder / f"{name}-tau={tau:g}", name, tau, **more)
            for name in ("clip_gd", "clip21") for tau in (0.01, 0.1, 1.0)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that plot() has saved, to look into."""
    from matplotlib.figure import Figure
    figures, save = [], Figure.savefig

    def keep(self, *args, **kwargs):
        save(self, *args, **kwargs)
        figures.append(self)
    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend_of(figure) -> list[str]:
    legend, = figure.legends
    return [text.get_text() for text in legend.get_texts() if text.get_text()]


def test_a_folder_of_runs_stands_for_them_in_the_order_of_their_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for tau in (10.0, 2.0, 0.5, 1e-5):
        run(tmp_path / "all" / "deep" / f"tau={tau:g}", tau=tau)
    alone = run(tmp_path / "alone")
    names = ["tau=1e-05", "tau=0.5", "tau=2", "tau=10"]
    assert folders([alone, "all"]) == [alone, *(Path("all/deep") / name for name in names)]
    assert [line.split()[0] for line in show(["all"]).splitlines() if "tau=" in line] == names
    assert "all/deep:" in show(["all"])
    assert len(json.loads(show(["all", "alone"], as_json=True))) == 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: no run\.h5 there"):
        show(["empty"])


def test_panels_share_y_and_a_legend(tmp_path, drawn):
    a_family(tmp_path, epsilon=lambda k: math.sqrt(k))
    plot([tmp_path], "round,bytes,epsilon", "grad_norm,loss", tmp_path / "p.png")
    figure, = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "", "round", "bytes sent per rank",
                                                           "privacy spent, ε"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["‖∇f(x)‖", "", "", "f(x)", "", ""]
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 3 + ["linear"] * 3
    assert len({axes.get_ylim() for axes in figure.axes[:3]}) == len({axes.get_ylim() for axes in figure.axes[3:]}) == 1
    assert legend_of(figure) == ["clip21", "τ = 0.01", "clip_gd", "τ = 0.1", "τ = 1"]       # column after column
    for axes in figure.axes:
        assert len(axes.lines) == 6
        assert [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines] == [
            (color, *style) for color in COLORS[:2] for style in (("-", "o"), ("--", "s"), ("-.", "D"))]


def test_two_keys_are_lines_and_markers(tmp_path, drawn):
    for name in ("clip_gd", "clip21"):
        for tau in (0.1, 1.0):
            for seed in (1, 2, 3):
                dir = run(tmp_path / f"{name}-{tau}-{seed}", name, tau)
                settings = json.loads(read(dir)[0]["config"])
                settings["run"]["seed"] = seed
                Record.resume(dir, 100, {"config": json.dumps(settings)}).close()
    plot([tmp_path], y="grad_norm", out=tmp_path / "p.png")
    assert set(legend_of(drawn[0])) == {"clip_gd", "clip21", "τ = 0.1", "τ = 1", "seed = 1", "seed = 2", "seed = 3"}
    styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn[0].axes[0].lines}
    assert len(styles) == 12 and len({style for _, style, _ in styles}) == 2


def test_a_compressor_is_told_by_what_it_has_and_a_long_legend_leaves_the_panels_their_room(tmp_path, drawn):
    compressors = [{"name": "natural"}, {"name": "quantize", "bits": 4, "unbiased": False},
                   *({"name": "top_k", "k": k} for k in (5, 10, 20)),
                   *({"name": "rand_k", "k": 5, "unbiased": unbiased} for unbiased in (False, True))]
    run(tmp_path / "clip21")
    for i, compressor in enumerate(compressors):
        dir = run(tmp_path / f"{i}", "dcgd")
        settings = json.loads(read(dir)[0]["config"])
        settings["method"] = {"name": "dcgd", "stepsize": 0.1 if i % 2 else 0.5, "compressor": compressor}
        Record.resume(dir, 100, {"config": json.dumps(settings)}).close()
    plot([tmp_path], "round,bytes", out=tmp_path / "p.png")
    assert {text for text in legend_of(drawn[0]) if "k" in text or "bits" in text} >= {
        "quantize, bits = 4", "rand_k, k = 5", "rand_k, unbiased = True, k = 5", "top_k, k = 20"}
    assert not any("none" in text or "False" in text for text in legend_of(drawn[0]))
    drawn[0].canvas.draw()
    assert min(axes.get_window_extent().height for axes in drawn[0].axes) > 1.5 * drawn[0].dpi


def test_rows(tmp_path, drawn):
    a_family(tmp_path)
    plot([tmp_path], "round,seconds", "grad_norm", tmp_path / "p.png", rows="method.tau")
    figure, = drawn
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == ["τ = 0.01", "τ = 0.1", "τ = 1"]
    assert [len(axes.lines) for axes in figure.axes] == [2] * 6
    assert legend_of(figure) == ["clip21", "clip_gd"]
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    with pytest.raises(InputError, match=r"--rows: there is no 'method\.tao'; did you mean 'method\.tau'"):
        plot([tmp_path], rows="method.tao")


def test_runs_without_a_metric_are_left_out_of_its_panel_alone(tmp_path, drawn):
    a_family(tmp_path / "plain")
    run(tmp_path / "private", "clip21", 5.0, epsilon=lambda k: k)
    plot([tmp_path], "round,epsilon", "grad_norm", tmp_path / "p.png")
    assert [len(axes.lines) for axes in drawn[0].axes] == [7, 1]
    assert [axes.get_title(loc="right") for axes in drawn[0].axes] == ["", "1 of 7 runs"]
    with pytest.raises(InputError, match="no metric 'epsilon'"):
        plot([tmp_path / "plain"], "round,epsilon", "grad_norm")


def test_bytes_of_runs_on_one_rank(tmp_path, drawn):
    a_family(tmp_path / "alone", bytes=lambda k: 0.0)
    with pytest.raises(InputError, match="sent no bytes, it ran on one rank"):
        plot([tmp_path / "alone"], "round,bytes")
    run(tmp_path / "ranks", "clip21", 5.0)
    plot([tmp_path], "round,bytes", out=tmp_path / "p.png")
    assert [len(axes.lines) for axes in drawn[0].axes] == [7, 1]


def test_rounding_noise_gets_no_room(tmp_path, drawn):
    a_family(tmp_path / "a", grad_norm=lambda k: max(300.0 * 10 ** (-k / 4), 1e-17) if k < 100 else 0.0)
    plot([tmp_path / "a"], y="grad_norm", out=tmp_path / "p.png")
    assert drawn[0].axes[0].get_yscale() == "log"
    bottom, top = drawn[0].axes[0].get_ylim()
    assert bottom == pytest.approx(3e-10)
    assert 300 < top < 3000                                         # nothing is cut off above
    run(tmp_path / "b", grad_norm=lambda k: 10 ** (-k / 25))
    plot([tmp_path / "b"], y="grad_norm", out=tmp_path / "p.png")
    assert 1e-5 < drawn[1].axes[0].get_ylim()[0] < 1e-4             # there is none


def test_x_is_logarithmic_where_runs_end_far_apart(tmp_path, drawn):
    for i, factor in enumerate((1.0, 1e3, 1e5)):
        run(tmp_path / f"{i}", tau=float(i), seconds=lambda k, factor=factor: 1e-3 * factor * k)
    plot([tmp_path], "seconds", "grad_norm", tmp_path / "p.png")
    assert drawn[0].axes[0].get_xscale() == "log"
    line = drawn[0].axes[0].lines[0]
    assert line.get_xdata()[0] == 0 and np.isfinite(drawn[0].axes[0].get_xlim()).all()
    plot([tmp_path / "0", tmp_path / "0"], "seconds", "grad_norm", tmp_path / "p.png")
    plot([tmp_path], "round", "loss", tmp_path / "p.png")
    assert [figure.axes[0].get_xscale() for figure in drawn[1:]] == ["linear", "linear"]


def test_no_words_overlap(tmp_path, drawn):
    """Titles, labels and legends of a large family, measured on the drawn picture."""
    a_family(tmp_path / "a", epsilon=lambda k: 0.1 + k)
    run(tmp_path / "b", "clip21", 5.0)
    plot([tmp_path], "round,bytes,epsilon", "grad_norm", tmp_path / "p.png", rows="method.tau")
    figure, = drawn
    renderer = figure.canvas.get_renderer()
    texts = [figure._suptitle, *figure.legends[0].get_texts()]
    for axes in figure.axes:
        left, right = axes.get_xlim()
        texts += [axes.xaxis.label, axes.yaxis.label, axes._left_title, axes._right_title]
        if axes.get_subplotspec().is_last_row():
            texts += [tick for tick in axes.get_xticklabels() if left <= tick.get_position()[0] <= right]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 20
    for i, box in enumerate(boxes):
        assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_labels_leave_out_defaults_and_what_follows_from_another_key():
    def config(name, **method):
        return {"method": {"name": name, "stepsize": 1.0, "tau": 1.0} | method}
    assert labels([config("clip_gd", beta=1.0), config("clip21")], ["a", "b"]) == ["clip_gd", "clip21"]
    assert labels([config("clip_gd", beta=0.5), config("clip21")], ["a", "b"]) == ["clip_gd, β = 0.5", "clip21"]
    private = {"epsilon": 2.0, "delta": 1e-5}
    assert labels([config("clip21", **private), config("clip21")], ["a", "b"]) == ["clip21, ε = 2", "clip21"]


# ---- who is far from the aggregate


def suspected(dir, n=9, attack=True, rounds=10):
    """A run with a line for every round, whose worker i is i + 1 away, or, the last one, not finite from round 5 on."""
    aggregate = {"rules": ["median"], "f": 2, "suspect": True} | ({"attack": {"name": "nan"}} if attack else {})
    record = Record.create(dir, {"config": json.dumps({"method": {"name": "gd"}, "aggregate": aggregate})},
                           ["round", "loss", "shortened", ("suspicion", n)])
    for k in range(rounds + 1):
        distance = np.arange(1.0, n + 1) * (np.nan if k == 0 else 1)
        distance[n - 1] *= np.inf if k >= 5 else 1
        record.append({"round": k, "loss": 1.0, "shortened": 100.0 * k if k else math.nan, "suspicion": distance})
    record.close()
    return dir


def test_every_workers_suspicion_and_the_attackers_apart(tmp_path, drawn):
    plot([suspected(tmp_path / "a")], y="suspicion", out=tmp_path / "p.png")
    axes, = drawn[0].axes
    lines = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert [line.get_color() for line in lines] == [COLORS[0]] * 7 + [COLORS[1]] * 2
    assert [set(line.get_ydata()) for line in lines] == [{i + 1} for i in range(9)]
    assert [len(line.get_xdata()) for line in lines] == [10] * 8 + [4]
    beyond, = (line for line in axes.lines if line.get_linestyle() == "None")
    assert beyond.get_xdata().tolist() == [5, 6, 7, 8, 9, 10] and set(beyond.get_ydata()) == {1}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "honest workers", "Byzantine: workers 7 to 8", "not finite"]


def test_suspicion_where_nobody_is_known_to_attack_and_several_runs(tmp_path, drawn):
    plot([suspected(tmp_path / "a", 9, False), suspected(tmp_path / "b", 4, False), suspected(tmp_path / "c")],
         y="suspicion", out=tmp_path / "p.png")
    texts = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in drawn[0].axes]
    assert texts[0] == ["other workers", "worker 8", "not finite", "worker 7", "worker 6"]
    assert texts[1] == ["other workers", "worker 3", "not finite", "worker 2", "worker 1"]
    assert texts[2][0] == "honest workers"
    run(tmp_path / "d")
    for dirs, options, message in [
            ("ad", {}, r"d: no metric 'suspicion' yet; expected a run with aggregate\.suspect = true"),
            ("a" * 13, {}, "at most 12 runs"), ("a", {"rows": "method.name"}, "no --rows"),
            ("a", {"x": "round,loss"}, "one --x"), ("a", {"x": "suspicion"}, "there is no 'suspicion'"),
            ("a", {"y": "loss,suspicion"}, "no other metric")]:
        with pytest.raises(InputError, match=message):
            plot([tmp_path / name for name in dirs], **{"y": "suspicion"} | options)


def test_counts_are_not_logarithmic_and_begin_with_the_first_round(tmp_path, drawn):
    plot([suspected(tmp_path)], y="shortened", out=tmp_path / "p.png")
    assert drawn[0].axes[0].get_yscale() == "linear"
    assert drawn[0].axes[0].lines[0].get_xdata()[0] == 1


def test_show_names_the_most_suspicious(tmp_path):
    text = show([suspected(tmp_path / "a", 100)])
    line, = (line for line in text.splitlines() if "suspicion" in line)
    assert " ".join(line.split()) == "suspicion median 50; workers 99: not finite, 98: 99, 97: 98"
    final = json.loads(show([tmp_path / "a"], as_json=True))["final"]
    assert final["suspicion"] == [*range(1, 100), None]
    assert "suspicion" not in show([suspected(tmp_path / "b", rounds=0)])
