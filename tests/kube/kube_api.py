"""A stand-in for a Kubernetes API server, over real HTTP on the loopback.

No cluster can run on the machines that run these tests, so this imitates what deploying meets:
bearer tokens, RBAC, discovery, plain 404 for unknown kinds against Status for missing objects,
generations and resourceVersions, server-side apply, updates and patches, with the ownership of
fields and conflicts, the status sub-resource, dry run, strict field validation and defaults from
the real CRD, finalizers, owners' garbage, watches that end and expire, logs and the Service proxy.
Real kubectl is run against it in test_deploy.py, which is what keeps it honest. What it has not:
admission, strategic merge patches, structural merge of keyed lists (every list is atomic, as the
RayService CRD has it).

Kubernetes' own controllers are in controllers.py, KubeRay's operator is in operator_model.
"""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path as FilePath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from patches import Unprocessable, json_patch, merge_patch, selects

from serve_app.kuberay.validate import schema

_START = datetime(2026, 11, 23, 10)

Document = dict[str, Any]
Path = tuple[str, ...]
"""Of a field: its keys from the top."""

Owner = tuple[str, str]
"""A field manager, and the operation by which it came to own a field: ``Apply`` or ``Update``."""


class Right(NamedTuple):
    """What RBAC grants, or a request takes: a verb on a resource, such as ``pods/log``."""

    verb: str
    group: str
    resource: str
    namespace: str
    """Empty at the scope of the cluster."""


# group/version -> plural -> (kind, namespaced)
RESOURCES: dict[str, dict[str, tuple[str, bool]]] = {
    "v1": {
        "namespaces": ("Namespace", False),
        "nodes": ("Node", False),
        "pods": ("Pod", True),
        "events": ("Event", True),
        "services": ("Service", True),
        "serviceaccounts": ("ServiceAccount", True),
        "persistentvolumeclaims": ("PersistentVolumeClaim", True),
        "secrets": ("Secret", True),
    },
    "discovery.k8s.io/v1": {"endpointslices": ("EndpointSlice", True)},
    "apps/v1": {"controllerrevisions": ("ControllerRevision", True)},
    "networking.k8s.io/v1": {
        "networkpolicies": ("NetworkPolicy", True),
        "ingresses": ("Ingress", True),
    },
    "policy/v1": {"poddisruptionbudgets": ("PodDisruptionBudget", True)},
    "ray.io/v1": {"rayservices": ("RayService", True), "rayclusters": ("RayCluster", True)},
    "karpenter.sh/v1": {"nodepools": ("NodePool", False)},
}


class KubeAPI:
    """The server's state, and what tests may do to it."""

    def __init__(self, crd: Document | None = None) -> None:
        self.resources = copy.deepcopy(RESOURCES)
        self.objects: dict[tuple[str, str, str], Document] = {}
        self.owners: dict[tuple[str, str, str], dict[Path, set[Owner]]] = {}
        self.forbidden: set[tuple[str, str]] = set()  # (verb, plural)
        self.granted: set[Right] | None = None  # all that is allowed; None allows everything
        self.used: set[Right] = set()
        self.refused: set[Right] = set()  # of those that `granted` has not
        self.token: str | None = "let-me-in"  # None lets anyone in
        self.logs: dict[tuple[str, str], list[str]] = {}  # (pod, container) -> lines
        self.proxy: Callable[[str, str, str, Any], tuple[int, str]] | None = None
        self.requests: list[tuple[str, str]] = []
        self.delay_s = 0.0
        self.away_until = 0.0  # by time.monotonic: until then connections are closed unanswered
        self.expired_below = 0
        self.crd = crd
        self._version = 100
        self._history: list[tuple[int, str, Document]] = []
        self.lock = threading.RLock()
        """Held over each write: a client's request, a controller's look and what follows of it."""
        self._changed = threading.Condition(self.lock)
        api = self

        class Handler(_Handler):
            kube = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(
        self, path: FilePath, *, server: str | None = None, token: str | None = None
    ) -> FilePath:
        """Write a kubeconfig for this server."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": server or self.url}}],
            "users": [{"name": "me", "user": {"token": token or self.token}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # --- objects ---

    def get(self, plural: str, namespace: str, name: str) -> Document | None:
        return self.objects.get((plural, namespace, name))

    def all(self, plural: str, namespace: str | None = None) -> list[Document]:
        """The objects of a kind, in one namespace or in all."""
        with self.lock:
            return [
                document
                for (kind, space, _), document in self.objects.items()
                if kind == plural and namespace in (None, space)
            ]

    def store(self, plural: str, document: Document, manager: str = "operator") -> Document:
        """Put an object there as another client would, and tell the watches."""
        namespace = document["metadata"].get("namespace", "")
        key = (plural, namespace, document["metadata"]["name"])
        with self._changed:
            old = self.objects.get(key)
            self._version += 1
            metadata = document["metadata"]
            metadata["resourceVersion"] = str(self._version)
            metadata.setdefault("uid", f"uid-{self._version}")
            made = _START + timedelta(seconds=self._version)  # no two at the same time
            metadata.setdefault("creationTimestamp", f"{made:%Y-%m-%dT%H:%M:%SZ}")
            generation = int((old or {}).get("metadata", {}).get("generation", 0))
            if old is None or old.get("spec") != document.get("spec"):
                generation += 1
            metadata["generation"] = generation
            self.objects[key] = document
            if old is None:
                self.owners[key] = {path: {(manager, "Update")} for path in _fields(document)}
            kind = "MODIFIED" if old else "ADDED"
            self._history.append((self._version, kind, copy.deepcopy(document)))
            self._changed.notify_all()
        return document

    def change(self, plural: str, namespace: str, name: str, **changes: Any) -> Document:
        """Replace top-level parts of an object (``status=…``), as a controller does."""
        with self.lock:
            document = copy.deepcopy(self.objects[(plural, namespace, name)])
            document.update(changes)
            return self.store(plural, document)

    def remove(self, plural: str, namespace: str, name: str) -> Document | None:
        """Take an object away at once, and then what it owned (the garbage collector)."""
        with self._changed:
            document = self.objects.pop((plural, namespace, name), None)
            if document is None:
                return None
            self._version += 1
            self._history.append((self._version, "DELETED", document))
            self._changed.notify_all()
            uid = document["metadata"]["uid"]
            for key, other in list(self.objects.items()):
                owners = other["metadata"].get("ownerReferences") or []
                if any(owner.get("uid") == uid for owner in owners):
                    self.delete(*key)
        return document

    def delete(self, plural: str, namespace: str, name: str) -> Document | None:
        """Delete as the API does: with finalizers, or a pod that runs, it is only marked so."""
        with self.lock:
            document = self.objects.get((plural, namespace, name))
            if document is None:
                return None
            running = plural == "pods" and document.get("status", {}).get("phase") == "Running"
            if not running and not document["metadata"].get("finalizers"):
                return self.remove(plural, namespace, name)
            if "deletionTimestamp" not in document["metadata"]:
                document = copy.deepcopy(document)
                document["metadata"]["deletionTimestamp"] = "2026-11-26T10:00:00Z"
                self.store(plural, document)
            return document

    def update(self, plural: str, document: Document, manager: str) -> Document:
        """Write a whole object, as `kubectl edit` and controllers do.

        Who updates becomes the only owner of each field that it changed, and of no other.
        """
        key = (plural, document["metadata"].get("namespace", ""), document["metadata"]["name"])
        with self.lock:
            before, after = _fields(self.objects[key]), _fields(document)
            owners = {path: who for path, who in self.owners[key].items() if path in after}
            changed = [path for path in after if path not in before or before[path] != after[path]]
            owners |= {path: {(manager, "Update")} for path in changed}
            self.store(plural, document)
            self.owners[key] = owners
            metadata = document["metadata"]
            if "deletionTimestamp" in metadata and not metadata.get("finalizers"):
                self.remove(*key)
        return document

    def replace(
        self, plural: str, old: Document, new: Document, manager: str, *, sub: str, dry_run: bool
    ) -> tuple[int, Document]:
        """A PUT or a patch: the status by its sub-resource only, everything else without it."""
        version = (new.get("metadata") or {}).get("resourceVersion")
        if version not in (None, old["metadata"]["resourceVersion"]):
            name = old["metadata"]["name"]
            return _status(409, "Conflict", f'{plural} "{name}": the object has been modified')
        kept, taken = (old, new) if sub == "status" else (new, old)
        new = copy.deepcopy({**kept, "status": taken.get("status")})
        if new["status"] is None:
            del new["status"]
        same = {**old, "metadata": 0} == {**new, "metadata": 0}
        if dry_run or (same and old["metadata"] == new["metadata"]):
            return 200, new
        return 200, self.update(plural, new, manager)

    def apply(
        self, plural: str, wanted: Document, manager: str, *, force: bool, dry_run: bool
    ) -> tuple[int, Document]:
        """Server-side apply. Returns the HTTP status and the object or a Status."""
        key = (plural, wanted["metadata"].get("namespace", ""), wanted["metadata"]["name"])
        old = self.objects.get(key)
        me: Owner = (manager, "Apply")
        owners = {path: set(who) for path, who in self.owners.get(key, {}).items()}
        mine = _fields(wanted)
        crd = self.crd if plural == "rayservices" else None
        complete = _with_defaults(crd, wanted) if crd else wanted
        conflicts = [
            (path, owner)
            for path in mine
            if _at(old, path) != _at(complete, path)
            for owner in sorted(owners.get(path, set()) - {me})
        ]
        if conflicts and not force:
            return _conflict(wanted["apiVersion"], conflicts)
        for path, owner in conflicts:
            owners[path].discard(owner)
        merged = copy.deepcopy(old) if old else {}
        for path, who in list(owners.items()):
            if me in who and path not in mine:  # we owned it, and want it no more
                who.discard(me)
                if not who:
                    _unset(merged, path)
                    del owners[path]
        _merge(merged, wanted)
        for path in mine:
            owners.setdefault(path, set()).add(me)
        if crd:
            merged = _with_defaults(crd, merged)
        if dry_run:
            return (200 if old else 201), _with_managers(merged, owners)
        if old is None or {**old, "metadata": None} != {**merged, "metadata": None}:
            self.store(plural, merged, manager)
        self.owners[key] = owners
        return (200 if old else 201), _with_managers(self.objects[key], owners)

    def events_since(self, version: int, deadline: float) -> list[tuple[int, str, Document]]:
        """What happened after a version; waits for something until the deadline."""
        with self._changed:
            while True:
                found = [event for event in self._history if event[0] > version]
                left = deadline - time.monotonic()
                if found or left <= 0:
                    return found
                self._changed.wait(left)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms for each answer
    kube: KubeAPI

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        kube = self.kube
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode()
        parts = urlsplit(self.path)
        query = {k: v[-1] for k, v in parse_qs(parts.query).items()}
        kube.requests.append((method, self.path))
        time.sleep(kube.delay_s)
        if time.monotonic() < kube.away_until:
            self.close_connection = True
            return
        given = self.headers.get("Authorization")
        if kube.token is not None and given != f"Bearer {kube.token}":
            self._send(*_status(401, "Unauthorized", "Unauthorized"))
            return
        if self._discovery(parts.path):
            return
        match = re.fullmatch(
            r"/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
            r"(?:/namespaces/(?P<namespace>[^/]+)(?=/[a-z]))?"
            r"/(?P<plural>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>log|proxy|status)(?P<rest>/.*)?)?",
            unquote(parts.path),
        )
        group = match and (match["core"] or match["group"])
        if not match or match["plural"] not in kube.resources.get(str(group), {}):
            self._text(404, "404 page not found\n")
            return
        if lacking := self._lacking(method, match, query):
            self._send(*_status(403, "Forbidden", f'User "me" cannot {" ".join(lacking[:3])}'))
            return
        plural, namespace, name = match["plural"], match["namespace"] or "", match["name"]
        verbs = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}
        verb = verbs.get(method, "get" if name else "list")
        resource = f"{plural}/status" if match["sub"] == "status" else plural
        if (verb, resource) in kube.forbidden or (
            match["sub"] and ("get", match["sub"]) in kube.forbidden
        ):
            where = f' in the namespace "{namespace}"' if namespace else " at the cluster scope"
            message = (
                f'{plural} is forbidden: User "me" cannot {verb} resource "{resource}" in API '
                f'group "{str(group).rpartition("/")[0]}"{where}'
            )
            self._send(*_status(403, "Forbidden", message))
        elif match["sub"] == "log":
            self._log(name, query)
        elif match["sub"] == "proxy":
            self._proxy(method, namespace, name, match["rest"] or "/", body)
        elif method == "GET" and name:
            found = kube.get(plural, namespace, name)
            self._send(*((200, found) if found else _missing(plural, str(group), name)))
        elif method == "GET" and query.get("watch") == "true":
            self._watch(plural, namespace, query)
        elif method == "GET":
            self._list(plural, namespace, str(group), query)
        else:
            with kube.lock:
                answer = self._write(method, plural, namespace, str(group), match, query, body)
            self._send(*answer)

    def _lacking(self, method: str, match: re.Match[str], query: dict[str, str]) -> Right | None:
        """A right that the request takes and that is not granted."""
        kube, plural, name, sub = self.kube, match["plural"], match["name"], match["sub"]
        reads = "get" if name else "watch" if query.get("watch") == "true" else "list"
        verb = {"GET": reads, "POST": "create", "PUT": "update"}.get(method, method.lower())
        # To RBAC a namespace is in itself: a Role in it may grant it.
        namespace = match["namespace"] or (name if plural == "namespaces" else "") or ""
        verbs = [verb]
        if verb == "patch" and kube.get(plural, match["namespace"] or "", name) is None:
            verbs.append("create")  # an apply that makes the object
        group = (match["group"] or "").partition("/")[0]
        resource = f"{plural}/{sub}" if sub else plural
        for right in (Right(verb, group, resource, namespace) for verb in verbs):
            if kube.granted is not None and right not in kube.granted:
                kube.refused.add(right)
                return right
            kube.used.add(right)
        return None

    def _write(
        self, method: str, plural: str, namespace: str, group: str, match: re.Match[str],
        query: dict[str, str], body: str,
    ) -> tuple[int, Document]:  # fmt: skip
        kube, name = self.kube, match["name"]
        namespaced = kube.resources[group][plural][1]
        if namespaced and ("namespaces", "", namespace) not in kube.objects:
            return _missing("namespaces", "v1", namespace)
        old = kube.get(plural, namespace, name or "")
        content_type = self.headers.get("Content-Type", "")
        applied = method == "PATCH" and content_type == "application/apply-patch+yaml"
        if name and not applied and old is None:
            return _missing(plural, group, name)
        dry_run = query.get("dryRun") == "All"
        if method == "DELETE":
            gone = old if dry_run else kube.delete(plural, namespace, name)
            return 200, gone or {}
        if old is not None and method == "PATCH" and not applied:
            try:
                document = _patched(old, yaml.safe_load(body), content_type)
            except Unprocessable as error:
                return _status(422, "Invalid", str(error))
            if document is None:
                return _status(415, "UnsupportedMediaType", f"unsupported: {content_type}")
        else:
            document = yaml.safe_load(body)
        metadata = document.get("metadata") or {}
        if name is not None and metadata.get("name") != name:
            return _status(400, "BadRequest", "the name of the object does not match the URL")
        if refused := self._refuse(plural, document, query):
            return refused
        agent = self.headers.get("User-Agent", "").partition("/")[0]
        manager = query.get("fieldManager") or agent
        if method == "POST":
            if kube.get(plural, namespace, metadata["name"]):
                text = f'{plural} "{metadata["name"]}" already exists'
                return _status(409, "AlreadyExists", text)
            return 201, document if dry_run else kube.store(plural, document, manager)
        if not applied:
            assert old is not None
            sub = match["sub"] or ""
            return kube.replace(plural, old, document, manager, sub=sub, dry_run=dry_run)
        if not query.get("fieldManager"):
            text = "PatchOptions.meta.k8s.io is invalid: fieldManager: Required value"
            return _status(400, "BadRequest", text)
        return kube.apply(
            plural, document, manager, force=query.get("force") == "true", dry_run=dry_run
        )

    def _refuse(
        self, plural: str, document: Document, query: dict[str, str]
    ) -> tuple[int, Document] | None:
        """What the CRD forbids: unknown fields (when asked to be strict), wrong types."""
        if plural != "rayservices" or self.kube.crd is None:
            return None
        found = list(schema.crd_findings(self.kube.crd, document))
        unknown = [path for path, text in found if "is not a field" in text]
        if unknown and query.get("fieldValidation") == "Strict":
            text = ", ".join(f'unknown field "{path}"' for path in unknown)
            return _status(400, "BadRequest", f"strict decoding error: {text}")
        wrong = [f"{path}: {text}" for path, text in found if path not in unknown]
        if wrong:
            name = document["metadata"]["name"]
            return _status(422, "Invalid", f'RayService.ray.io "{name}" is invalid: {wrong[0]}')
        return None

    def _list(self, plural: str, namespace: str, group: str, query: dict[str, str]) -> None:
        items = [
            document
            for document in self.kube.all(plural, namespace or None)
            if selects(query.get("labelSelector", ""), document["metadata"].get("labels") or {})
        ]
        if "." not in group or group.endswith("k8s.io/v1"):  # built in: the list says what it has
            items = [
                {key: value for key, value in item.items() if key not in ("apiVersion", "kind")}
                for item in items
            ]
        kind = self.kube.resources[group][plural][0]
        meta = {"resourceVersion": str(self.kube._version)}
        self._send(
            200, {"kind": f"{kind}List", "apiVersion": group, "metadata": meta, "items": items}
        )

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        kube = self.kube
        since = int(query.get("resourceVersion") or 0)
        name = query.get("fieldSelector", "").removeprefix("metadata.name=")
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 5)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if since < kube.expired_below:
            _, gone = _status(410, "Expired", "too old resource version")
            self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
            self._chunk("")
            return
        while time.monotonic() < deadline:
            if time.monotonic() < kube.away_until:
                self.close_connection = True
                return
            soon = min(deadline, time.monotonic() + 0.1)  # it may go away meanwhile
            for version, kind, document in kube.events_since(since, soon):
                since = version
                metadata = document["metadata"]
                if (metadata.get("namespace", ""), metadata["name"]) == (namespace, name):
                    self._chunk(json.dumps({"type": kind, "object": document}) + "\n")
        bookmark = {"metadata": {"resourceVersion": str(since)}}
        self._chunk(json.dumps({"type": "BOOKMARK", "object": bookmark}) + "\n")
        self._chunk("")

    def _log(self, pod: str, query: dict[str, str]) -> None:
        lines = self.kube.logs.get((pod, query.get("container", "")))
        if query.get("previous") == "true":
            lines = self.kube.logs.get((pod, f"{query.get('container')} previous"))
        if lines is None:
            text = f"container {query.get('container')} is not valid for pod {pod}"
            self._send(*_status(400, "BadRequest", text))
            return
        tail = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        self._text(200, "".join(f"{line}\n" for line in tail))

    def _proxy(self, method: str, namespace: str, service: str, path: str, body: str) -> None:
        if self.kube.proxy is None or not self._has_endpoint(namespace, service):
            text = f'no endpoints available for service "{service}"'
            self._send(*_status(503, "ServiceUnavailable", text))
            return
        self._text(*self.kube.proxy(method, service, path, json.loads(body) if body else None))

    def _has_endpoint(self, namespace: str, service: str) -> bool:
        """Whether a Ready pod has the named port (ResourceLocation of the Service's REST storage).

        A test that has no Service object lets its proxy function decide.
        """
        name, _, port = service.partition(":")
        with self.kube.lock:
            if self.kube.get("services", namespace, name) is None:
                return True
            slices = [
                document
                for document in self.kube.all("endpointslices", namespace)
                if document["metadata"]["labels"]["kubernetes.io/service-name"] == name
            ]
        return any(
            endpoint["conditions"]["ready"]
            for document in slices
            if port in [p["name"] for p in document["ports"] or []]
            for endpoint in document["endpoints"]
        )

    def _discovery(self, path: str) -> bool:
        kube = self.kube
        if path == "/version":
            self._send(200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0"})
        elif path == "/api":
            self._send(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            groups = []
            for group_version in kube.resources:
                group, _, version = group_version.partition("/")
                if version:
                    entry = {"groupVersion": group_version, "version": version}
                    groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
            self._send(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif (group_version := re.sub(r"^/apis?/", "", path)) in kube.resources:
            listed = [
                {
                    "name": plural,
                    "singularName": kind.lower(),
                    "kind": kind,
                    "namespaced": namespaced,
                    "verbs": ["create", "delete", "get", "list", "patch", "update", "watch"],
                }
                for plural, (kind, namespaced) in kube.resources[group_version].items()
            ]
            self._send(
                200,
                {"kind": "APIResourceList", "groupVersion": group_version, "resources": listed},
            )
        else:
            return False
        return True

    def _send(self, code: int, document: Document) -> None:
        self._answer(code, json.dumps(document).encode(), "application/json")

    def _text(self, code: int, text: str) -> None:
        self._answer(code, text.encode(), "text/plain")

    def _answer(self, code: int, data: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunk(self, text: str) -> None:
        data = text.encode()
        try:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        except OSError:  # the client has what it wanted
            self.close_connection = True


def _status(code: int, reason: str, message: str) -> tuple[int, Document]:
    return code, {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": reason,
        "code": code,
    }


def _conflict(version: str, conflicts: list[tuple[Path, Owner]]) -> tuple[int, Document]:
    """A refused apply, in the words of Kubernetes (managedfields/internal/conflict.go)."""
    found: dict[str, list[str]] = {}
    for path, (manager, operation) in conflicts:
        who = f'"{manager}"' + (f" using {version}" if operation == "Update" else "")
        found.setdefault(who, []).append("." + ".".join(path))
    if len(conflicts) == 1:
        text = "".join(f"conflict with {who}: {paths[0]}" for who, paths in found.items())
        code, status = _status(409, "Conflict", f"Apply failed with 1 conflict: {text}")
    else:
        lines = [
            line
            for who, paths in sorted(found.items())
            for line in [f"conflicts with {who}:", *(f"- {path}" for path in paths)]
        ]
        text = "\n".join(lines)
        code, status = _status(
            409, "Conflict", f"Apply failed with {len(conflicts)} conflicts: {text}"
        )
    status["details"] = {
        "causes": [
            {"reason": "FieldManagerConflict", "message": f"conflict with {who}", "field": path}
            for who, paths in found.items()
            for path in paths
        ]
    }
    return code, status


def _patched(old: Document, patch: Any, content_type: str) -> Document | None:
    """The object after a patch; None for a kind of patch that custom resources do not take."""
    if content_type == "application/merge-patch+json":
        return dict(merge_patch(old, patch))
    if content_type == "application/json-patch+json":
        return json_patch(old, patch)
    return None


def _missing(plural: str, group: str, name: str | None) -> tuple[int, Document]:
    resource = plural if group == "v1" else f"{plural}.{group.rpartition('/')[0]}"
    return _status(404, "NotFound", f'{resource} "{name}" not found')


def _with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """A copy of ``value`` with the schema's defaults. The API server fills them in first, too."""
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        filled = {
            key: _with_defaults(properties.get(key) or schema.get("additionalProperties") or {}, v)
            if isinstance(properties.get(key) or schema.get("additionalProperties") or {}, dict)
            else v
            for key, v in value.items()
        }
        for key, sub in properties.items():
            if key not in filled and isinstance(sub, dict) and "default" in sub:
                filled[key] = copy.deepcopy(sub["default"])
        return filled
    if isinstance(value, list):
        items = schema.get("items")
        return [_with_defaults(items if isinstance(items, dict) else {}, item) for item in value]
    return value


def _with_managers(document: Document, owners: dict[Path, set[Owner]]) -> Document:
    """A copy that tells who owns which fields, as the API server tells it."""
    trees: dict[Owner, Document] = {}
    for path, who in owners.items():
        for owner in who:
            at = trees.setdefault(owner, {})
            for key in path:
                at = at.setdefault(f"f:{key}", {})
    entries = [
        {"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": tree}
        for (manager, operation), tree in sorted(trees.items())
    ]
    return {**document, "metadata": {**document["metadata"], "managedFields": entries}}


def _fields(document: Document) -> dict[Path, Any]:
    """The fields that can be owned, with their values: those of the spec."""
    return _leaves({"spec": document["spec"]} if document.get("spec") else {})


def _leaves(value: Any, path: Path = ()) -> dict[Path, Any]:
    """Paths of what has no fields below it; lists are whole, as in this CRD."""
    if isinstance(value, dict) and value:
        found: dict[Path, Any] = {}
        for key, item in value.items():
            found |= _leaves(item, (*path, key))
        return found
    return {path: value} if path else {}


def _at(document: Any, path: Path) -> Any:
    for key in path:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def _unset(document: Any, path: Path) -> None:
    parent = _at(document, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)


def _merge(into: Document, wanted: Document) -> None:
    for key, value in wanted.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)
