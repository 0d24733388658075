"""Finds a model's ``config.json`` and its list of tensors.

The sources, in this order: a local folder; the configs kept as package data; the Hugging Face
cache; the hub, from which only the config and the headers of the safetensors files are fetched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from serve_app.errors import UserError, did_you_mean, first_line
from serve_app.planner.model import derive, shape, tensors
from serve_app.planner.model.checkpoint import Model
from serve_app.planner.model.shape import ModelShape
from serve_app.planner.model.tensors import DTYPE_BITS, Tensor

OTHER_CONFIG = frozenset({"hf_overrides", "hf_config_path", "config_format", "revision"})
"""Engine arguments that can make vLLM read another config than this module."""

_INDEX = "model.safetensors.index.json"
_HUB_TIMEOUT_S = 10
_MAX_HEADER = 100 << 20  # safetensors' own limit on a header, in bytes
_STORE_BLOCK = 1 << 20  # bytes asked of a store at a time: most headers fit


_FETCHED = "models/"
"""Where ``serve-app fetch`` puts models. Without the folder, such a name looks like a hub id."""


def load(
    name: str,
    *,
    also_known_as: Sequence[str] = (),
    offline: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Model:
    """The model called ``name``: a folder, a hub id, or an address such as ``s3://bucket/model``.

    ``also_known_as`` are hub ids of the same model, tried among the configs kept here when
    ``name`` is a folder that is not there (the demo's models before they are fetched). They do not
    stand for a hub id: an alias may be the name of the model that was served before.
    ``offline`` never asks the hub or a store. ``overrides`` are ``hf_overrides`` of the engine.

    Raises:
        UserError: in one sentence: not found, not allowed, no network, or unreadable metadata.
    """
    if _is_gguf(name):
        raise UserError(
            f"{name}: vLLM 0.29 does not load GGUF; name the model that it was made from, or an "
            "AWQ, GPTQ or fp8 checkpoint of it"
        )
    if "://" in name:
        if offline:
            raise UserError(f"{name}: its metadata is not at hand")
        return _from_address(name, overrides)
    folder = as_folder(name)
    if folder.is_dir():
        return _from_folder(name, folder, overrides)
    absent = is_path(name) or name.startswith(_FETCHED)
    for candidate in (name, *also_known_as) if absent else (name,):
        config = _kept(candidate)
        if config is not None:
            of = "" if candidate == name else f" of {candidate}"
            config = overridden(config, overrides)
            model = _model(candidate, config, None, f"config{of} kept in serve_app")
            return _with_sentence_config(model, _kept(candidate, _SENTENCE_CONFIGS[0]) or {})
    if is_path(name):
        raise UserError(f"{name}: no such folder (a hub id has the form organisation/name)")
    cached = snapshot(name, os.environ)
    if list(cached.glob("*.safetensors")):
        with contextlib.suppress(UserError):  # a partial download: ask the hub instead
            return _from_folder(name, cached, overrides)
    if offline:
        raise UserError(f"{name}: its metadata is not at hand")
    return _from_hub(name, overrides)


def _is_gguf(name: str) -> bool:
    folder = as_folder(name)
    if folder.is_dir():
        return any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
    return name.lower().endswith((".gguf", "-gguf"))


def overridden(config: dict[str, Any], changes: Mapping[str, Any] | None) -> dict[str, Any]:
    """A ``config.json`` with ``hf_overrides``; only configs in it are changed key by key.

    ``ModelConfig._apply_dict_overrides`` (vllm/config/model.py:500).
    """
    changed = dict(config)
    for key, value in (changes or {}).items():
        if key == "rope_scaling":  # the older name of the same
            changed.pop("rope_parameters", None)
        old = config.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and key.endswith("_config"):
            value = overridden(old, value)
        changed[key] = value
    return changed


def shape_at_hand(name: str, environment: Mapping[str, str]) -> ModelShape | None:
    """The shape of the model called ``name``, if its ``config.json`` is on this machine, else None.

    ``environment`` says where the Hugging Face cache is. The function reads one small file, for
    processes that must not wait.
    """
    try:
        config = at_hand(name, environment) / "config.json"
        found = _object(_text(config), str(config)) if config.is_file() else _kept(name)
        return shape.from_config(found) if found else None
    except UserError:
        return None


def at_hand(name: str, environment: Mapping[str, str]) -> Path:
    """The model's own folder, else where the Hugging Face cache would have it."""
    folder = as_folder(name)
    try:
        there = folder.is_dir()
    except OSError:  # in a folder that only others may enter
        there = False
    return folder if there else snapshot(name, environment)


def snapshot(name: str, environment: Mapping[str, str]) -> Path:
    """The folder of a model in the Hugging Face cache, which need not exist.

    Computed here, because importing huggingface_hub takes longer than all else in this module.
    """
    home = environment.get("HF_HOME") or (
        Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    hub = Path(environment.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = hub / f"models--{name.replace('/', '--')}"
    try:
        return model / "snapshots" / (model / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return model


def as_folder(name: str) -> Path:
    """``name`` as a path, with ``~`` expanded."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~ of a user that does not exist
        return Path(name)


def is_path(name: str) -> bool:
    """Whether ``name`` can only be a folder, not a hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name


def kept_models() -> list[str]:
    """The hub ids whose configs are kept as package data."""
    folder = resources.files("serve_app").joinpath("data", "models")
    return sorted(entry.name.replace("--", "/", 1) for entry in folder.iterdir() if entry.is_dir())


def _kept(name: str, file: str = "config.json") -> dict[str, Any] | None:
    if name.count("/") != 1:
        return None
    path = resources.files("serve_app").joinpath("data", "models", name.replace("/", "--"), file)
    return _object(path.read_text(), f"{name}/{file}") if path.is_file() else None


def _model(name: str, config: dict[str, Any], listed: list[Tensor] | None, source: str) -> Model:
    try:
        described = shape.from_config(config)
        exact = listed is not None
        found = listed if listed is not None else derive.tensors(described)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return Model(name, described, tuple(found), exact, source)


# --- a local folder ----------------------------------------------------------------------------


def _from_folder(name: str, folder: Path, overrides: Mapping[str, Any] | None = None) -> Model:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: the folder has no config.json")
    config = overridden(_object(_text(path), str(path)), overrides)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / _INDEX
    if index.is_file():
        listed = _index_files(_object(_text(index), str(index)), str(index))
        absent = [file for file in listed if not (folder / file).is_file()]
        if absent and files:
            raise UserError(
                f"{name}: {len(absent)} of {len(listed)} files that {_INDEX} lists are missing "
                f"(first: {absent[0]}); fetch the model again"
            )
        files = [] if absent else [folder / file for file in listed]
    found = [tensor for file in files for tensor in _read_header(file)]
    source = f"safetensors headers in {folder}" if files else f"{path} (no weights there)"
    model = _model(name, config, tensors.grouped(found) if files else None, source)
    if pools_by_modules(folder / _MODULES):
        model = _pooling(model)
    sentence = next((folder / s for s in _SENTENCE_CONFIGS if (folder / s).is_file()), None)
    if sentence is None:
        return model
    return _with_sentence_config(model, _object(_text(sentence), str(sentence)))


_MODULES = "modules.json"


def pools_by_modules(path: Path) -> bool:
    """Whether a ``modules.json`` says that the model pools, as in vLLM's ``get_pooling_config``."""
    try:
        modules = json.loads(path.read_text())
        return any(module["type"] == "sentence_transformers.models.Pooling" for module in modules)
    except (OSError, ValueError, LookupError, TypeError):
        return False  # none, or one that vLLM could not read either


def _pooling(model: Model) -> Model:
    return replace(model, shape=replace(model.shape, pooling=True))


_SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""Files of a sentence transformer, in vLLM's order (vllm/transformers_utils/config.py:928)."""


def _with_sentence_config(model: Model, config: dict[str, Any]) -> Model:
    """The model with the context length of its sentence transformer (vllm/config/model.py:2471)."""
    longest = config.get("max_seq_length")
    if not isinstance(longest, int) or "do_lower_case" not in config:
        return model
    return replace(model, shape=replace(model.shape, max_position_embeddings=longest))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON, or cut off (line {error.lineno})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: not a JSON object")
    return value


def _index_files(index: dict[str, Any], where: str) -> list[str]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{where}: has no 'weight_map'; the index is cut off")
    return sorted({str(file) for file in files.values()})


def _read_header(path: Path) -> list[Tensor]:
    try:
        with path.open("rb") as file:
            return _header_of(file, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _header_of(file: BinaryIO, where: str) -> list[Tensor]:
    """The tensors of one safetensors file: 8 bytes of length, then JSON."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise UserError(f"{where}: cut off, no safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise UserError(f"{where}: not a safetensors file")
    raw = file.read(length)
    if len(raw) < length:
        raise UserError(f"{where}: cut off inside its safetensors header")
    return list(_tensors(_object(raw.decode("utf-8", "replace"), where), where))


def _tensors(header: dict[str, Any], where: str) -> Iterable[Tensor]:
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{where}: the entry of tensor '{name}' is damaged") from None
        if dtype not in DTYPE_BITS:
            raise UserError(f"{where}: tensor '{name}' has the unknown type '{dtype}'")
        yield Tensor(name, dtype, shape)


# --- a store (s3:// and whatever else fsspec knows) ---------------------------------------------


def _from_address(name: str, overrides: Mapping[str, Any] | None) -> Model:
    """Config and headers only, as from the hub."""
    import fsspec

    address = name.rstrip("/")
    try:
        system, folder = fsspec.core.url_to_fs(address)
        config = _object(system.cat_file(f"{folder}/config.json").decode(), f"{name}/config.json")
        found: list[Tensor] = []
        for path in sorted(system.glob(f"{folder}/*.safetensors")):
            with system.open(path, block_size=_STORE_BLOCK) as file:
                found += _header_of(file, f"{name}/{path.rpartition('/')[2]}")
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name}: there is no config.json at this address; correct it") from None
    except Exception as error:  # of the store's client
        why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name}: cannot be read ({why}); check the address, and the credentials for it"
        ) from None
    listed = tensors.grouped(found) if found else None
    config = overridden(config, overrides)
    return _model(name, config, listed, f"safetensors headers in {name}")


# --- the hub -----------------------------------------------------------------------------------


def _from_hub(name: str, overrides: Mapping[str, Any] | None) -> Model:
    """Config and headers only; ``HF_TOKEN`` and ``HF_ENDPOINT`` are honoured by the library."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    api = HfApi()
    try:
        # One request first; a download would retry.
        there = {f.rfilename for f in api.model_info(name, timeout=_HUB_TIMEOUT_S).siblings or ()}

        def read(file: str) -> dict[str, Any]:
            return _object(Path(hf_hub_download(name, file)).read_text(), f"{name}/{file}")

        config = overridden(read("config.json"), overrides)
        sentence = next((read(file) for file in _SENTENCE_CONFIGS if file in there), {})
        pools = _MODULES in there and pools_by_modules(Path(hf_hub_download(name, _MODULES)))
        try:
            metadata = api.get_safetensors_metadata(name)
        except NotASafetensorsRepoError:
            metadata = None
    except UserError:
        raise
    except Exception as error:
        raise _hub_error(name, error) from None
    if metadata is None:
        model = _model(name, config, None, f"config.json of {name} on the hub")
    else:
        found = tensors.grouped(
            Tensor(tensor, info.dtype, tuple(info.shape))
            for file in metadata.files_metadata.values()
            for tensor, info in file.tensors.items()
        )
        model = _model(name, config, found, f"safetensors headers of {name} on the hub")
    return _with_sentence_config(_pooling(model) if pools else model, sentence)


def _hub_error(name: str, error: Exception) -> UserError:
    """One sentence for an error of the hub's library, with what to do."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return UserError(
            f"{name}: the model is gated; accept its terms on the hub and set HF_TOKEN"
        )
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "HFValidationError"):
        hint = did_you_mean(name, kept_models())
        return UserError(
            f"{name}: no such model on the hub, or a private one{hint or ' (then set HF_TOKEN)'}"
        )
    if kind in ("EntryNotFoundError", "RemoteEntryNotFoundError"):
        return UserError(f"{name}: the repository has no config.json")
    if kind in ("SafetensorsParsingError",):
        return UserError(f"{name}: its safetensors metadata is damaged")
    return UserError(
        f"{name}: the hub cannot be reached ({why_unreachable(error)}); give a local folder, or "
        "one of the models whose metadata is kept here (`serve-app plan --list`)"
    )


def why_unreachable(error: Exception) -> str:
    """What an error of the hub's HTTP client means, in a few words."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    kind = type(error).__name__
    if status:
        return f"status {status}"
    if "Timeout" in kind:
        return "no answer in time"
    if "Connect" in kind:
        return "no connection"
    return "HF_HUB_OFFLINE is set" if kind == "OfflineModeIsEnabled" else first_line(error)
