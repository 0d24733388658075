"""A Ray cluster as a command reaches it that runs outside of it: its address, token, dashboard.

Ray 2.60 makes a token when ``serve run`` starts a Ray, and turns it on for that cluster only. A
client finds the token by itself, but uses it only where RAY_AUTH_MODE says so. And it asks this
machine's network address for a Ray that listens on loopback, unless it is told not to.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from serve_app import addresses
from serve_app.cluster import head
from serve_app.errors import UserError, first_line

_PATIENCE_S = 5.0
"""Seconds that a cluster has to answer. Ray itself would wait for minutes."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Connection:
    """A cluster's address (``host:port`` of its GCS, or ``ray://…``) and where we have it from."""

    address: str
    given_by: str

    def environment(self) -> dict[str, str]:
        """Variables with which Ray's own commands reach the cluster."""
        env = {"RAY_ADDRESS": self.address}
        if self._is_loopback():
            env["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray replaces the address
        mode = os.environ.get("RAY_AUTH_MODE", "token").lower()
        if mode == "token" and self._is_here() and token():
            env["RAY_AUTH_MODE"] = mode
        return env

    def dashboard(self) -> str:
        """The URL of the cluster's dashboard, as ``serve deploy -a`` takes it.

        Raises:
            UserError: the cluster does not answer within 5 s.
        """
        head.refuse_gone(self.address, self.given_by)

        def ask() -> str:
            from ray.dashboard import utils

            if self.address.startswith("ray://"):
                return str(utils.ray_client_address_to_api_server_url(self.address))
            return str(utils.ray_address_to_api_server_url(self.address))

        return self._within(_PATIENCE_S, ask)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be a driver of the cluster.

        Raises:
            UserError: the cluster does not answer within 5 s.
        """
        head.refuse_gone(self.address, self.given_by)
        if not self.address.startswith("ray://"):
            self._within(_PATIENCE_S, self._ask_gcs)
        import ray

        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise head.silent(self.address, self.given_by, first_line(error)) from None
        try:
            yield
        finally:
            ray.shutdown()

    def _ask_gcs(self) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

        GcsClient(address=self.address)  # it asks for the cluster's id

    def serve(self) -> Any:
        """Ray's client for the Serve part of the dashboard (``ServeSubmissionClient``).

        Raises:
            UserError: the cluster does not answer, or does not take our token.
        """
        url = self.dashboard()

        def connect() -> Any:
            from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

            return ServeSubmissionClient(url)

        return self._within(_PATIENCE_S, connect)

    def _within(self, seconds: float, ask: Callable[[], _T]) -> _T:
        """Run ``ask`` with this cluster's variables; Ray's own limits are minutes."""
        # For this process to its end: Ray reads them when it is imported.
        os.environ.update({k: v for k, v in self.environment().items() if k != "RAY_ADDRESS"})
        said: list[_T] = []
        problems: list[BaseException] = []

        def run() -> None:
            try:
                said.append(ask())
            except BaseException as error:
                problems.append(error)

        # Ray is imported before the clock starts: on a slow machine that alone takes seconds.
        import ray.dashboard.modules.serve.sdk
        import ray.dashboard.utils

        thread = threading.Thread(target=run, name="ask-ray", daemon=True)
        thread.start()
        thread.join(seconds)
        if said:
            return said[0]
        if problems and isinstance(problems[0], ray.exceptions.AuthenticationError):
            raise UserError(
                f"the Ray cluster at {self.address} ({self.given_by}) asks for a token that this "
                "user does not have; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it"
            )
        why = first_line(problems[0]) if problems else f"no answer in {seconds:.0f} s"
        raise head.silent(self.address, self.given_by, why)

    def _host(self) -> str:
        found = addresses.split(self.address.rpartition("://")[2])
        return found[0] if found else ""

    def _is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self._host()).is_loopback
        except ValueError:
            return self._host() == "localhost"

    def _is_here(self) -> bool:
        """Whether the cluster's head is this machine: no other one gets this user's token."""
        return self._is_loopback() or addresses.is_here(self._host())


def by_environment() -> Connection | None:
    """The cluster that RAY_ADDRESS names; None where it leaves the choice to whoever asks."""
    given = os.environ.get("RAY_ADDRESS", "").strip()
    return None if given in ("", "auto", "local") else Connection(given, "RAY_ADDRESS")


def at_hand() -> Connection | None:
    """The cluster of RAY_ADDRESS, of this machine's ``ray start``, or the one that runs here.

    Raises:
        UserError: several run here.
    """
    if named := by_environment():
        return named
    if recorded := head.recorded_address():
        found = Connection(recorded, head.RECORDED)
        with suppress(UserError):  # the record outlives its cluster
            head.refuse_gone(found.address, found.given_by)
            return found
    running = sorted(_running())
    if len(running) > 1:
        raise UserError(
            f"{len(running)} Ray clusters run here ({', '.join(running)}); name one by RAY_ADDRESS"
        )
    return Connection(running[0], "found among the processes") if running else None


def _running() -> set[str]:
    """The GCS of each raylet of this user. Ray has such a function, but must not be imported before
    the variables of :meth:`Connection.environment` are set."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or entry.stat().st_uid != os.getuid():
                continue
            first, *rest = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # gone, or not ours to read
        if Path(first).name == "raylet":
            # It also has whole commands for its workers as arguments, which name the address again.
            flag = "--gcs-address="
            found |= {one.removeprefix(flag) for one in rest if one.startswith(flag)}
    return found


def token() -> str | None:
    """This user's token, from where Ray looks for it; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        return (Path(path) if path else Path.home() / ".ray" / "auth_token").read_text().strip()
    except (OSError, RuntimeError):
        return None
