"""A W&B server on this host, for the real wandb-core: what it needs of GraphQL, and file streams.

It keeps what arrives, and can fail in four ways. It knows only the requests that wandb 0.31 makes;
another request is answered with an error and recorded in `unknown`. A real server also checks,
indexes and shows what it gets; nothing here stands for that.

    with FakeWandb() as server:
        monkeypatch.setenv(...) for name, value in server.environment.items()
        ...                                   # run a tracker, in this process or another
        server.runs["run1-grpo-aks"].steps()  # each history line that arrived: step -> values
        server.fault = "hang"                 # accepts, and never answers
        server.fault = "error"                # answers 500
        server.stop(); server.start()         # refuses connections; is back on the same port
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["hang", "error"]

HISTORY = "wandb-history.jsonl"
SUMMARY = "wandb-summary.json"


@dataclass
class FakeArtifact:
    """An artifact: what the client sent to create it."""

    id: str
    name: str
    kind: str
    run: str
    digest: str
    client_id: str
    metadata: dict[str, Any]
    aliases: list[str]
    committed: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)


@dataclass
class FakeRun:
    """A run: the last value of each property, and all that was streamed."""

    name: str
    entity: str
    project: str
    group: str | None = None
    job_type: str | None = None
    display_name: str | None = None
    notes: str | None = None
    sweep: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    """Lines of the history, by their offsets."""

    arrived: list[str] = field(default_factory=list)
    """Lines of the history in the order in which they arrived, repeated ones included."""

    events: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    """Ids of the artifacts that the run used."""

    exit_code: int | None = None
    sessions: int = 1
    """Number of times that a client started or resumed the run."""

    def lines(self) -> list[dict[str, Any]]:
        """Return the history's lines, oldest first."""
        return [json.loads(line) for line in self.history]

    def steps(self) -> dict[int, dict[str, Any]]:
        """Return step -> values; each step must have arrived once."""
        steps: dict[int, dict[str, Any]] = {}
        for line in self.lines():
            assert line["_step"] not in steps, f"step {line['_step']} arrived twice"
            steps[line["_step"]] = line
        return steps


class FakeWandb:
    """The server. Its attributes may be read and set while it serves."""

    entity = "someone"

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.artifacts: dict[str, FakeArtifact] = {}
        self.files: dict[str, bytes] = {}
        """Path within the server -> the uploaded bytes."""

        self.requests: list[str] = []
        """GraphQL operations and paths, in the order in which they arrived."""

        self.unknown: list[str] = []
        self.views: list[dict[str, Any]] = []
        self.fault: Fault | None = None
        self.only: str | None = None
        """Pattern of requests that `fault` concerns; None: all."""

        self._lock = threading.RLock()
        self._port = 0
        self._server: _Listener | None = None

    def __enter__(self) -> FakeWandb:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before."""
        handler = type("Handler", (_Handler,), {"wandb": self})
        self._server = _Listener(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and cut those that are open."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            for connection in self._server.connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._server = None

    @property
    def url(self) -> str:
        """Base URL, also before `start` if the server has run."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send a client here."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": "0123456789" * 4,
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    # What follows runs in the handlers' threads.

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of a POST or PUT request."""
        with self._lock:
            if path == "/graphql":
                request = json.loads(body)
                query, variables = request["query"], request.get("variables") or {}
                operation = _operation(query)
                self.requests.append(operation)
                resolve = getattr(self, f"_{_snake(operation)}", None)
                if resolve is None:
                    self.unknown.append(f"{operation} {json.dumps(variables)[:2000]} {query}")
                    message = f"the fake server does not know {operation}"
                    return 200, {"errors": [{"message": message}]}
                return 200, {"data": resolve(variables)}
            self.requests.append(path)
            stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
            if stream:
                self._stream(self.runs[stream[3]], json.loads(body))
                return 200, {"exitcode": None, "limits": {}}
            if path.startswith("/storage/"):
                self.files[path.removeprefix("/storage/")] = body
                return 200, {}
            self.unknown.append(path)
            return 404, {}

    def _stream(self, run: FakeRun, request: dict[str, Any]) -> None:
        for name, chunk in (request.get("files") or {}).items():
            lines, offset = chunk["content"], chunk["offset"]
            if name == HISTORY:
                assert offset <= len(run.history), f"a gap before line {offset} of {run.name}"
                run.history[offset : offset + len(lines)] = lines
                run.arrived += lines
            elif name == SUMMARY:
                run.summary = json.loads(lines[-1])
            else:
                run.events += lines
        if request.get("complete"):
            run.exit_code = request.get("exitcode")

    def _viewer(self, _: Any) -> Any:
        teams = {"edges": [{"node": {"name": self.entity}}]}
        return {
            "viewer": {
                "id": "VXNlcjox",
                "entity": self.entity,
                "username": self.entity,
                "email": "someone@example.org",
                "flags": "{}",
                "teams": teams,
                "apiKeys": {"edges": []},
            }
        }

    def _get_default_entity(self, _: Any) -> Any:
        return {"viewer": {"id": "VXNlcjox", "entity": self.entity}}

    def _upsert_view2(self, v: Any) -> Any:
        self.views.append(v | {"spec": json.loads(v["spec"])})
        return {"upsertView": {"view": {"id": "V-1", "name": v["name"]}, "inserted": True}}

    def _server_features_query(self, _: Any) -> Any:
        return {"serverInfo": {"features": []}}

    def _organization_core_weave_organization_id(self, _: Any) -> Any:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _project(self, name: str) -> dict[str, Any]:
        return {"id": f"P-{name}", "name": name, "entity": {"id": "E-1", "name": self.entity}}

    def _run_resume_status(self, v: Any) -> Any:
        run = self.runs.get(v["name"])
        bucket = None
        if run is not None:
            run.sessions += 1
            telemetry = run.config.get("_wandb", {}).get("value", {}).get("t")
            bucket = {
                "id": f"R-{run.name}",
                "name": run.name,
                "summaryMetrics": json.dumps(run.summary),
                "displayName": run.display_name,
                "logLineCount": 0,
                "historyLineCount": len(run.history),
                "eventsLineCount": len(run.events),
                "historyTail": json.dumps(run.history[-1:]),
                "eventsTail": json.dumps(run.events[-1:]),
                "config": json.dumps(run.config),
                "tags": run.tags,
                "notes": run.notes,
                "wandbConfig": json.dumps({"t": telemetry} if telemetry else {}),
            }
        return {"model": {**self._project(v["project"]), "bucket": bucket}}

    def _upsert_bucket(self, v: Any) -> Any:
        name = v.get("name") or (v["id"] or "").removeprefix("R-")
        inserted = name not in self.runs
        run = self.runs.setdefault(
            name, FakeRun(name, v.get("entity") or self.entity, v.get("project") or "")
        )
        fields = {
            "group": "groupName",
            "job_type": "jobType",
            "display_name": "displayName",
            "notes": "notes",
            "sweep": "sweep",
            "tags": "tags",
        }
        for attribute, key in fields.items():
            if v.get(key) is not None:
                setattr(run, attribute, v[key])
        if v.get("config"):
            run.config = json.loads(v["config"])
        if v.get("summaryMetrics"):
            run.summary = json.loads(v["summaryMetrics"])
        bucket = {
            "id": f"R-{name}",
            "name": name,
            "displayName": run.display_name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": run.sweep,
            "project": self._project(run.project),
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _notify_scriptable_run_alert(self, v: Any) -> Any:
        self.runs[v["runName"]].alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _run_history_keys(self, v: Any) -> Any:
        run = self.runs.get(v["name"])
        if run is None:
            return {"project": None}
        keys = {"lastStep": max((line["_step"] for line in run.lines()), default=-1)}
        return {"project": {"run": {"historyKeys": keys}}}

    def _artifact_type(self, v: Any) -> Any:
        name = v["name"].partition(":")[0]
        kinds = [a.kind for a in self.artifacts.values() if a.name == name]
        artifact = {"artifactType": {"name": kinds[-1]}} if kinds else None
        return {"project": {"artifact": artifact}}

    def _xx_hash_digests_enabled(self, _: Any) -> Any:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _create_artifact(self, v: Any) -> Any:
        given = v["input"]
        name, digest = given["artifactCollectionName"], given["digest"]
        artifact = next(
            (a for a in self.artifacts.values() if (a.name, a.digest) == (name, digest)), None
        )
        if artifact is None:
            artifact = FakeArtifact(
                id=f"A-{len(self.artifacts)}",
                name=name,
                kind=given["artifactTypeName"],
                run=given["runName"],
                digest=digest,
                client_id=given["clientID"],
                metadata=json.loads(given["metadata"] or "{}"),
                aliases=[a["alias"] for a in given["aliases"]],
            )
            self.artifacts[artifact.id] = artifact
        committed = [a.id for a in self.artifacts.values() if a.name == name and a.committed]
        latest = {"id": committed[-1]} if committed else None
        answer = {
            "id": artifact.id,
            "state": "COMMITTED" if artifact.committed else "PENDING",
            "artifactSequence": {"latestArtifact": latest},
        }
        return {"createArtifact": {"artifact": answer}}

    def _create_artifact_manifest(self, v: Any) -> Any:
        url = f"{self.url}/storage/manifests/{v['artifactID']}.json"
        file = {"id": "F", "uploadUrl": url, "uploadHeaders": []}
        return {
            "createArtifactManifest": {
                "artifactManifest": {"id": f"M-{v['artifactID']}", "file": file}
            }
        }

    def _update_artifact_manifest(self, v: Any) -> Any:
        artifact = v["artifactManifestID"].removeprefix("M-")
        answer = self._create_artifact_manifest({"artifactID": artifact})
        return {"updateArtifactManifest": answer["createArtifactManifest"]}

    def _create_artifact_files(self, v: Any) -> Any:
        edges = [
            {
                "node": {
                    "storagePath": f"{file['artifactID']}/{file['name']}",
                    "uploadUrl": f"{self.url}/storage/{file['artifactID']}/{file['name']}",
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "artifact": {"id": file["artifactID"]},
                }
            }
            for file in v["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _commit_artifact(self, v: Any) -> Any:
        artifact = self.artifacts[v["artifactID"]]
        artifact.committed = True
        artifact.manifest = json.loads(self.files[f"manifests/{artifact.id}.json"])
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _use_artifact(self, v: Any) -> Any:
        given = v["input"]
        self.runs[given["runName"]].used.append(given["artifactID"])
        return {"useArtifact": {"artifact": {"id": given["artifactID"]}}}

    def _client_id_mapping(self, v: Any) -> Any:
        ids = [a.id for a in self.artifacts.values() if a.client_id == v["clientID"]]
        return {"clientIDMapping": {"serverID": ids[0]} if ids else None}

    def _artifact_by_id(self, v: Any) -> Any:
        artifact = self.artifacts[v["id"]]
        project = {"internalId": "1", **self._project("fake")}
        collection = {
            "__typename": "ArtifactSequence",
            "name": artifact.name,
            "project": project,
        }
        alias = {"__typename": "ArtifactAlias", "id": "L", "alias": "latest"}
        now = "2026-01-01T00:00:00Z"
        return {
            "artifact": {
                "__typename": "Artifact",
                "id": artifact.id,
                "artifactSequence": collection,
                "versionIndex": 0,
                "artifactType": {"name": artifact.kind},
                "description": None,
                "metadata": json.dumps(artifact.metadata),
                "ttlDurationSeconds": 0,
                "ttlIsInherited": True,
                "tags": [],
                "historyStep": None,
                "state": "COMMITTED",
                "size": 0,
                "digest": artifact.digest,
                "commitHash": artifact.digest[:20],
                "fileCount": len(artifact.manifest.get("contents", {})),
                "createdAt": now,
                "updatedAt": now,
                "aliases": [alias | {"artifactCollection": collection}],
            }
        }

    def _create_run_files(self, v: Any) -> Any:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/storage/{v['run']}/{name}"}
            for name in v["files"]
        ]
        answer = {"runID": f"R-{v['run']}", "uploadHeaders": [], "files": files}
        return {"createRunFiles": answer}


def _operation(query: str) -> str:
    match = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return match[1] if match else query[:40]


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *arguments: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    wandb: FakeWandb
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.headers.get("Transfer-Encoding") == "chunked":
            raise AssertionError("chunked request")
        server = self.wandb
        label = self.path + (
            _operation(json.loads(body)["query"]) if self.path == "/graphql" else ""
        )
        if server.fault and (server.only is None or re.search(server.only, label)):
            while server.fault == "hang":
                time.sleep(0.05)
            if server.fault == "error":
                return self._send(500, {"error": "planted"})
        self._send(*server.answer(self.path, body))

    def _send(self, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True  # the client has gone

    def log_message(self, *_: Any) -> None:
        pass
