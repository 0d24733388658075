"""LoRA adapters of one engine: loaded, replaced and unloaded while it serves."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.config.settings import Adapter
from serve_app.errors import UserError

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from serve_app.replica.front_ends import FrontEnds

logger = logging.getLogger("ray.serve")


class Adapters:
    """Keeps the engine's adapters equal to what the config lists.

    vLLM asks :meth:`resolve_lora` (its ``LoRAResolver`` interface) for an adapter that it does
    not have, and the request waits for the answer. So a request that comes before its adapter is
    loaded loads it.
    """

    def __init__(self, llm: AsyncLLM, front_ends: FrontEnds) -> None:
        self._llm = llm
        self._front_ends = front_ends
        # The other front ends ask this one for an adapter that they do not know.
        self._serving_models = front_ends.first.serving_models
        self._wanted: dict[str, str] = {}
        self._serving_models.lora_resolvers.append(self)

    async def apply(self, adapters: list[Adapter]) -> None:
        """Unload adapters that are gone or moved; load those that are new or whose files changed.

        An adapter that fails to load or to unload does not stop the others.

        Raises:
            UserError: the engine was started without LoRA.
        """
        wanted = {adapter.name: adapter.path for adapter in adapters}
        if wanted and self._llm.vllm_config.lora_config is None:
            raise UserError("adapters need engine.enable_lora: true from the start")
        before, self._wanted = self._wanted, wanted
        for name, path in before.items():
            if wanted.get(name) != path:
                try:
                    await self._unload(name)
                except Exception as error:  # Serve would end the replica, which still serves
                    logger.error(f"adapter '{name}' cannot be unloaded: {error}")
        for name in wanted:
            await self._load(name)

    async def _load(self, name: str) -> None:
        loaded, path = self._serving_models.lora_requests, self._wanted[name]
        try:
            local = await asyncio.to_thread(fetch, path)
            before = loaded[name].lora_path if name in loaded else None
            if before == local:
                return
            if before is not None:
                await self._unload(name)
            problem = await self._load_from(name, local)
            if problem and before is not None and not await self._load_from(name, before):
                problem += "; it stays as it was"
        except Exception as error:
            problem = str(error)
        if not problem:
            logger.info(f"adapter '{name}' is loaded from {path}")
        else:
            reason = " ".join(problem.split())
            logger.error(f"adapter '{name}' cannot be loaded from {path}: {reason}")

    async def _load_from(self, name: str, local: str) -> str:
        """Why it cannot be loaded; nothing where it is."""
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        request = LoadLoRAAdapterRequest(lora_name=name, lora_path=local)
        answer = await self._serving_models.load_lora_adapter(request)
        # vLLM refuses an adapter that a request has loaded in the meantime.
        return "" if name in self._serving_models.lora_requests else str(answer.error.message)

    async def _unload(self, name: str) -> None:
        # The lock of vLLM's own handlers: a request that is loading the adapter at this moment
        # would put it back.
        async with self._serving_models.lora_resolver_lock[name]:
            request = self._serving_models.lora_requests.pop(name, None)
            if request is None:
                return
            await self._front_ends.forget(name)
            await self._llm.remove_lora(request.lora_int_id)
            # vLLM's prefix cache knows adapters by name only. Without this reset, a new adapter of
            # the same name would reuse KV blocks that the old one computed.
            await self._llm.reset_prefix_cache(reset_running_requests=True)
        logger.info(f"adapter '{name}' is unloaded")

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any | None:
        """Load the adapter of this name for vLLM; None where the config does not list it."""
        from vllm.lora.request import LoRARequest

        path = self._wanted.get(lora_name)
        if path is None:
            return None
        try:
            path = await asyncio.to_thread(fetch, path)
        except UserError as error:
            # vLLM then tries the address itself, fails, and tells the client that the adapter
            # exists but does not load. An exception here would be a 500 without a reason.
            logger.error(f"adapter '{lora_name}': {error}")
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=path)


def fetch(path: str) -> str:
    """Download an address with a scheme (``s3://``); return a local folder or hub id as it is.

    Each call looks whether the remote files changed, and downloads them again if so. While the
    store cannot be reached, the last download is used.

    Raises:
        UserError: the address cannot be read.
    """
    if "://" not in path:
        return path
    import fsspec

    versions = _cache() / hashlib.sha256(path.encode()).hexdigest()[:16]
    try:
        system, remote = fsspec.core.url_to_fs(path)
        remote = remote.rstrip("/") + "/"
        system.invalidate_cache()  # fsspec keeps listings for ever
        listed = sorted(system.find(remote, detail=True).items())
        target = versions / hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
        if not target.exists():
            _download(system, remote, target)
    except Exception as error:
        kept = [] if isinstance(error, FileNotFoundError) else _by_age(versions)
        if not kept:
            raise UserError(f"{path} cannot be read: {error}") from None
        logger.warning(f"{path} cannot be read ({error}); its last download is used")
        target = kept[-1]
    return str(target)


def _download(system: Any, remote: str, target: Path) -> None:
    """Download into ``target``, which appears only when the download is complete."""
    partial = _cache() / f"partial-{uuid.uuid4().hex}"
    try:
        system.get(remote, f"{partial}/", recursive=True)
        target.parent.mkdir(exist_ok=True)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # another request or replica of this node was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _by_age(folder: Path) -> list[Path]:
    """The folders in a folder, the newest last."""
    found = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.stat().st_mtime)


def _cache() -> Path:
    root = os.environ.get("VLLM_CACHE_ROOT") or Path.home() / ".cache" / "vllm"
    folder = Path(root) / "serve_app" / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
