"""Where models come from, and what is said where they cannot be had."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from harness.models import LLAMA, plan

from serve_app.errors import UserError
from serve_app.planner import report
from serve_app.planner.model import metadata

SMALL = {**LLAMA, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}  # fmt: skip


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A file with a header and no data: no weights are read."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
        for name, (dtype, shape) in tensors.items()
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


EMBEDDING = {"model.embed_tokens.weight": ("F32", [100, 64])}
EXPERTS = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": ("BF16", [8, 64]) for i in range(3)}


def test_headers_of_one_file(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", EMBEDDING | EXPERTS)
    found = metadata.load(str(folder))
    assert found.exact
    assert {(t.name, t.shape, t.count) for t in found.tensors} == {
        ("model.embed_tokens.weight", (100, 64), 1),
        ("model.layers.0.mlp.experts.*.up_proj.weight", (8, 64), 3),
    }


def test_headers_of_the_files_that_the_index_lists(folder: Path) -> None:
    write_safetensors(folder / "a.safetensors", EMBEDDING)
    write_safetensors(folder / "b.safetensors", EXPERTS)
    write_safetensors(folder / "consolidated.safetensors", EMBEDDING)  # a second copy, not listed
    weight_map = dict.fromkeys(EMBEDDING, "a.safetensors") | dict.fromkeys(EXPERTS, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert sum(t.count for t in metadata.load(str(folder)).tensors) == 4
    (folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files .* are missing \(first: b.safetensors\)"):
        metadata.load(str(folder))


def test_a_folder_with_a_config_alone_is_derived(folder: Path) -> None:
    found = metadata.load(str(folder))
    assert not found.exact
    assert "no weights" in found.source
    assert found.tensors


def test_an_unknown_architecture_is_summed_and_says_so(folder: Path) -> None:
    unknown = {**SMALL, "model_type": "novel", "architectures": ["NovelForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(unknown))
    with pytest.raises(UserError, match=r"cannot be told from config\.json"):
        metadata.load(str(folder))
    write_safetensors(folder / "model.safetensors", EMBEDDING)
    found = metadata.load(str(folder))
    assert found.parameters == 6400
    assert any("'NovelForCausalLM' is not known" in note for note in report.notes_on(plan(found)))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "not JSON, or cut off"),
        ({"config.json": "[]"}, "not a JSON object"),
        ({"config.json": "{}"}, "'num_hidden_layers' is missing"),
        ({"config.json": json.dumps({**SMALL, "hidden_size": -5})}, "outside 1 to"),
        ({"config.json": json.dumps({**SMALL, "hidden_size": "wide"})}, "whole number"),
        ({"config.json": json.dumps({**SMALL, "num_hidden_layers": 10**9})}, "outside 1 to"),
        ({"config.json": json.dumps({**SMALL, "vocab_size": True})}, "whole number"),
        (
            {"config.json": json.dumps({**SMALL, "quantization_config": {"quant_method": "hqq"}})},
            "'hqq' is not one that vLLM",
        ),
        ({"config.json": json.dumps(SMALL), "model.safetensors": "abc"}, "cut off, no safetensors"),
        (
            {"config.json": json.dumps(SMALL), "model.safetensors": "\x40\0\0\0\0\0\0\0{}"},
            "cut off inside",
        ),
        (
            {"config.json": json.dumps(SMALL), "model.safetensors": "\x02\0\0\0\0\0\0\0{]"},
            "not JSON",
        ),
        (
            {"config.json": json.dumps(SMALL), "model.safetensors.index.json": '{"weight'},
            "not JSON, or cut off",
        ),
        (
            {"config.json": json.dumps(SMALL), "model.safetensors.index.json": "{}"},
            "no 'weight_map'",
        ),
    ],
)
def test_damaged_metadata_is_one_sentence(
    tmp_path: Path, files: dict[str, str], words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=words) as caught:
        metadata.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_alias_does_not_stand_for_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the name of the model that was served before."""

    def no_hub(name: str, _: object) -> None:
        raise UserError(name)

    monkeypatch.setattr(metadata, "_from_hub", no_hub)
    with pytest.raises(UserError, match=r"^Qwen/Qwen3-8B-Typo$"):
        metadata.load("Qwen/Qwen3-8B-Typo", also_known_as=["meta-llama/Llama-3.3-70B-Instruct"])


def test_a_model_that_is_not_fetched_yet_is_known_by_its_other_name() -> None:
    found = metadata.load(
        "models/not-fetched", also_known_as=["HuggingFaceTB/SmolLM2-135M-Instruct"]
    )
    assert found.shape.num_hidden_layers == 30
    with pytest.raises(UserError, match="no such folder"):
        metadata.load("./models/not-fetched")
    with pytest.raises(UserError, match="not at hand"):
        metadata.load("someone/something", offline=True)


class Hub:
    """Stands for huggingface_hub: fails as it does, or answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        import huggingface_hub

        self.error: Exception | None = None
        self.headers: dict[str, Any] | None = {}
        self.files: list[str] = []
        self.fetched: list[str] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._info)
        monkeypatch.setenv("HF_HOME", str(folder / "cache"))
        self.folder = folder
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self._download)
        monkeypatch.setattr(huggingface_hub.HfApi, "get_safetensors_metadata", self._headers)

    def _info(self, *_: Any, **__: Any) -> Any:
        if self.error:
            raise self.error
        names = [path.name for path in self.folder.iterdir()] + self.files
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def _download(self, _: str, file: str) -> str:
        self.fetched.append(file)
        return str(self.folder / file)

    def _headers(self, *_: Any) -> Any:
        from huggingface_hub.errors import NotASafetensorsRepoError

        if self.headers is None:
            raise NotASafetensorsRepoError("no safetensors")
        tensors = {
            name: SimpleNamespace(dtype=dtype, shape=shape)
            for name, (dtype, shape) in self.headers.items()
        }
        return SimpleNamespace(files_metadata={"model": SimpleNamespace(tensors=tensors)})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Hub:
    return Hub(monkeypatch, folder)


def test_the_hub_gives_config_and_headers(hub: Hub) -> None:
    hub.headers = EMBEDDING
    found = metadata.load("someone/something")
    assert found.exact
    assert found.parameters > 0
    assert "on the hub" in found.source
    hub.headers = None
    assert not metadata.load("someone/something").exact
    assert set(hub.fetched) == {"config.json"}


def test_what_tells_that_a_model_embeds_is_fetched_too(hub: Hub) -> None:
    hub.headers, hub.files = EMBEDDING, ["config.json", "modules.json", "model.safetensors"]
    assert not metadata.load("someone/something").shape.pooling
    assert hub.fetched == ["config.json", "modules.json"]
    modules = [{"type": "sentence_transformers.models.Pooling"}]
    (hub.folder / "modules.json").write_text(json.dumps(modules))
    assert metadata.load("someone/something").shape.pooling
    assert metadata.load(str(hub.folder)).shape.pooling


# --- a store -----------------------------------------------------------------------------------


def test_an_address_gives_config_and_headers(folder: Path) -> None:
    address = f"file://{folder}/"  # fsspec reads s3:// in the same way
    assert not metadata.load(address).exact
    write_safetensors(folder / "a.safetensors", EMBEDDING)
    write_safetensors(folder / "b.safetensors", EXPERTS)
    found = metadata.load(address)
    assert found.exact
    assert sum(tensor.count for tensor in found.tensors) == 4
    (folder / "b.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"b\.safetensors: cut off, no safetensors header"):
        metadata.load(address)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("file:///no/such/folder", "there is no config.json at this address; correct it"),
        ("s4://bucket/model", "cannot be read (Protocol not known: s4); check the address"),
    ],
)
def test_an_address_without_a_model_is_one_sentence(address: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        metadata.load(address)
    assert str(caught.value).startswith(f"{address}: {told}")


def test_no_store_is_asked_offline(folder: Path) -> None:
    with pytest.raises(UserError, match="not at hand"):
        metadata.load(f"file://{folder}", offline=True)


def test_a_sentence_transformer_has_the_context_of_its_own_config(hub: Hub, folder: Path) -> None:
    """Not that of its architecture; as vLLM reads it."""
    sentence = folder / "sentence_bert_config.json"
    sentence.write_text(json.dumps({"max_seq_length": 48}))  # vLLM wants both keys
    longest = SMALL["max_position_embeddings"]
    assert metadata.load(str(folder)).shape.max_position_embeddings == longest
    sentence.write_text(json.dumps({"max_seq_length": 48, "do_lower_case": False}))
    assert metadata.load(str(folder)).shape.max_position_embeddings == 48
    hub.headers = EMBEDDING
    assert metadata.load("someone/something").shape.max_position_embeddings == 48
    kept = metadata.load("sentence-transformers/all-MiniLM-L6-v2", offline=True)
    assert kept.shape.max_position_embeddings == 256


def http_error(kind: str) -> Exception:
    from huggingface_hub import errors

    request = httpx.Request("GET", "https://hub/someone/something")
    error: Exception = getattr(errors, kind)(
        "long\ntext", response=httpx.Response(404, request=request)
    )
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("GatedRepoError", "gated; accept its terms on the hub and set HF_TOKEN"),
        ("RepositoryNotFoundError", "no such model on the hub"),
        (ConnectionError("Name or service not known"), "the hub cannot be reached"),
        (TimeoutError(), "the hub cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(hub: Hub, error: str | Exception, words: str) -> None:
    hub.error = http_error(error) if isinstance(error, str) else error
    with pytest.raises(UserError, match=words) as caught:
        metadata.load("someone/something")
    assert "\n" not in str(caught.value)


def test_a_misspelt_model_is_recognised(hub: Hub) -> None:
    hub.error = http_error("RepositoryNotFoundError")
    with pytest.raises(UserError, match="did you mean 'Qwen/Qwen3-32B-FP8'"):
        metadata.load("Qwen/Qwen3-32B-FP9")


def test_a_hub_that_does_not_answer_is_said_in_words_and_no_other_name_is_proposed() -> None:
    refused = metadata._hub_error("Qwen/Qwen3-8B", httpx.ConnectError("[Errno 111] refused"))
    assert str(refused) == (
        "Qwen/Qwen3-8B: the hub cannot be reached (no connection); give a local folder, or one of "
        "the models whose metadata is kept here (`serve-app plan --list`)"
    )
    assert metadata.why_unreachable(httpx.ReadTimeout("timed out")) == "no answer in time"
    assert metadata.why_unreachable(OSError("no route to host")) == "no route to host"
