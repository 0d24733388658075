"""A client for a cluster's API server, with the few verbs that deploying needs.

It is our own because KubeRay's Python clients do not know RayService. The official ``kubernetes``
package does what is hard to get right: kubeconfig, EKS's exec credentials, in-cluster tokens, TLS.
The requests themselves are plain REST over its connection pool, because server-side apply on custom
kinds needs headers that the generated classes hide.

Every failure becomes a :class:`UserError` of one line that says what to do.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import yaml

from serve_app.errors import UserError, did_you_mean

FIELD_MANAGER = "serve-app"
"""Our name as field manager: the API server records it as owner of each field that we apply."""

OPERATOR = "kuberay-operator"
"""KubeRay's name as field manager. It writes back what it read, and so comes to own whole lists."""

_TIMEOUT_S = 30.0

Document = dict[str, Any]


@dataclass(frozen=True)
class _Kind:
    path: str
    plural: str
    namespaced: bool = True
    provider: str = ""
    """What to install when the API server has no such kind."""


_KUBERAY = "KubeRay's operator (docs/eks.md, step 4)"
_LBC = "the AWS Load Balancer Controller 3.5 or later, with the Gateway API"

KINDS = {
    "Namespace": _Kind("/api/v1", "namespaces", namespaced=False),
    "Node": _Kind("/api/v1", "nodes", namespaced=False),
    "Pod": _Kind("/api/v1", "pods"),
    "Event": _Kind("/api/v1", "events"),
    "Service": _Kind("/api/v1", "services"),
    "ServiceAccount": _Kind("/api/v1", "serviceaccounts"),
    "PersistentVolumeClaim": _Kind("/api/v1", "persistentvolumeclaims"),
    "ControllerRevision": _Kind("/apis/apps/v1", "controllerrevisions"),
    "NetworkPolicy": _Kind("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Ingress": _Kind("/apis/networking.k8s.io/v1", "ingresses"),
    "PodDisruptionBudget": _Kind("/apis/policy/v1", "poddisruptionbudgets"),
    "RayService": _Kind("/apis/ray.io/v1", "rayservices", provider=_KUBERAY),
    "RayCluster": _Kind("/apis/ray.io/v1", "rayclusters", provider=_KUBERAY),
    "NodePool": _Kind("/apis/karpenter.sh/v1", "nodepools", False, "Karpenter"),
    "GatewayClass": _Kind("/apis/gateway.networking.k8s.io/v1", "gatewayclasses", False, _LBC),
    "LoadBalancerConfiguration": _Kind(
        "/apis/gateway.k8s.aws/v1", "loadbalancerconfigurations", provider=_LBC
    ),
    "TargetGroupConfiguration": _Kind(
        "/apis/gateway.k8s.aws/v1", "targetgroupconfigurations", provider=_LBC
    ),
}


class Conflict(UserError):
    """Another field manager owns a field that we would change, or an object has that name."""

    def __init__(self, message: str, owners: set[str]) -> None:
        super().__init__(message)
        self.owners = owners
        """The other field managers, empty where it is about a name."""


class Forbidden(UserError):
    """The credentials are valid, but not allowed to do this."""


class Unreachable(UserError):
    """The API server does not answer."""


class Gone(Exception):
    """The API server no longer has a watch's resourceVersion: list again."""


class APIServer:
    """One API server with one set of credentials."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.host: str = api.configuration.host

    @classmethod
    def connect(cls, kubeconfig: Path | None = None, context: str | None = None) -> APIServer:
        """Connect with the kubeconfig's credentials, or with those of the pod that this runs in.

        Raises:
            UserError: there are none, or the context does not exist.
        """
        import kubernetes
        import urllib3
        from kubernetes.config import ConfigException

        configuration = kubernetes.client.Configuration()
        try:
            if kubeconfig is not None and not kubeconfig.exists():
                raise UserError(f"{kubeconfig}: no such kubeconfig")
            with _said_by_plugin() as said:
                kubernetes.config.load_kube_config(
                    config_file=str(kubeconfig) if kubeconfig else None,
                    context=context,
                    client_configuration=configuration,
                )
            if said:
                raise UserError(
                    f"{kubeconfig or 'kubeconfig'}: its command for credentials failed "
                    f"({_first_line(said[0])}); is it installed (aws --version), and are you "
                    "logged in (aws sso login)?"
                )
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            where = kubeconfig or "kubeconfig"
            raise UserError(f"{where}: cannot be read ({_first_line(str(error))})") from None
        except (ConfigException, TypeError, KeyError, AttributeError, ValueError) as error:
            # Without a kubeconfig this may run in a pod. A wrong context is the user's error.
            if context is not None or kubeconfig is not None:
                known = _contexts(kubeconfig)
                if context is not None and known and context not in known:
                    hint = did_you_mean(context, known) or f" (known: {', '.join(known)})"
                    raise UserError(f"the kubeconfig has no context '{context}'{hint}") from None
                where = kubeconfig or "kubeconfig"
                raise UserError(f"{where}: no kubeconfig ({_first_line(str(error))})") from None
            try:
                kubernetes.config.load_incluster_config(client_configuration=configuration)
            except ConfigException:
                raise UserError(
                    "no kubeconfig and not inside a cluster; run "
                    "aws eks update-kubeconfig --name CLUSTER"
                ) from None
        if not configuration.verify_ssl:
            # The kubeconfig says so (insecure-skip-tls-verify); a warning for each request would
            # only hide our own lines.
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        # No retries below ours: a wrong address must be reported before a minute is over.
        configuration.retries = False
        return cls(kubernetes.client.ApiClient(configuration))

    def require(self, kind: str) -> None:
        """Check that the server has a kind, by discovery: it needs no rights and no namespace.

        Raises:
            UserError: it has not; the error says what to install.
        """
        entry = KINDS[kind]
        status, body = self._send("GET", entry.path)
        group = {} if status == 404 else self._checked("discover", kind, "", status, body)
        if entry.plural not in {resource["name"] for resource in group.get("resources") or []}:
            raise _lacks(kind)

    # --- verbs ---

    def get(self, kind: str, name: str, namespace: str | None = None) -> Document | None:
        """The object, or None where there is none."""
        status, body = self._send("GET", _path(kind, namespace, name))
        if status == 404 and _is_status(body):
            return None
        return self._checked("get", kind, name, status, body)

    def list(
        self, kind: str, namespace: str | None = None, labels: dict[str, str] | None = None
    ) -> list[Document]:
        """Every object of a kind, in one namespace or in all, with these labels.

        Each says its kind, which Kubernetes leaves out of lists of its own kinds.
        """
        query = {"labelSelector": ",".join(f"{k}={v}" for k, v in (labels or {}).items())}
        status, body = self._send("GET", _path(kind, namespace), query if labels else {})
        items = self._checked("list", kind, "", status, body).get("items") or []
        return [{**item, "kind": kind} for item in items if isinstance(item, dict)]

    def apply(self, document: Document, *, dry_run: bool = False, force: bool = False) -> Document:
        """Server-side apply. Returns the object as it then is, or with ``dry_run`` would be.

        What only KubeRay's operator owns is taken over: it decides about no field of ours.

        Raises:
            Conflict: another manager owns a field that differs, and ``force`` is not set.
        """
        try:
            return self._apply(document, dry_run=dry_run, force=force)
        except Conflict as conflict:
            if conflict.owners != {OPERATOR}:
                raise
        return self._apply(document, dry_run=dry_run, force=True)

    def _apply(self, document: Document, *, dry_run: bool, force: bool) -> Document:
        kind, name = document["kind"], document["metadata"]["name"]
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"}
        if force:
            query["force"] = "true"
        if dry_run:
            query["dryRun"] = "All"
        status, body = self._send(
            "PATCH",
            _path(kind, document["metadata"].get("namespace"), name),
            query,
            json.dumps(document),
            "application/apply-patch+yaml",
        )
        return self._checked("apply", kind, name, status, body)

    def patch(
        self,
        kind: str,
        name: str,
        namespace: str,
        change: Document | Sequence[Document],
        *,
        part: str = "",
    ) -> Document:
        """Change single fields: a sequence is a JSON patch (RFC 6902), a mapping a merge patch.

        ``part`` names a sub-resource, such as ``status``.
        """
        form = "json-patch" if isinstance(change, Sequence) else "merge-patch"
        path = _path(kind, namespace, name) + (f"/{part}" if part else "")
        status, body = self._send(
            "PATCH",
            path,
            {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"},
            json.dumps(change),
            f"application/{form}+json",
        )
        return self._checked("patch", f"{kind}/{part}" if part else kind, name, status, body)

    def create(self, document: Document) -> Document:
        """Create an object, whose name must be free."""
        kind, name = document["kind"], document["metadata"]["name"]
        path = _path(kind, document["metadata"].get("namespace"))
        status, body = self._send("POST", path, {}, json.dumps(document), "application/json")
        return self._checked("create", kind, name, status, body)

    def delete(
        self,
        kind: str,
        name: str,
        namespace: str | None = None,
        *,
        dry_run: bool = False,
        foreground: bool = False,
    ) -> None:
        """Delete an object. It is no error if the object does not exist.

        An object with finalizers is there until who set them lets it go. With ``foreground``
        Kubernetes deletes what the object owns first, whatever its operator does.
        """
        query = {"propagationPolicy": "Foreground"} if foreground else {}
        if dry_run:
            query["dryRun"] = "All"
        status, body = self._send("DELETE", _path(kind, namespace, name), query)
        if status != 404:
            self._checked("delete", kind, name, status, body)

    def watch(
        self, kind: str, name: str, namespace: str, *, since: str, timeout_s: float
    ) -> Iterator[Document]:
        """Yield the object at each change after ``since`` (a resourceVersion).

        Ends after ``timeout_s`` seconds, or earlier if the server closes the connection.

        Raises:
            Gone: ``since`` is too old; get the object again.
        """
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": since,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, int(timeout_s))),
        }
        for line in self._lines(_path(kind, namespace), query, timeout_s + 5, kind, name):
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise Gone
            if event["type"] in ("ADDED", "MODIFIED"):
                yield event["object"]
            elif event["type"] == "DELETED":
                raise UserError(f"{kind} {name} was deleted while it was watched")

    def logs(
        self,
        pod: str,
        namespace: str,
        container: str,
        *,
        follow: bool = False,
        previous: bool = False,
        tail: int | None = None,
    ) -> Iterator[str]:
        """Lines of a container's log; with ``follow`` until the container ends."""
        query = {"container": container}
        if follow:
            query["follow"] = "true"
        if previous:
            query["previous"] = "true"
        if tail is not None:
            query["tailLines"] = str(tail)
        path = f"{_path('Pod', namespace, pod)}/log"
        yield from self._lines(path, query, None if follow else 60.0, "Pod", pod)

    def through_service(
        self, service: str, namespace: str, method: str, path: str, body: Any = None
    ) -> tuple[int, str]:
        """Send an HTTP request to a Service through the API server; return status and body.

        The API server gives up after a minute.
        """
        where = f"{_path('Service', namespace, service)}/proxy{path}"
        text = None if body is None else json.dumps(body)
        return self._send(method, where, {}, text, "application/json", timeout_s=65.0)

    # --- below the verbs ---

    def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: str | None = None,
        content_type: str | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> tuple[int, str]:
        response = self._open(method, path, query, body, content_type, timeout_s)
        try:
            return response.status, response.data.decode("utf-8", "replace")
        except Exception as error:
            raise self._unreachable(error) from None
        finally:
            response.release_conn()

    def _open(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        body: str | None,
        content_type: str | None,
        timeout_s: float | None,
    ) -> Any:
        from urllib3.exceptions import HTTPError
        from urllib3.util import Timeout

        headers = {"Accept": "application/json", "User-Agent": "serve-app"}
        if content_type and body is not None:
            headers["Content-Type"] = content_type
        # With an expired token this asks the exec plugin for a new one.
        self._api.update_params_for_auth(
            headers, [], ["BearerToken"], path, method, body, request_auth=None
        )
        url = f"{self.host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            return self._api.rest_client.pool_manager.request(
                method,
                url,
                body=body,
                headers=headers,
                preload_content=False,
                timeout=Timeout(connect=10.0, read=timeout_s),
                retries=False,
            )
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from None

    def _lines(
        self, path: str, query: dict[str, str], timeout_s: float | None, kind: str, name: str
    ) -> Iterator[str]:
        """A streamed answer, line by line."""
        from urllib3.exceptions import HTTPError

        response = self._open("GET", path, query, None, None, timeout_s)
        try:
            if response.status != 200:
                body = response.data.decode("utf-8", "replace")
                if response.status == 410:
                    raise Gone
                self._checked("read", kind, name, response.status, body)
            rest = b""
            for chunk in response.stream(None, decode_content=True):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole if line)
            if rest:
                yield rest.decode("utf-8", "replace")
        except (HTTPError, OSError):
            return  # connection closed: the caller asks again
        finally:
            response.close()

    def _checked(self, verb: str, kind: str, name: str, status: int, body: str) -> Document:
        """The object in an answer; raises the error that the answer reports."""
        if 200 <= status < 300:
            try:
                value = json.loads(body)
            except ValueError:
                raise UserError(f"{self.host} did not answer as an API server does") from None
            return value if isinstance(value, dict) else {}
        what = f"{kind} {name}".strip()
        message = _message(body)
        if status == 401:
            raise UserError(
                "the cluster refuses these credentials (expired?); aws sso login, or "
                "aws eks update-kubeconfig --name CLUSTER"
            )
        if status == 403:
            raise Forbidden(f"not allowed to {verb} {what}: {message}")
        if status == 404 and not _is_status(body):
            raise _lacks(kind)
        if status in (429, 502, 503, 504):
            # So it answers while it starts, or has too much to do.
            raise Unreachable(f"API server {self.host}: {message} (HTTP {status})")
        if status == 409:
            owners = _owners(body)
            hint = " (--force takes it over)" if owners else ""
            raise Conflict(f"{what}: {message}{hint}", owners)
        raise UserError(f"cannot {verb} {what}: {message} (HTTP {status})")

    def _unreachable(self, error: Exception) -> Unreachable:
        text = str(error)
        if "timed out" in text.lower() or "timeout" in type(error).__name__.lower():
            why = "it does not answer in time; is the endpoint private, and the VPN up?"
        elif "CERTIFICATE_VERIFY" in text:
            why = "its certificate is not the kubeconfig's; aws eks update-kubeconfig"
        else:
            why = "it cannot be reached; check the kubeconfig's server and the network"
        return Unreachable(f"API server {self.host}: {why}")


@contextmanager
def _said_by_plugin() -> Iterator[list[str]]:
    """What the package logs meanwhile: it goes on as nobody when a credential plugin fails."""
    said: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)


def _contexts(kubeconfig: Path | None) -> list[str]:
    """The names of the kubeconfig's contexts; empty if it cannot be read."""
    import kubernetes

    try:
        found, _ = kubernetes.config.list_kube_config_contexts(
            str(kubeconfig) if kubeconfig else None
        )
    except Exception:
        return []
    return [str(context["name"]) for context in found]


def _path(kind: str, namespace: str | None, name: str | None = None) -> str:
    if kind not in KINDS:
        raise UserError(f"no way to reach objects of kind {kind}; apply them with kubectl")
    entry = KINDS[kind]
    path = entry.path
    if entry.namespaced and namespace:
        path += f"/namespaces/{quote(namespace)}"
    path += f"/{entry.plural}"
    return f"{path}/{quote(name)}" if name else path


def _lacks(kind: str) -> UserError:
    provider = KINDS[kind.partition("/")[0]].provider or "a newer Kubernetes"
    return UserError(f"this cluster has no kind {kind}; install {provider}")


def _is_status(body: str) -> bool:
    """Whether a body is a Kubernetes ``Status``. The answer for an unknown path is plain text."""
    try:
        return bool(json.loads(body).get("kind") == "Status")
    except (ValueError, AttributeError):
        return False


def _message(body: str) -> str:
    try:
        return _first_line(str(json.loads(body)["message"]))
    except (ValueError, KeyError, TypeError):
        return _first_line(body) or "no reason given"


def _owners(body: str) -> set[str]:
    """The field managers that a refused apply names: ``conflict with "NAME" using VERSION``."""
    try:
        causes = json.loads(body)["details"]["causes"]
        return {str(cause["message"]).split('"')[1] for cause in causes}
    except (ValueError, LookupError, TypeError):
        return set()


def _first_line(text: str) -> str:
    """A server's message on one line, without the part that repeats the verb."""
    return " ".join(text.split())[:600]
