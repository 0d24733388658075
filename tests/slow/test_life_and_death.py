"""What clients see while replicas are killed, hang, are updated and change their adapters.

Real engines on the CPU. No time is asserted on: what was measured is printed (``-rP`` or ``-s``)
and kept in docs/operations.md.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from harness import processes, servers
from harness.load import Load, Request, ask
from harness.processes import descendants, eventually, free_port, title
from harness.servers import CHAT, Cluster

from serve_app.local.orphans import orphans

SPLIT = "tiny-tp2"
BACK_S = 180.0
"""Patience with a replica that starts while its twin works on the same two cores."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """SmolLM2 twice, each with two front ends and ready for adapters.

    Its first step under load takes more than 8 s here.
    """
    ours = {"replicas": 2, "hang_timeout_s": 30, "frontends": 2}
    args = servers.demo_args("smollm2-135m") | ours
    args["engine"] |= {"enable_lora": True, "max_lora_rank": 8}
    config = servers.document(free_port(), servers.application(CHAT, **args))
    cluster = Cluster.start(config, tmp_path_factory.mktemp("pair"), "haproxy")
    try:
        cluster.wait_until_ready()
        assert eventually(lambda: len(cluster.replicas(CHAT)) == 2, BACK_S, 0.5)
        yield cluster
    finally:
        left = cluster.interrupt()
    assert not left, f"Ctrl-C left {left}"


def engine_of(replica: int) -> int:
    """The pid of a replica's EngineCore."""
    [engine] = [pid for pid in descendants(replica) if title(pid).startswith("VLLM::EngineCore")]
    return engine


def front_end_of(replica: int) -> int | None:
    """The pid of a replica's second front end; None while there is none."""
    found = [pid for pid in descendants(replica) if title(pid).startswith("VLLM::FrontEnd_1")]
    return found[0] if found else None


def measured(what: str, load: Load, since: float, back: float) -> None:
    """Print a client's view of a failure, in seconds from the moment ``since``."""
    ended = [r.ended - since for r in load.lost() if r.ended]
    after = [r for r in load.requests if r.ended and r.sent > since]
    errors = f"{len(ended)} errors"
    if ended:
        errors += f" from {ended[0]:.2f} to {ended[-1]:.2f} s"
    waits = max(((r.began or r.ended or 0) - r.sent for r in after if r.streamed), default=0)
    print(
        f"\nMEASURED {what}: {len(load.requests)} requests, {errors}; two replicas again after "
        f"{back - since:.1f} s; longest wait for a first byte meanwhile {waits:.1f} s"
    )


def only_begun_streams_were_lost(load: Load) -> list[Request]:
    """Every request ended, and each that failed was a stream in its middle and was told so."""
    hanging = [r for r in load.requests if r.ended is None]
    assert not hanging
    lost = load.lost()
    wrong = [r for r in lost if not (r.streamed and r.began and r.ending == "error event")]
    assert not wrong
    return lost


def replaced(cluster: Cluster, pid: int) -> bool:
    running = cluster.replicas(CHAT).values()
    return len(running) == 2 and pid not in running


def fails(pair: Cluster, what: str, hit: int, number: signal.Signals, replica: int) -> Load:
    """Send a signal to a process of ``replica`` under load; the load, once Serve has two again."""
    with Load(pair.base_url, CHAT) as load:
        assert eventually(lambda: load.streaming_now >= 6, 60)
        since = time.monotonic()
        os.kill(hit, number)
        assert eventually(lambda: replaced(pair, replica), BACK_S, 0.2)
        back = time.monotonic()
    measured(what, load, since, back)
    return load


# --- kills -------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["engine", "replica"])
def test_a_kill_under_load_costs_only_the_streams_that_it_cuts(pair: Cluster, victim: str) -> None:
    replica = next(iter(pair.replicas(CHAT).values()))
    engine, front_end = engine_of(replica), front_end_of(replica)
    assert front_end
    hit = replica if victim == "replica" else engine
    load = fails(pair, f"kill -9 of the {victim}", hit, signal.SIGKILL, replica)
    lost = only_begun_streams_were_lost(load)
    assert lost, "the kill met no stream in its middle"
    assert {json.loads(r.text)["error"]["code"] for r in lost} == {"replica_lost"}
    assert not title(engine)
    assert not title(front_end)


def test_a_killed_front_end_costs_its_streams_only_and_comes_back(pair: Cluster) -> None:
    before = pair.replicas(CHAT)
    replica = next(iter(before.values()))
    front_end, engine = front_end_of(replica), engine_of(replica)
    assert front_end
    with Load(pair.base_url, CHAT, streaming=12, whole=0) as load:
        assert eventually(lambda: load.streaming_now == 12, 60)
        since = time.monotonic()
        os.kill(front_end, signal.SIGKILL)
        assert eventually(lambda: front_end_of(replica) not in (None, front_end), BACK_S, 0.2)
        back = time.monotonic()
    measured("kill -9 of a front end", load, since, back)
    assert eventually(lambda: serves(pair, replica), BACK_S, 1)
    lost = only_begun_streams_were_lost(load)
    assert 0 < len(lost) < 12, "of four front ends one was killed"
    assert {json.loads(r.text)["error"]["code"] for r in lost} == {"replica_lost"}
    assert pair.replicas(CHAT) == before
    assert engine_of(replica) == engine


def serves(pair: Cluster, replica: int) -> bool:
    """Whether all front ends of a replica answer."""
    [id] = [id for id, pid in pair.replicas(CHAT).items() if pid == replica]
    with pair.ray():
        [ports] = [ports for ports in servers.front_ends(CHAT) if id in ports]
        try:
            body = {"model": CHAT, "prompt": "x", "max_tokens": 1}
            return all(p.post("/v1/completions", **body).is_success for p in ports.values())
        except httpx.ConnectError:
            return False


def test_the_requests_of_a_killed_front_end_end_in_the_engine(pair: Cluster) -> None:
    replica = next(iter(pair.replicas(CHAT).values()))
    front_end = front_end_of(replica)
    assert front_end
    [id] = [id for id, pid in pair.replicas(CHAT).items() if pid == replica]
    with pair.ray():
        [ports] = [ports for ports in servers.front_ends(CHAT) if id in ports]
    first, second = ports.values()
    endless = {"model": CHAT, "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(second.post, "/v1/completions", **endless)
        assert eventually(lambda: first.metric("vllm:num_requests_running") == 1, 60)
        os.kill(front_end, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            asked.result()
    # The engine says how many it runs when it makes a step, so it is given one to make.
    one = {"model": CHAT, "prompt": "x", "max_tokens": 1}

    def alone() -> bool:
        first.post("/v1/completions", **one)
        return first.metric("vllm:num_requests_running") == 0

    assert eventually(alone, 10, 0.5)
    assert eventually(lambda: serves(pair, replica), BACK_S, 1)


def test_a_rolling_update_under_load_fails_nothing(pair: Cluster) -> None:
    before = pair.replicas(CHAT)
    long_one = {"model": CHAT, "prompt": "Long ago", "max_tokens": 2000, "stream": True}
    with ThreadPoolExecutor() as pool, Load(pair.base_url, CHAT) as load:
        mine = [Request(True, time.monotonic()) for _ in range(4)]
        done = [pool.submit(ask, pair.base_url, long_one, request) for request in mine]
        assert eventually(lambda: all(r.is_streaming for r in mine), 60)
        since = time.monotonic()
        config = pair.deployed()
        config["applications"][0]["args"]["engine"]["max_num_seqs"] -= 1
        pair.deploy(config)
        assert all(r.is_streaming for r in mine), mine

        def updated() -> bool:
            now = pair.replicas(CHAT)
            return len(now) == 2 and not now.keys() & before.keys()

        assert eventually(updated, 900, 0.5)
        back = time.monotonic()
        for future in done:
            future.result()
    measured("rolling update", load, since, back)
    assert [r.text for r in load.lost()] == []
    assert [r.ending for r in mine] == ["whole"] * 4, [r.text for r in mine]


def test_a_hung_engine_is_replaced_and_its_clients_do_not_hang(pair: Cluster) -> None:
    replica = next(iter(pair.replicas(CHAT).values()))
    engine = engine_of(replica)
    load = fails(pair, "SIGSTOP of the engine", engine, signal.SIGSTOP, replica)
    assert only_begun_streams_were_lost(load), "no stream was in its middle"
    assert not title(replica) and not title(engine)


# --- adapters ----------------------------------------------------------------------------------


def lora(folder: Path, seed: int) -> str:
    """A random rank-4 adapter for SmolLM2, strong enough to change what it says."""
    import torch
    from safetensors.torch import save_file

    shape = json.loads((processes.REPO / "models/smollm2-135m-instruct/config.json").read_text())
    hidden = shape["hidden_size"]
    torch.manual_seed(seed)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, hidden) / 4
        weights[f"{name}.lora_B.weight"] = torch.randn(hidden, 4) / 4
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    about |= {"task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "SmolLM2"}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return str(folder)


def test_adapters_come_and_go_without_a_restart(pair: Cluster, tmp_path: Path) -> None:
    one, other = lora(tmp_path / "one", 1), lora(tmp_path / "other", 2)
    (tmp_path / "empty").mkdir()

    def deploy(**adapters: str) -> None:
        config = pair.deployed()
        listed = [{"name": name, "path": path} for name, path in adapters.items()]
        config["applications"][0]["deployments"] = [
            {"name": "ModelServer", "user_config": {"adapters": listed}}
        ]
        pair.deploy(config)

    def parents() -> dict[str, str]:
        """The models that are adapters of another, and of which; an alias has no parent."""
        cards = httpx.get(f"{pair.base_url}/v1/models").json()["data"]
        return {card["id"]: card["parent"] for card in cards if card["parent"]}

    def says(model: str) -> set[str]:
        """What it says, by both replicas: the gateway picks among idle ones at random."""
        # Longer than a block of the KV cache, which must not outlive the adapter that filled it.
        body = {"model": model, "prompt": "The capital of France is Paris. " * 30, "max_tokens": 12}
        answers = [ask(pair.base_url, body | {"temperature": 0}) for _ in range(8)]
        assert {a.ending for a in answers} == {"whole"}, answers
        return {a.text for a in answers}

    def log(pattern: str) -> int:
        return len(re.findall(pattern, pair.log.read_text(errors="replace")))

    replicas = pair.replicas(CHAT)
    [base] = says(CHAT)

    deploy(poet=one)
    assert eventually(lambda: parents().get("poet") == CHAT)
    [poet] = says("poet")
    assert poet != base

    deploy(poet=other, twin=other, broken=str(tmp_path / "empty"))
    assert eventually(lambda: log("adapter 'broken' cannot be loaded from .*/empty: ") == 2, 30)
    [moved] = says("poet")
    assert moved not in (base, poet)
    assert says("twin") == {moved}
    refused = ask(pair.base_url, {"model": "broken", "prompt": "x", "max_tokens": 1})
    assert refused.text.startswith("400") and "'broken'" in refused.text
    assert says(CHAT) == {base}

    deploy()
    assert eventually(lambda: not parents())
    gone = ask(pair.base_url, {"model": "poet", "prompt": "x", "max_tokens": 1})
    assert gone.text.startswith("404") and "model_not_found" in gone.text
    assert eventually(lambda: log("adapter 'poet' is unloaded") == 4, 30)  # moved once, gone once
    assert says(CHAT) == {base}
    assert pair.replicas(CHAT) == replicas


# --- an engine that does not start -------------------------------------------------------------


def test_a_model_that_is_nowhere_fails_alone_and_says_so_in_one_sentence(pair: Cluster) -> None:
    replicas, before = pair.replicas(CHAT), pair.deployed()
    more = servers.application("lost", model="/nowhere")
    pair.deploy(before | {"applications": [*before["applications"], more]})

    def lost() -> dict[str, Any]:
        return dict(pair.ready()[1].get("models", {}).get("lost", {}))

    assert eventually(lambda: lost().get("status") == "DEPLOY_FAILED", BACK_S, 0.5), lost()
    sentence = "'/nowhere' is neither a folder on this node nor a model that the hub shows"
    assert lost()["message"].startswith(sentence)
    assert lost()["starting"] == []
    answer = ask(pair.base_url, {"model": "lost", "prompt": "x", "max_tokens": 1})
    assert answer.text.startswith("503") and sentence in answer.text
    status = subprocess.run(
        [servers.BIN / "serve", "status", "--address", pair.dashboard],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = yaml.safe_load(status.stdout)["applications"]["lost"]["deployments"]["ModelServer"]
    assert sentence in said["message"]
    assert "File " not in said["message"]  # no frames
    pair.deploy(before)
    assert eventually(lambda: not lost(), 60)
    assert pair.replicas(CHAT) == replicas


# --- serve-app admin ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("reset-prefix-cache", "prefix cache reset"),
        ("sleep", "refused: sleep needs engine.enable_sleep_mode: true"),
        ("wake", "awake"),
    ],
)
def test_admin_has_a_line_from_every_replica(pair: Cluster, action: str, said: str) -> None:
    replicas = pair.replicas(CHAT)
    run = subprocess.run(
        [servers.BIN / "serve-app", "admin", CHAT, action, "--address", pair.gcs_address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.splitlines() == [f"{id}: {said}" for id in sorted(replicas)], run.stderr
    assert run.returncode == 0
    answer = ask(pair.base_url, {"model": CHAT, "prompt": "x", "max_tokens": 1})
    assert answer.ending == "whole", answer


# --- an engine that starts and is not wanted any more ------------------------------------------


def test_a_model_that_is_removed_while_it_starts_gives_back_what_it_has(
    pair: Cluster, split: dict[str, Any]
) -> None:
    pair.deploy(split)
    assert eventually(lambda: len(family(pair)[1]) >= 3, BACK_S)  # EngineCore and its first worker
    assert not pair.replicas(SPLIT)
    replica, below = family(pair)
    others = [a for a in split["applications"] if a["name"] != SPLIT]
    since = time.monotonic()
    pair.deploy(split | {"applications": others})
    # Not after its graceful_shutdown_timeout_s, which is ten minutes.
    assert eventually(lambda: not any(map(title, {replica, *below})), 60)
    print(f"\nMEASURED removal at start-up: {time.monotonic() - since:.1f} s to the last process")


# --- an engine of several processes ----------------------------------------------------------


@pytest.fixture(scope="module")
def split(pair: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The config with a random model on two tensor-parallel workers beside SmolLM2."""
    from rich.console import Console

    from benchmarks.tiny_model import tiny_model

    model = tiny_model(tmp_path_factory.mktemp("tiny") / "model", Console(quiet=True))
    engine = {"tensor_parallel_size": 2, "max_model_len": 4096}
    engine |= {"enforce_eager": True, "dtype": "float32"}
    before = pair.deployed()
    more = servers.application(SPLIT, model=str(model), engine=engine)
    yield before | {"applications": [*before["applications"], more]}
    pair.deploy(before)


def family(pair: Cluster) -> tuple[int, set[int]]:
    """The pids of the replica that Serve now starts or runs, and of all below it."""
    for pid, name in processes.in_session(pair.process.pid).items():
        if name.startswith(f"ray::ServeReplica:{SPLIT}:"):
            return pid, descendants(pid)
    return 0, set()


def workers(pair: Cluster) -> list[str]:
    return [t for pid in family(pair)[1] if (t := title(pid)).startswith("VLLM::Worker")]


@pytest.mark.parametrize("moment", ["start-up", "idle", "mid-generation"])
def test_no_process_of_a_split_engine_outlives_its_replica(
    pair: Cluster, split: dict[str, Any], moment: str
) -> None:
    pair.deploy(split)
    body = {"model": SPLIT, "prompt": "Once", "max_tokens": 3000, "stream": True}
    request = Request(True, time.monotonic())
    with ThreadPoolExecutor() as pool:
        if moment == "start-up":
            # EngineCore has been started, and its workers are just coming up.
            assert eventually(lambda: len(family(pair)[1]) >= 3, BACK_S)
            assert not pair.replicas(SPLIT)
        else:
            assert eventually(lambda: pair.replicas(SPLIT), BACK_S, 0.5)
            assert eventually(lambda: len(workers(pair)) == 2)
            answer = ask(pair.base_url, body | {"max_tokens": 8, "stream": False})
            assert answer.ending == "whole", answer
        before = orphans()
        replica, below = family(pair)
        if moment == "mid-generation":
            pool.submit(ask, pair.base_url, body, request)
            assert eventually(lambda: request.is_streaming, 60)  # for some ten seconds
        since = time.monotonic()
        os.kill(replica, signal.SIGKILL)

        def left() -> set[int]:
            grown = below.union(*map(descendants, below)) | {
                o.pid for o in orphans() if o not in before
            }
            return {pid for pid in grown if title(pid)}

        eventually(lambda: not left(), 15, 0.05)
        print(f"\nMEASURED kill at {moment}: {time.monotonic() - since:.1f} s to the last process")
        assert not left(), [title(pid) for pid in left()]
        if moment == "mid-generation":
            assert eventually(lambda: request.ended, 30)
            assert request.ending == "error event", request
