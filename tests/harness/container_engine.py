"""A container engine to build and run the image with: Docker, or podman where there is no daemon.

Podman takes Docker's arguments, builds with buildah, and runs with runc. Where it is used, no
registry of images is asked: :func:`debian` and :func:`uv` make stand-ins for the base images.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.processes import REPO

LACKING = (
    "needs Docker with its daemon, or as root: "
    "apt-get install --no-install-recommends podman runc debootstrap"
)


_REMOVE = """
cat > /dev/null
for container in $("$@" ps --all --quiet --filter "network=$0"); do
  "$@" kill "$container"  # "rm" alone would ask Ray, and wait
  "$@" rm --force "$container"
done
"$@" network rm "$0"
"""
"""A shell's script, whose name is the network, and whose arguments are the engine's command."""


class Engine:
    """``docker`` or ``podman``, with what this machine has to tell it.

    ``store`` is where podman keeps all that it makes; Docker keeps it with its daemon.
    """

    def __init__(self, name: str, store: Path) -> None:
        self.name = name
        self.store = store
        self.real_bases = name == "docker"
        self._command = [name]
        self._build: list[str] = []
        self.limits: list[str] = []
        """Arguments of a run."""

        if name == "docker":
            return
        self._command += ["--root", f"{store}/root", "--runroot", f"{store}/run"]
        self._command += ["--network-config-dir", f"{store}/networks"]
        self._command += ["--storage-driver", "overlay" if _mounts_overlays(store) else "vfs"]
        # crun, the usual runtime, refuses a machine that has both versions of cgroups.
        self._command += ["--runtime", "runc", "--cgroup-manager", "cgroupfs"]
        self._command += ["--events-backend", "none"]
        self._build = ["--isolation", "chroot", "--layers", "--format", "docker"]
        for limit, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
            # podman's default may be above this machine's limit. Of processes, 62,000 were refused
            # where the limit is 96,364.
            most = min(resource.getrlimit(number)[1], 32768)
            self.limits += ["--ulimit", f"{limit}={most}:{most}"]

    def __call__(self, *arguments: str, timeout: float = 120) -> str:
        """What a command prints. Fails with what it said if it does not end with status 0."""
        done = self.attempt(*arguments, timeout=timeout)
        assert done.returncode == 0, f"{self.name} {' '.join(arguments)}\n{done.stderr[-4000:]}"
        return done.stdout

    def attempt(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [*self._command, *arguments]
        # podman puts layers there while it makes them: a folder of the same disk as its store.
        env = os.environ | {"TMPDIR": str(self.store)}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)

    def has(self, image: str) -> bool:
        return self.attempt("image", "inspect", image).returncode == 0

    def build(self, *arguments: str) -> None:
        """Build an image; the last argument is the context."""
        self("build", *self._build, *arguments, timeout=3000)
        # uv's, 7 GB, which podman keeps there between two builds.
        shutil.rmtree(self.store / "buildah-cache", ignore_errors=True)

    def run(self, *arguments: str, timeout: float = 120) -> str:
        """What a container prints, that is gone when it ends."""
        return self("run", "--rm", *self.limits, *arguments, timeout=timeout)

    def start(self, *arguments: str) -> str:
        """The id of a new container."""
        return self("run", "--detach", *self.limits, *arguments).strip()

    def guard(self, network: str) -> subprocess.Popen[bytes]:
        """A process that removes a network and its containers when its standard input ends.

        So they also go where this process is killed: containers are no children of it.
        """
        return subprocess.Popen(
            ["sh", "-c", _REMOVE, network, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(self.store)},
            start_new_session=True,  # not ended by Ctrl-C
        )

    def import_folder(self, folder: Path, image: str, **environment: str) -> None:
        """An image of one layer: a folder."""
        changes = [f"--change=ENV {name}={value}" for name, value in environment.items()]
        tar = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        imported = subprocess.run(
            [*self._command, "import", *changes, "-", image],
            stdin=tar.stdout,
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": str(self.store)},
        )
        assert tar.wait() == 0 and imported.returncode == 0, imported.stderr


def _mounts_overlays(store: Path) -> bool:
    """Whether this machine lets us. vfs, which works anywhere, copies every layer whole."""
    parts = [store / "try" / part for part in ("lower", "upper", "work", "there")]
    for part in parts:
        part.mkdir(parents=True)
    lower, upper, work, there = parts
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mounted = subprocess.run(
        ["mount", "-t", "overlay", "overlay", "-o", options, there], capture_output=True
    )
    if mounted.returncode == 0:
        subprocess.run(["umount", there], check=True)
    shutil.rmtree(store / "try")
    return mounted.returncode == 0


def find() -> str | None:
    """The name of this machine's engine, if it has one."""
    if shutil.which("docker"):
        daemon = subprocess.run(["docker", "info"], capture_output=True)
        if daemon.returncode == 0:
            return "docker"
    if os.getuid() == 0 and all(map(shutil.which, ("podman", "runc", "debootstrap"))):
        return "podman"
    return None


# ------------------------------------------------------------------------- what stands for a base


def debian(engine: Engine, image: str) -> None:
    """An image of this machine's release of Debian, with what Docker's image of Python has.

    It also knows the package registries that this machine knows: the Dockerfile names none.
    """
    folder = engine.store / "debian"
    packages = "ca-certificates,python3-venv,libpython3-dev"  # the headers, for torch.compile
    command = ["debootstrap", "--variant=minbase", f"--include={packages}"]
    release, mirror = _release()
    command += [release, str(folder), mirror]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-4000:] + made.stderr[-4000:]
    (folder / "usr/bin/python").symlink_to("python3")
    for file in (folder / "var/cache/apt").rglob("*.*"):
        file.unlink()
    told = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, check=True)
    (folder / "etc/apt/apt.conf.d/this-machine").write_bytes(told.stdout + _NO_CACHE)
    settings = pip_settings()
    certificates = settings.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_FILE")
    environment = {name: value for name, value in settings.items() if name.startswith("UV_")}
    environment.pop("UV_FIND_LINKS", None)  # a folder of this machine
    if certificates:
        shutil.copy(certificates, folder / "etc/ssl/this-machine.pem")
        environment["SSL_CERT_FILE"] = "/etc/ssl/this-machine.pem"
    engine.import_folder(folder, image, **environment)
    shutil.rmtree(folder)


_NO_CACHE = b"""
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
"""
"""apt's settings in Docker's images of Debian, in so far as they matter here."""


def _release() -> tuple[str, str]:
    """The name of this machine's release, and where its apt has it from."""
    lines = Path("/etc/os-release").read_text().splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)["VERSION_CODENAME"]
    asked = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"]
    known = subprocess.run(
        [*asked, "Created-By: Packages", f"Codename: {release}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert known, f"this machine's apt does not know {release}: apt-get update"
    return release, known[1]


def uv(engine: Engine, image: str) -> None:
    """An image of uv alone: the command that its wheel brought into this environment."""
    folder = engine.store / "uv"
    folder.mkdir()
    shutil.copy(Path(sys.executable).with_name("uv"), folder / "uv")
    engine.import_folder(folder, image)
    shutil.rmtree(folder)


def installer() -> Any:
    """requirements/install.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("install", REPO / "requirements/install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["install"] = module
    spec.loader.exec_module(module)
    return module


def pip_settings() -> dict[str, str]:
    """What pip is told on this machine, as uv's variables."""
    config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = installer().from_pip(config)
    return settings
