"""The plan of a round on a network: the model against sums done by hand, and the command line."""

import json

import pytest

from mpiclip.__main__ import main
from mpiclip.errors import InputError
from mpiclip.plan import EAGER, OVERHEAD, Call, Round, plan, recommended, table

QUADRATIC = {"problem": {"name": "quadratic", "curvature": [[1.0, 2.0, 3.0]] * 4, "centre": [[1.0, 0.0, 2.0]] * 4},
             "method": {"name": "celgc", "eta": 0.1, "gamma": 0.1}}
CONFIG = """
[problem]
name = "quadratic"
curvature = [[1.0, 2.0], [3.0, 1.0]]
centre = [[1.0, 0.0], [2.0, 1.0]]
[method]
name = "naive_parallel"
eta = 0.1
gamma = 0.1
"""


@pytest.mark.parametrize("call, ranks, latencies, messages, bits", [
    (Call("Allreduce", 8), 2, 1, 1, 64),                            # one exchange
    (Call("Allreduce", 1000), 8, 3, 3, 3 * 8000),                   # three, each of the whole vector
    (Call("Allreduce", 8), 5, 4, 4, 4 * 64),                        # the fifth rank comes first and last
    (Call("Ialltoallv", 4 * EAGER), 4, 1, 3, 3 * 8 * EAGER),        # messages of just EAGER bytes
    (Call("Ialltoallv", 4 * EAGER + 4), 4, 3, 3, 3 * 8 * EAGER + 24),   # … which are too long now
    (Call("Iallgatherv", 10**8), 10, 3, 9, 9 * 8 * 10**7),
    (Call("Ibcast", 10**6), 9, 4, 4, 8 * 10**6),
    (Call("bcast", 100), 4, 4, 4, 800),                             # its size first
], ids=lambda value: f"{value.what} {value.bytes}" if isinstance(value, Call) else None)
def test_a_call_costs_latencies_messages_and_bits(call, ranks, latencies, messages, bits):
    assert call.seconds(ranks, 1.0, 1e30) == pytest.approx(latencies + messages * OVERHEAD, rel=1e-9)
    assert call.seconds(ranks, 0.0, 1e3) == pytest.approx(bits / 1e3 + messages * OVERHEAD, rel=1e-9)


def test_a_table_adds_up_and_recommends_the_smallest_interval_that_hides_the_network():
    rounds = [Round(i, 0.010 * i, (Call("Ialltoallv", 125_000),)) for i in (1, 2, 4, 8, 16)]
    lines = table(rounds, 2, 0.001, 1e9)                # 0.5 ms of bits, one latency since 62.5 kB are eager
    assert lines[2]["seconds"] == pytest.approx(0.040 + 0.0015, abs=1e-5)
    assert lines[2]["share"] == pytest.approx(0.0015 / 0.0415, abs=1e-3)
    assert lines[2]["iterations"] == pytest.approx(4 / 0.0415, rel=1e-3)
    assert lines[2]["speed_up"] == pytest.approx(4 / 0.0415 * 0.0115, rel=1e-3)
    assert recommended(table(rounds, 2, 0.001, 1e9)) == 2      # 1.5 of 11.5 ms, 1.5 of 21.5 ms
    assert recommended(table(rounds, 2, 0.010, 1e9)) == 16     # 10.5 of 90.5 ms, 10.5 of 170.5 ms
    assert recommended(table(rounds, 2, 1.0, 1e9)) is None


def test_slower_networks_and_more_ranks_take_longer():
    def seconds(ranks=8, latency=1e-3, bandwidth=1e9):
        return [Call(what, 10**7).seconds(ranks, latency, bandwidth)
                for what in ("Allreduce", "Ialltoallw", "Iallgatherv", "Ibcast", "allgather")]
    for slower in (seconds(latency=2e-3), seconds(bandwidth=5e8), seconds(ranks=16)):
        assert all(a < b for a, b in zip(seconds(), slower, strict=True))


def test_a_rehearsal_of_four_thousand_ranks_takes_one_process():
    config = QUADRATIC | {"problem": QUADRATIC["problem"] | {
        "curvature": [[1.0, 2.0]] * 4096, "centre": [[1.0, 0.0]] * 4096}, "run": {"participation": 8}}
    found = plan(config, 1e-5, 1e11, 4096)
    assert found["workers"] == 4096 and found["recommended"] in (None, *(2**k for k in range(11)))
    assert [line["interval"] for line in found["rounds"][:6]] == [1, 2, 4, 8, 16, 32]
    assert found["rounds"][1]["communicating"] > 2 * 12 * 1e-5      # an agreement and a mean, of 12 steps each


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text(CONFIG)
    return str(path)


NETWORK = ["--latency", "0.002", "--bandwidth", "1e9"]


def test_plan_prints_a_table_or_json(config, capsys):
    assert main(["plan", config, *NETWORK, "--ranks", "2"]) == 0
    text = capsys.readouterr().out
    assert "naive_parallel on quadratic, d = 2" in text and "2 ms one way" in text and "recommended" not in text
    assert main(["plan", config, *NETWORK, "--ranks", "2", "--set", "method.name=celgc", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first, second = found["rounds"][:2]
    assert first["interval"] == 1 and first["seconds"] == pytest.approx(first["computing"] + first["communicating"])
    assert second["communicating"] - first["communicating"] == pytest.approx(0.002, rel=0.01)  # agrees on later steps
    assert found["recommended"] is None or found["recommended"] > 1


@pytest.mark.parametrize("words, message", [
    (["--ranks", "1", *NETWORK], "--ranks 1: expected 2 or more"),
    ([*NETWORK], "--ranks 1: expected 2 or more"),
    (["--ranks", "4", "--latency", "-1", "--bandwidth", "1e9"], "--latency -1: expected seconds, 0 or more"),
    (["--ranks", "4", "--latency", "nan", "--bandwidth", "1e9"], "--latency nan: expected seconds, 0 or more"),
    (["--ranks", "4", "--latency", "1", "--bandwidth", "0"], "--bandwidth 0: expected bit/s, more than 0"),
    (["--ranks", "4", "--bandwidth", "1e9"], "--latency: missing"),
    (["--ranks", "4", *NETWORK, "--set", "run.workers=2"], "run.workers = 2: fewer than the 4 ranks"),
    (["--ranks", "4", *NETWORK, "--set", "method.interval=2"], "interval"),
])
def test_bad_input_is_one_line(config, capsys, words, message):
    assert main(["plan", config, *words]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


def test_without_a_network_there_is_nothing_to_measure():
    with pytest.raises(InputError, match="--bandwidth: missing"):
        plan(QUADRATIC, latency=0.0, ranks=4)
