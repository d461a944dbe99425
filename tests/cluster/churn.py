"""Random changes of all kinds, by several threads, each on objects of its own, whatever happens to the API server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.cluster import objects
from tests.cluster.api import MERGE_PATCH, Api, path_of
from tests.cluster.changes import BACKGROUND, instance

THREADS = 4
NAMES = {"pods": 500, "nodes": 25, "namespaces": 20, "replicasets": 60, "jobs": 40}
"""Names of each kind that a thread draws from: most come back under the same name."""
SHARES = {"pods": 70, "nodes": 8, "namespaces": 6, "replicasets": 9, "jobs": 7}
AGAIN_SECS = 0.05
PAUSE_SECS_MAX = 0.01
"""After each change, so that a restart falls among many of them."""
PATIENCE_SECS = 60.0
_AWAY = frozenset({401, 403, 429, 500, 503, 504})
"""What an API server says while it starts or ends."""
_CREATED, _CONFLICT, _MISSING, _ERRORS = 201, 409, 404, 400


class Churn:
    """Threads at work until so many changes are made."""

    def __init__(self, api: Api, namespace: str, rng: random.Random, operations: int) -> None:
        self._operations = operations
        self._taken = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()
        """Changes that were made: verb and kind."""
        self._hands = [
            Hand(self, api, namespace, number, random.Random(rng.getrandbits(64)))
            for number in range(THREADS)
        ]

    @property
    def done(self) -> int:
        with self._lock:
            return sum(self.counts.values())

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(THREADS) as threads:
            self._futures = [loop.run_in_executor(threads, hand.run) for hand in self._hands]
            try:
                yield
                await asyncio.gather(*self._futures)
            finally:
                self._stop.set()
                await asyncio.gather(*self._futures, return_exceptions=True)

    async def reached(self, share: float) -> None:
        """Wait until this share of the changes is made."""
        while self.done < share * self._operations:
            for future in self._futures:
                if future.done():
                    future.result()
            await asyncio.sleep(0.02)

    def take(self) -> bool:
        """Whether there is one more to make."""
        with self._lock:
            self._taken += 1
            return self._taken <= self._operations and not self._stop.is_set()

    def made(self, verb: str, kind: str) -> None:
        with self._lock:
            self.counts[f"{verb} {kind}"] += 1

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()


class Hand:
    """One thread: what it thinks exists, and what it does next."""

    def __init__(self, churn: Churn, api: Api, namespace: str, number: int, rng: random.Random) -> None:
        self._churn, self._api, self._rng, self._number = churn, api, rng, number
        self._namespace = namespace
        self._there: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in NAMES}
        self._addresses = [f"10.{20 + number}.{third}.{last}" for third in range(4) for last in range(250)]
        self._node_addresses = [f"10.{40 + number}.0.{last}" for last in range(250)]
        rng.shuffle(self._addresses)

    def run(self) -> None:
        while self._churn.take():
            (kind,) = self._rng.choices(list(SHARES), list(SHARES.values()))
            there = self._there[kind]
            name = self._name(kind)
            if name not in there:
                verb = "create"
            elif kind == "pods" and not there[name]["ids"]:
                verb = "update"  # without a status it is of little use
            else:
                verb = self._rng.choices(["update", "delete"], [6, 4])[0]
            getattr(self, f"_{verb}")(kind, name)
            self._churn.made(verb, kind)
            time.sleep(self._rng.uniform(0, PAUSE_SECS_MAX))

    def _name(self, kind: str) -> str:
        """Of what is there, or any."""
        there = self._there[kind]
        if there and self._rng.random() < 0.5:
            return self._rng.choice(list(there))
        prefix = f"{self._namespace}-" if kind in {"nodes", "namespaces"} else ""
        return f"{prefix}random-{self._number}-{self._rng.randrange(NAMES[kind])}"

    # ---- changes ------------------------------------------------------------------------------------

    def _create(self, kind: str, name: str) -> None:
        known: dict[str, Any] = {}
        if kind == "pods":
            node = self._rng.choice([*self._there["nodes"], "unknown", ""])
            known = {"ids": {}, "ip": "", "ended": False, "leaving": False, "node": node}
            body = objects.pod(name, node=node, labels=self._labels(), owner=self._owner())
            body["spec"]["containers"] = [dict(body["spec"]["containers"][0], name=f"c{n}") for n in range(2)]
        elif kind == "nodes":
            known = {"ip": self._node_addresses.pop()}
            body = objects.node(name, instance(self._rng.getrandbits(60)), labels=objects.ec2_labels())
            del body["status"]
        elif kind == "namespaces":
            body = {"metadata": {"name": name, "labels": self._labels()}}
        elif kind == "replicasets":
            body = objects.workload(name, owner=self._owner())
        else:
            body = objects.job(name, owner=self._owner())
        self._send("POST", path_of(kind, self._place(kind)), body, also={_CONFLICT})
        self._there[kind][name] = known

    def _update(self, kind: str, name: str) -> None:
        known = self._there[kind][name]
        if kind == "pods" and not known["leaving"] and (not known["ids"] or self._rng.random() < 0.7):
            self._patch(kind, name, {"status": self._status(known)}, "status")
        elif kind == "nodes" and self._rng.random() < 0.5:
            self._node_addresses.insert(0, known["ip"])
            known["ip"] = self._node_addresses.pop()
            status = objects.node(name, addresses=[known["ip"]])["status"]
            self._patch(kind, name, {"status": status}, "status")
        elif kind in {"replicasets", "jobs"} and self._rng.random() < 0.5:
            self._patch(kind, name, {"metadata": self._owner() or {"ownerReferences": None}})
        else:
            self._patch(kind, name, {"metadata": {"labels": self._labels()}})

    def _delete(self, kind: str, name: str) -> None:
        known = self._there[kind][name]
        if (
            kind == "pods"
            and known["node"]
            and not known["ended"] | known["leaving"]
            and self._rng.random() < 0.2
        ):
            # It stays, marked, until it is deleted once more; what is on no node, or has ended, goes at once.
            self._send("DELETE", self._path(kind, name), {"gracePeriodSeconds": 30}, also={_MISSING})
            known["leaving"] = True
            return
        also = {_MISSING, _CONFLICT} if kind == "namespaces" else {_MISSING}
        self._send("DELETE", self._path(kind, name), BACKGROUND, also=also)
        if kind == "namespaces":
            body = {"metadata": {"name": name}, "spec": {"finalizers": []}}
            self._send("PUT", path_of(kind, "", name, "finalize"), body, also={_MISSING, _CONFLICT})
        if kind == "pods" and known["ip"] and not known["ended"]:
            self._addresses.insert(0, known["ip"])
        if kind == "nodes":
            self._node_addresses.insert(0, known["ip"])
        del self._there[kind][name]

    def _status(self, known: dict[str, Any]) -> dict[str, Any]:
        """The pod starts, moves to another address, restarts a container, or ends."""
        change = self._rng.choice(["start"] if not known["ids"] else ["address", "restart", "restart", "end"])
        previous: Mapping[str, str] = {}
        if known["ended"]:
            return {"message": str(self._rng.getrandbits(32))}
        if change == "start":
            known["ids"] = {f"c{number}": f"{self._rng.getrandbits(256):064x}" for number in range(2)}
        if change in {"start", "address"}:
            if known["ip"]:
                self._addresses.insert(0, known["ip"])
            known["ip"] = self._addresses.pop()
        if change == "restart":
            previous = {"c0": known["ids"]["c0"]}
            known["ids"] = known["ids"] | {"c0": f"{self._rng.getrandbits(256):064x}"}
        status = objects.running(known["ip"], known["ids"], previous=previous)
        if change == "end":
            known["ended"] = True
            self._addresses.insert(0, known["ip"])
            status["phase"] = self._rng.choice(["Succeeded", "Failed"])
        return status

    def _labels(self) -> dict[str, str]:
        return {"app": f"app-{self._rng.randrange(9)}", "step": str(self._rng.getrandbits(32)), "other": "no"}

    def _owner(self) -> dict[str, Any]:
        kind = self._rng.choice(["ReplicaSet", "Job", "DaemonSet", ""])
        number = str(self._rng.randrange(1000))
        return objects.owned_by(kind, f"owner-{number}", number) if kind else {}

    # ---- calls --------------------------------------------------------------------------------------

    def _place(self, kind: str) -> str:
        return "" if kind in {"nodes", "namespaces"} else self._namespace

    def _path(self, kind: str, name: str, subresource: str = "") -> str:
        return path_of(kind, self._place(kind), name, subresource)

    def _patch(self, kind: str, name: str, body: Mapping[str, Any], subresource: str = "") -> None:
        self._send("PATCH", self._path(kind, name, subresource), body)

    def _send(
        self, method: str, path: str, body: Mapping[str, Any], also: set[int] | frozenset[int] = frozenset()
    ) -> None:
        """Until the server took it. A first try may have been taken unseen: then ``also`` has its refusals."""
        content_type = MERGE_PATCH if method == "PATCH" else "application/json"
        given_up = time.monotonic() + PATIENCE_SECS
        while time.monotonic() < given_up and not self._churn.stopped:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answer = self._api.request(method, path, body, content_type=content_type)
                if answer.status < _ERRORS or answer.status in also:
                    return
                if answer.status not in _AWAY:
                    raise AssertionError(f"{method} {path}: {answer.status} {answer.body!r}")
            time.sleep(AGAIN_SECS)
        raise AssertionError(f"{method} {path}: given up")
