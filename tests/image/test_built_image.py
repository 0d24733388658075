"""The image, built and run: `make test-image`, which is not part of `make test`.

Target ``cpu`` is built and serves configs/demo.yaml: by `docker run` as docs/install.md says, and
in pods as the manifests describe them. Of target ``gpu`` runs what needs neither NVIDIA's base
image nor 9 GB of wheels.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from harness import container_engine
from harness.container_engine import Engine
from harness.pods import SERVE_PORT, Cluster
from harness.processes import REPO, eventually, free_port

from serve_app.config.document import load
from serve_app.kuberay.render.files import render
from serve_app.kuberay.render.profile import ClusterProfile

IMAGE = "localhost/serve-app:test-image"
GPU_STEPS = "localhost/serve-app:test-image-gpu"
BASE, UV = "localhost/debian-with-python:stand-in", "localhost/uv:stand-in"
MODELS = ("smollm2-135m-instruct", "all-minilm-l6-v2")
DOCKERFILE = (REPO / "Dockerfile").read_text()
CUDA_LOCK = "requirements/cuda.lock"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With an empty store, or that of IMAGE_STORE: an image in it is not built again."""
    name = container_engine.find()
    if name is None:
        pytest.exit(f"make test-image {container_engine.LACKING}", 2)
    kept = os.environ.get("IMAGE_STORE")
    store = Path(kept or tempfile.mkdtemp(prefix="serve-app-", dir="/var/tmp"))
    engine = Engine(name, store)
    yield engine
    if not kept:
        engine.attempt("rmi", "--force", IMAGE, GPU_STEPS)
        shutil.rmtree(store)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What .dockerignore lets through: podman mounts a context as it is, and setuptools writes."""
    folder = tmp_path_factory.mktemp("context")
    for line in (REPO / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            source = REPO / line[1:]
            ignored = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, folder / source.name, ignore=ignored)
            else:
                shutil.copy(source, folder)
    shutil.copy(REPO / "Dockerfile", folder)
    return folder


@pytest.fixture(scope="module")
def bases(engine: Engine) -> list[str]:
    """Arguments that name the bases: none for Docker, which takes the Dockerfile's own."""
    if engine.real_bases:
        print(f"\nbuilt by Docker on {_argument('CPU_IMAGE')}")
        return []
    if not engine.has(BASE):
        container_engine.debian(engine, BASE)
        container_engine.uv(engine, UV)
    print(f"\nbuilt by podman; the base is a stand-in for {_argument('CPU_IMAGE')}: debootstrap's")
    return [f"--build-arg=CPU_IMAGE={BASE}", f"--build-arg=UV_IMAGE={UV}"]


@pytest.fixture(scope="module")
def image(engine: Engine, context: Path, bases: list[str]) -> str:
    if "IMAGE_STORE" not in os.environ or not engine.has(IMAGE):
        torch = _torch()
        engine.build("--target", "cpu", "--tag", IMAGE, *bases, *torch, str(context))
    return IMAGE


def _argument(name: str) -> str:
    """The default of a build argument."""
    found = re.search(rf"^ARG {name}=(.+)$", DOCKERFILE, re.MULTILINE)
    assert found, name
    return found[1]


def _torch() -> list[str]:
    """Where PyTorch's own index is out of reach: the registry's build, as `make venv` takes it."""
    install = container_engine.installer()
    with open(os.devnull) as lock:
        env = container_engine.pip_settings() | os.environ
        uv = install.Uv(install.uv_command(Path(sys.prefix), ""), env, lock.fileno())
        asked = ("--no-build", "--default-index", install.PYTORCH_INDEX)
        if uv.finds(f"torch=={install.TORCH}+cpu", *asked):
            return []
    print(f"PyTorch {install.REGISTRY.told}")
    return ["--build-arg=TORCH=--require-hashes -r /requirements/torch-registry.lock"]


# ----------------------------------------------------------------------------- what is in it


def test_a_change_of_our_code_is_a_small_layer(engine: Engine, image: str) -> None:
    shown = ("--human=false", "--no-trunc", "--format", "{{.Size}}\t{{.CreatedBy}}")
    layers = []
    for line in engine("history", *shown, image).splitlines():
        size, _, command = line.partition("\t")
        number, _, unit = size.partition(" ")  # podman writes a unit all the same
        scale = {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
        layers.append((float(number) * scale / 1e6, command))
    print(f"\n{'MB':>8}  layer")
    for size_mb, command in reversed(layers):
        if size_mb:
            print(f"{size_mb:8,.1f}  {_step(command)}")
    print(f"{sum(size for size, _ in layers):8,.1f}  all")
    (own,) = [size for size, command in layers if "/src" in command]
    assert 0 < own < 5


def _step(command: str) -> str:
    """The part of a layer's command that tells it from others."""
    command = re.sub(r"--mount=\S+|\s+", " ", command)
    told = re.search(r"(apt-get install|uv pip install|ADD|COPY).*", command)
    return (told[0] if told else command)[:90]


def test_labels_and_settings(engine: Engine, image: str) -> None:
    [entry] = json.loads(engine("inspect", image))
    config = entry | entry["Config"]  # podman has the health check outside of it
    versions = "import importlib.metadata as m; print(m.version('ray'), m.version('vllm'))"
    ray, vllm = engine.run("--network=none", image, "python", "-c", versions).split()
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "serve_app"
    description = labels["org.opencontainers.image.description"]
    assert f"Ray {ray}, vLLM {vllm.partition('+')[0]}, CPU" in description
    assert config["User"] == "1000:1000"
    assert "/-/healthz" in config["Healthcheck"]["Test"][-1]
    assert "serve-app" in engine.run("--network=none", image)  # what it does without arguments


LEFT = r"""
echo compilers
find / -xdev -type f \( -name 'cc1*' -o -name 'lto1' -o -name 'clang*' -o -name nvcc -o -name cicc \
  -o -name ptxas -o -name rustc -o -name cargo -o -name f951 \)
echo tools
find / -xdev \( -type f -name uv -o -type f -name uvx -o -path /src -o -path /requirements \)
echo caches
find /var/lib/apt/lists /var/cache/apt /root/.cache /home/app/.cache /tmp /var/tmp -xdev -type f \
  -not -name lock 2>/dev/null
echo secrets
find / -xdev \( -name .netrc -o -name .git -o -name .env -o -name .aws -o -name .kube \
  -o -name .pypirc -o -name pip.conf -o -name uv.toml -o -name .git-credentials \
  -o -name 'id_[rde]*sa' -o -name 'id_ed25519' -o -path '/run/secrets/*' \)
grep -rIl --exclude='*.py' --exclude='examples-*.json' -e '-----BEGIN [A-Z ]*PRIVATE KEY' \
  /etc /root /home /var /opt /usr/local
true
"""


def test_nothing_is_left_that_need_not_be(engine: Engine, image: str) -> None:
    """No compiler but g++, which the next test shows to be needed; no cache and no secret."""
    found: dict[str, list[str]] = {}
    kind = ""
    as_root = ("--network=none", "--user=0:0", image)
    for line in engine.run(*as_root, "bash", "-c", LEFT, timeout=300).splitlines():
        if line.startswith("/"):
            found[kind].append(line)
        else:
            kind = line
            found[kind] = []
    compilers = found.pop("compilers")
    assert {Path(path).name for path in compilers} == {"cc1", "cc1plus", "lto1"}
    assert all(path.startswith("/usr/lib/gcc/") for path in compilers), compilers
    assert found == {"tools": [], "caches": [], "secrets": []}
    [config] = [entry["Config"] for entry in json.loads(engine("inspect", image))]
    named = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY")
    assert not [setting for setting in config["Env"] if named.search(setting)]
    assert not re.search(r"://[^/\s]+:[^/\s]+@", engine("history", "--no-trunc", image))


COMPILES = """
import torch
print(torch.compile(lambda x: (x * 2).sum())(torch.ones(8)))
"""


def test_gpp_is_needed_to_compile(engine: Engine, image: str) -> None:
    """vLLM without ``enforce_eager`` has kernels made by torch.compile, which calls g++."""
    read_only = (
        "--read-only",
        "--network=none",
        "--tmpfs=/tmp:rw,exec,mode=1777",
        "--env=HOME=/tmp",
    )
    assert "tensor(16.)" in engine.run(*read_only, image, "python", "-c", COMPILES, timeout=300)
    without = engine.attempt(
        *("run", "--rm", *engine.limits, *read_only, "--env=CXX=/nowhere/g++", image),
        *("python", "-c", COMPILES),
        timeout=300,
    )
    assert without.returncode != 0 and "InvalidCxxCompiler" in without.stderr


# ---------------------------------------------------------------------- the steps for a GPU


def stage(name: str) -> str:
    found = re.search(rf"^FROM \S+ AS {name}$(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found, name
    return found[1]


def test_the_gpus_lock_is_to_be_had(tmp_path: Path) -> None:
    """Every version with a hash of the lock, for Python 3.12 on Linux: asked, not downloaded."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--dry-run", "--no-deps"]
    asked = [*uv, "--require-hashes", "--python-version=3.12", f"--target={tmp_path}"]
    done = subprocess.run(
        [*asked, "--python-platform=x86_64-manylinux_2_28", "-r", CUDA_LOCK],
        cwd=REPO,
        env=container_engine.pip_settings() | os.environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    locked = re.findall(r"^\S+==", (REPO / CUDA_LOCK).read_text(), re.MULTILINE)
    assert f"Would install {len(locked)} packages" in done.stderr
    print(f"\n{len(locked)} packages of {CUDA_LOCK} are to be had with their hashes")


def test_the_gpus_other_steps_run(engine: Engine, context: Path, bases: list[str]) -> None:
    """On a Debian with Ubuntu's user and an empty environment; without Python 3.12 and CUDA."""
    if engine.real_bases:
        pytest.skip("Docker has the real bases: docker build --target gpu runs every step")
    packages, *_ = re.findall(r"^RUN apt-get update.*?(?<!\\)\n", stage("gpu"), re.M | re.S)
    names = re.findall(r"[\w+.-]+", packages.split("--no-install-recommends")[1].split("&&")[0])
    not_debians = [name for name in names if name.startswith(("cuda-", "libcurand", "python3.12"))]
    debians = [name for name in names if name not in not_debians]
    steps = stage("gpu").replace(packages, "")
    file = context / "Dockerfile.gpu-steps"
    file.write_text(
        f"FROM {UV} AS uv\n"
        f"FROM {BASE} AS gpu-packages\nRUN python -m venv --without-pip /opt/venv\n"
        f"FROM {BASE}\n"
        f"RUN apt-get update && apt-get install --dry-run {' '.join(debians)}\n"
        f"RUN useradd --uid 1000 --create-home ubuntu\n{steps}"
    )
    engine.build("--tag", GPU_STEPS, "--file", str(file), str(context))
    print(f"\nnot tried: {', '.join(not_debians)}")
    script = "id -un; readlink /usr/local/bin/serve-app; stat -c %U /models; ls /opt/venv/bin"
    said = engine.run("--network=none", GPU_STEPS, "bash", "-c", script).split()
    assert said[:3] == ["app", "/opt/venv/bin/serve-app", "app"]
    assert {"serve-app", "serve-app-haproxy"} <= set(said[3:])
    [config] = [entry["Config"] for entry in json.loads(engine("inspect", GPU_STEPS))]
    assert "vLLM" in config["Labels"]["org.opencontainers.image.description"]
    assert config["User"] == "1000:1000"


# --------------------------------------------------------------------------------- docker run


def _documented(page: str, words: str) -> list[str]:
    """What follows `docker` in the one command of a page that runs an image with these words."""
    lines = re.findall(r"^docker (run .+)$", (REPO / page).read_text(), re.MULTILINE)
    [line] = [line for line in lines if words in line]
    return shlex.split(line.replace("$PWD", str(REPO)))


def test_docker_run_serves_the_demo(engine: Engine, image: str) -> None:
    """As docs/install.md says, but detached, so that this test can end it."""
    command = _documented("docs/install.md", "configs/demo.yaml")
    assert command[:2] == ["run", "--rm"]
    port = str(free_port())
    command = [image if word == "serve-app:0.1.0-cpu" else word for word in command[2:]]
    container = engine.start("--no-healthcheck", *command, "--port", port)
    url = f"http://127.0.0.1:{port}"
    try:

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/ready", trust_env=False).status_code == 200
            return False

        assert eventually(ready, 900, 5), engine("logs", container)
        asked = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8}
        asked |= {"temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=120, trust_env=False)
        assert "Paris" in answer.json()["choices"][0]["text"], answer.text
        engine("kill", "--signal=INT", container)  # Ctrl-C
        assert engine("wait", container, timeout=120).strip() == "0"
    finally:
        engine.attempt("rm", "--force", container)


# ---------------------------------------------------------------------------------- as pods


@pytest.fixture(scope="module")
def cluster(
    engine: Engine, image: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The pods of the demo: a head, a gateway, and one that has both models."""
    folder = tmp_path_factory.mktemp("pods")
    folder.chmod(0o755)
    demo = (REPO / "configs/demo.yaml").read_text()
    edits = {"host: 127.0.0.1": "host: 0.0.0.0", "model: models/": "model: /models/"}
    for here, there in edits.items():
        assert here in demo
        demo = demo.replace(here, there)
    config = folder / "demo.yaml"
    config.write_text(demo)
    files = render(load(config), ClusterProfile(image="serve-app:0.1.0-cpu"))
    service = yaml.safe_load(files["base/rayservice.yaml"])
    models = {name: (REPO / "models" / name).resolve() for name in MODELS}
    volumes = folder / "volumes"
    volumes.mkdir()
    with Cluster(engine, image, service, volumes, models) as cluster:
        cluster.start_head()
        for group in ("gateway", "cpu"):
            cluster.start_worker(group)
        cluster.deploy()
        ready = eventually(lambda: cluster.gateway("GET", "/ready")[0] == 200, 900, 5)
        assert ready, cluster.gateway("GET", "/ready")[1] + cluster.logs()
        yield cluster


def test_a_model_answers(cluster: Cluster) -> None:
    asked = {"model": "smollm2-135m", "prompt": "The capital of France is", "max_tokens": 8}
    status, text = cluster.gateway("POST", "/v1/completions", asked | {"temperature": 0})
    assert status == 200, text
    answer = json.loads(text)
    assert "Paris" in answer["choices"][0]["text"], text
    assert answer["usage"]["completion_tokens"] == 8
    status, text = cluster.gateway(
        "POST", "/v1/embeddings", {"model": "all-minilm-l6-v2", "input": "Paris"}
    )
    assert status == 200 and len(json.loads(text)["data"][0]["embedding"]) == 384, text


def test_the_pods_are_uid_1000_and_write_to_their_volumes_only(cluster: Cluster) -> None:
    for pod in cluster.pods:
        assert pod.execute("bash", "-c", "id -u; id -g").split() == ["1000", "1000"]
        script = "for f in / /home/app /opt/venv /var/tmp; do touch $f/x && echo $f; done; true"
        assert pod.execute("bash", "-c", script) == ""
        assert "CapEff:\t0000000000000000" in pod.execute("cat", "/proc/1/status")


def test_the_probes_say_ready(cluster: Cluster) -> None:
    """The rendered one, KubeRay's that runs commands in the pod, and KubeRay's of the head."""
    assert [pod.is_ready() for pod in cluster.pods] == [True, True, True]


def test_the_hook_moves_a_gateway_and_ends(cluster: Cluster) -> None:
    """Comes last: the first gateway's pod is drained."""
    first = cluster.pods[1]
    second = cluster.start_worker("gateway")
    assert eventually(second.joined, 180, 2), second.logs()
    first.drain(timeout=300)
    assert "ray::ServeReplica" not in first.execute("ps", "-eo", "args")
    assert second.is_ready()
    status, text = cluster.head.ask("GET", f"http://{second.address}:{SERVE_PORT}/v1/models")
    assert status == 200 and "smollm2-135m" in text
