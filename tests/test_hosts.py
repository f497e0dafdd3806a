"""The hosts that benchmarks/hosts.py makes on one machine: they have names, a rate and a delay, and leave nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from hosts import hosts, run

BYTES, RATE, DELAY = 10**6, 1e8, 0.02       # 80 ms of bits, 20 ms on the way
TALK = f"""
import os, socket, subprocess, sys, time
far = '''
import socket
with socket.create_server(("", 5000)) as server:
    print(socket.gethostname(), flush=True)
    talk, _ = server.accept()
    talk.sendall(talk.recv(1))
    left = {BYTES}
    while left:
        left -= len(talk.recv(2**20))
    talk.sendall(b"!")
'''
there = subprocess.Popen([os.environ["HYDRA_LAUNCHER_EXEC"], "-x", "h2", sys.executable, "-c", "'" + far + "'"],
                         stdout=subprocess.PIPE, text=True)
print(socket.gethostname(), there.stdout.readline().strip())
with socket.create_connection(("h2", 5000)) as talk:
    for message in (b"?", bytes({BYTES})):
        start = time.perf_counter()
        talk.sendall(message)
        talk.recv(1)
        print(time.perf_counter() - start)
sys.exit(there.wait() or 7)
"""


def able() -> bool:
    """Whether this machine can."""
    if os.geteuid() or not Path("/dev/net/tun").exists():
        return False
    try:
        return run(["true"], 1, RATE, DELAY, capture_output=True).returncode == 0
    except SystemExit:          # no compiler
        return False


def test_hosts_have_names_a_rate_and_a_delay_and_leave_nothing():
    if not able():
        pytest.skip("needs root, network namespaces, TUN devices and a C compiler")
    with hosts(2, RATE, DELAY) as (before, environment):
        done = subprocess.run([*before, sys.executable, "-c", TALK], env=environment, capture_output=True, text=True,
                              timeout=30)
        folder = Path(before[1])
    names, echo, transfer = done.stdout.splitlines()
    assert (done.returncode, names) == (7, "h1 h2"), done.stderr
    assert float(echo) >= 2 * DELAY
    assert float(transfer) >= 8 * BYTES / RATE + 2 * DELAY
    assert not folder.exists()


def test_hosts_refuse_what_they_cannot_be():
    with pytest.raises(SystemExit, match="0 hosts"), hosts(0, RATE, DELAY):
        pass
