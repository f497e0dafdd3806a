"""Several hosts with slow links between them, on one machine: for a look at what a run would be on a cluster.

    python benchmarks/hosts.py -n 4 --rate 1e9 --delay 0.005 mpirun -n 4 mpiclip train CONFIG.toml

COMMAND runs on host h1 of h1 … hN; an mpirun that it starts (Open MPI's or MPICH's) puts one rank on each. Every host
has a network and a name of its own, the same files and the same processors. Its link sends `rate` bit/s and receives
`rate` bit/s; what it sends arrives `delay` seconds later, so that an answer takes twice that (hosts.c is the switch).
Linux, root and a C compiler are needed. Nothing is left when COMMAND has ended, or was interrupted."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SWITCH = Path(__file__).with_name("hosts.c")


@contextmanager
def hosts(n: int, rate: float, delay: float, mtu: int = 9000) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(words to put before a command, its environment): it then runs on the first of n new hosts, and `mpirun -n N` in
    it spreads N ranks over them. rate: bit/s of a link, 0 for no limit. delay: seconds, one way."""
    if not 1 <= n <= 64 or not rate >= 0 or not 0 <= delay < 60:
        sys.exit(f"hosts: {n} hosts, {rate:g} bit/s, {delay:g} s: expected 1 to 64, 0 or more, 0 to 60")
    if os.geteuid() != 0:
        sys.exit("hosts: needs root, for network namespaces")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        sys.exit("hosts: needs a C compiler")
    names = [f"h{i + 1}" for i in range(n)]
    with ended_by(signal.SIGTERM), tempfile.TemporaryDirectory(prefix="mpiclip-hosts-") as folder:
        program, agent = Path(folder, "switch"), Path(folder, "agent")
        subprocess.run([compiler, "-O2", "-o", program, SWITCH], check=True)
        agent.hardlink_to(program)
        Path(folder, "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(names)))
        listed = Path(folder, "ranks")
        listed.write_text("".join(f"{name}\n" for name in names))
        environment = os.environ | {
            "TMPDIR": folder,       # MPI's, too: hosts of another instance have the same names and process numbers
            # Open MPI. A rank that waits must not keep the others, or the switch, from a core.
            "PRTE_MCA_plm_ssh_agent": str(agent), "PRTE_MCA_prte_default_hostfile": str(listed),
            "PRTE_MCA_prte_if_include": "link0", "OMPI_MCA_btl_tcp_if_include": "link0",
            "PRTE_MCA_rmaps_default_mapping_policy": "node:oversubscribe",
            "PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_mpi_yield_when_idle": "1",
            # MPICH
            "HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(agent), "HYDRA_HOST_FILE": str(listed),
            "HYDRA_IFACE": "link0", "UCX_NET_DEVICES": "link0", "UCX_TLS": "tcp,self"}
        yield [str(program), folder, str(n), repr(float(rate)), repr(float(delay)), str(mtu)], environment


@contextmanager
def ended_by(number: int) -> Iterator[None]:
    """A signal ends this program as an exception does, so that it cleans up."""
    before = signal.signal(number, lambda *_: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(number, before)


def run(command: Sequence[str | Path], n: int, rate: float, delay: float, **options) -> subprocess.CompletedProcess:
    """subprocess.run on the first of n new hosts."""
    with hosts(n, rate, delay) as (before, environment):
        return subprocess.run([*before, *map(str, command)], env=environment, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=4, metavar="HOSTS")
    parser.add_argument("--rate", type=float, default=1e9, metavar="BITS/S", help="of a link; 0: no limit")
    parser.add_argument("--delay", type=float, default=0.005, metavar="SECONDS", help="one way")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND …")
    args = parser.parse_args()
    if not args.command:
        parser.error("expected a command")
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the command ends, and then we do
    sys.exit(run(args.command, args.n, args.rate, args.delay).returncode)


if __name__ == "__main__":
    main()
