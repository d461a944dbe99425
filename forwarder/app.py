"""The composition root: builds everything from the settings, starts it in order, stops it in reverse.

Start: spool (the promise), AWS clients (slow, so before the listener), admin port, delivery workers, receiver.
Stop: unready and draining, listener closed after its delay, what was read is answered, workers deliver what they
can within ``delivery.drain_secs_max``, clients closed, spool closed. What is left waits on disk for the next start.

The same object runs in production and, on port 0, inside a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import structlog

from forwarder.admin import Admin
from forwarder.aws import Aws
from forwarder.cluster_identity import ClusterIdentity, Surroundings
from forwarder.contract import Service
from forwarder.custom_members import CustomMembers, fields_of, tags_of
from forwarder.delivery import Worker
from forwarder.delivery_findings import FindingsWorker
from forwarder.enricher import Enricher, Enrichment
from forwarder.enrichment import ENRICHERS, enricher_class
from forwarder.enrichment.kubernetes import Kubernetes
from forwarder.ingest import Ingest
from forwarder.metrics import Metrics
from forwarder.receiver import Receiver
from forwarder.receiver_files import ReceiverFiles
from forwarder.record import DeadLetter
from forwarder.rules import RuleBook
from forwarder.rules_reload import RulesReload
from forwarder.sensors import Sensors
from forwarder.sensors_metrics import SensorsCollector
from forwarder.sensors_peers import Peers
from forwarder.sensors_watch import Watch
from forwarder.settings import Settings, enabled_sinks, load_settings
from forwarder.sinks import sink_class
from forwarder.spool import Spool

RESTART_SECS = 1.0
GC_THRESHOLDS = (20_000, 20, 20)
SWITCH_SECS = 0.0005
LAG_PERIOD_SECS = 0.25
LAG_WINDOW_SECS = 10.0
WRITER_SILENCE_SECS_MAX = 30.0

log = structlog.get_logger("app")


class Application:
    """One running forwarder."""

    def __init__(
        self,
        settings: Settings,
        *,
        config: Path | None = None,
        now: Callable[[], float] = time.time,
        now_ns: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        validate: bool = False,
    ) -> None:
        """``config`` is the file whose rules are reloaded; ``validate`` turns the SDK's own parameter check on (tests)."""
        self.settings = settings
        self._config = config
        self._now = now
        self._stack = contextlib.AsyncExitStack()
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._started_at = now()
        self._draining = False
        self._lags: list[tuple[float, float]] = []
        names = enabled_sinks(settings)
        self.metrics = Metrics(names)
        self.files = ReceiverFiles(settings.receiver, self.metrics)
        self.spool = Spool(settings.spool, sinks=names, metrics=self.metrics, now=now)
        self.aws = Aws(settings.aws, validate=validate, now=now)
        self.sinks = [build_sink(name, settings, self.aws, now) for name in names]
        self.enrichers = [
            self._enricher(name, monotonic)
            for name in ENRICHERS
            if getattr(settings.enrichment, name).enabled is not False
        ]
        self.identity = ClusterIdentity(settings.cluster.name, self.aws, self._surroundings())
        self.enrichment = Enrichment(
            self.enrichers,
            cluster=None if settings.cluster.name else self.identity.discovered,
            now=monotonic,
            failed=self.metrics.enrichment["failed"].inc,
            completed=self.metrics.enrichment_completed.inc,
        )
        self.rules = RuleBook(settings.rules, now=now, cluster=settings.cluster.name)
        self.workers = [self._worker(sink) for sink in self.sinks]
        kubernetes = self._kubernetes()
        self.sensors = Sensors(
            settings.sensors, nodes=kubernetes, now=now, monotonic=monotonic, cluster=self.identity.discovered
        )
        self.metrics.registry.register(SensorsCollector(self.sensors))
        self._now_ns = now_ns
        self.admin = Admin(settings.admin, self)

    async def start(self) -> None:
        """Open everything. On a failure what was opened is closed again."""
        loop = asyncio.get_running_loop()
        await self.files.load()
        async with contextlib.AsyncExitStack() as stack:
            await self.spool.open()
            stack.push_async_callback(self.spool.close)
            stack.push_async_callback(self.aws.close)
            wanted = [service for enricher in self.enrichers for service in enricher.wanted_services()]
            await self.aws.open_clients([*((sink.service, sink.role) for sink in self.sinks), *wanted])
            self.ingest = Ingest(
                spool=self.spool,
                metrics=self.metrics,
                hold_secs_max=self.settings.receiver.hold_secs_max,
                now_ns=self._now_ns,
                now_monotonic=loop.time,
                enrichment=self.enrichment if self.enrichers else None,
                saw=self.sensors.saw,
                custom=CustomMembers(
                    fields_of(self.settings.customfields, os.environ), tags_of(self.settings.customtags)
                ),
            )
            self.receiver = Receiver(
                self.settings.receiver,
                files=self.files,
                ingest=self.ingest,
                metrics=self.metrics,
                rng=self._rng,
                now_ns=self._now_ns,
            )
            await self.admin.start()
            stack.push_async_callback(self.admin.stop)
            for enricher in self.enrichers:
                await enricher.start()
                stack.push_async_callback(enricher.stop)
            await self.identity.start()
            stack.push_async_callback(self.identity.stop)
            for worker in self.workers:
                if isinstance(worker, FindingsWorker):
                    await worker.load()
            tasks = [
                asyncio.create_task(self._guard(worker), name=f"delivery {worker.name}")
                for worker in self.workers
            ]
            stack.push_async_callback(self._drain_workers, tasks)
            for name, work in self._side_tasks():
                stack.callback(asyncio.create_task(work, name=name).cancel)
            await self.receiver.start()
            stack.push_async_callback(self._stop_receiver)
            self._stack = stack.pop_all()
        log.info(
            "started",
            sinks=[worker.name for worker in self.workers],
            receiver_port=self.receiver.port,
            admin_port=self.admin.port,
            pending=max((worker.status().pending for worker in self.workers), default=0),
            sync=self.settings.spool.sync,
        )

    async def stop(self, *, delay: bool = True) -> None:
        """Drain and close everything; ``delay`` keeps the listener up for a while first."""
        self._draining = True
        self._delay = self.settings.receiver.drain_delay_secs if delay else 0.0
        await self._stack.aclose()
        log.info("stopped", pending=max((worker.status().pending for worker in self.workers), default=0))

    @staticmethod
    def tune_interpreter() -> None:
        """Make the interpreter fit the service: once, after the start.

        What start-up made stays, so the collector need not look at it again, nor so often. And the writer thread
        must not wait 5 ms for the interpreter whenever the event loop is busy.
        """
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        sys.setswitchinterval(SWITCH_SECS)

    async def run(self, stop: asyncio.Event) -> None:
        """Start, wait for ``stop``, stop."""
        await self.start()
        self.tune_interpreter()
        await stop.wait()
        await self.stop()

    # ---- what the admin port asks -------------------------------------------------------------------

    def alive(self) -> str:
        """What keeps the process from doing anything at all, or nothing."""
        silence = self.spool.writer_silence_secs()
        if silence > WRITER_SILENCE_SECS_MAX:
            return f"the spool's writer has not moved for {silence:.0f} s"
        return ""

    def ready(self) -> str:
        """Why new alerts cannot be stored, or nothing. AWS has no part in it."""
        if self._draining:
            return "draining"
        if self.spool.failure:
            return f"the spool cannot be written: {self.spool.failure}"
        if self.spool.fill >= 1.0:
            return "the spool is full"
        if not self.receiver.listening:
            return "the receiver does not listen"
        return ""

    def status(self) -> dict[str, Any]:
        """``/status``: everything a person wants to know, as JSON."""
        oldest = self.spool.oldest.values()
        reason = self.ready()
        state = "draining" if self._draining else "not ready" if reason else "running"
        return {
            "state": state,
            "reason": reason or None,
            "uptime_secs": round(self._now() - self._started_at, 1),
            "spool": {
                "alerts": self.spool.events,
                "bytes": self.spool.used_bytes,
                "bytes_max": self.spool.bytes_max,
                "oldest_secs": round(max(0.0, self._now() - min(oldest)), 1) if oldest else 0.0,
                "sync": self.settings.spool.sync,
                "dead_letters": self.spool.dead,
            },
            "sinks": {worker.name: worker.status()._asdict() for worker in self.workers},
            "cluster": {
                "name": self.identity.name or None,
                "source": self.identity.source or None,
                "asked": self.identity.steps,
            },
            "rules": self.rules.status(),
            "sensors": self.sensors.status(),
            "enrichment": {enricher.name: enricher.status() for enricher in self.enrichers},
        }

    def publish(self) -> None:
        """Bring all metrics up to date, before a scrape."""
        self._fold_counts()
        self.receiver.publish()
        self.spool.publish()
        for worker in self.workers:
            worker.publish()
        for sink in self.sinks:
            client = self.aws.client(sink.service, sink.role)
            self.metrics.clock_skew[sink.name].set(client.clock_skew_secs)
            self.metrics.credentials_expire[sink.name].set(client.credentials_expire_at())
        status = self.rules.status()
        self.metrics.rules.set(len(status["rules"]))
        self.metrics.silences.set(sum(silence["state"] == "active" for silence in status["silences"]))
        self.metrics.ready.set(not self.ready())
        self.metrics.loop_lag.set(max((lag for _, lag in self._lags), default=0.0))

    def sensors_heard(self) -> dict[str, Any]:
        """``/sensors``: which node's Falco was heard when, for the other replicas too."""
        return self.sensors.heard()

    async def dead_letters(self, before: int, limit: int) -> list[tuple[int, DeadLetter]]:
        """A page of ``/dead-letters``, the newest first."""
        return await self.spool.dead_letters(before, limit)

    # ---- inside -------------------------------------------------------------------------------------

    async def _stop_receiver(self) -> None:
        self.receiver.drain()
        await asyncio.sleep(self._delay)
        await self.receiver.stop()

    async def _drain_workers(self, tasks: list[asyncio.Task[None]]) -> None:
        for worker in self.workers:
            worker.drain()
        await asyncio.wait(tasks, timeout=self.settings.delivery.drain_secs_max)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _worker(self, sink: Any) -> Worker | FindingsWorker:
        kind = FindingsWorker if hasattr(sink, "aggregation") else Worker
        return kind(
            sink,
            spool=self.spool,
            settings=self.settings.delivery,
            metrics=self.metrics,
            now=self._now,
            rng=self._rng,
            complete=self.enrichment.again,
            rules=self.rules,
        )

    def _side_tasks(self) -> list[tuple[str, Coroutine[Any, Any, None]]]:
        """What runs beside the way of the alerts, and is simply cancelled at the end."""
        tasks = [("loop lag and counts", self._watch_lag()), ("receiver files", self.files.run())]
        tasks.append(("credentials", self.aws.keep_fresh()))
        if self._config is not None:
            reload = RulesReload(
                self._config, self.rules, self.settings, load=load_settings, reloaded=self._reloaded
            )
            tasks.append(("rules", reload.run()))
        findings = next((worker for worker in self.workers if isinstance(worker, FindingsWorker)), None)
        if findings is not None:  # also where it is off: what is still reported gets archived
            peers = self.settings.sensors.peers
            watch = Watch(
                self.settings.sensors,
                self.sensors,
                ask=Peers(peers).ask if peers else None,
                reported=findings.told,
                tell=findings.tell,
                now=self._now,
            )
            tasks.append(("sensors", watch.run()))
        return tasks

    def _reloaded(self, ok: bool) -> None:
        self.metrics.rules_reloads["ok" if ok else "failed"].inc()
        self.metrics.rules_reload_ok.set(ok)

    async def _guard(self, worker: Worker | FindingsWorker) -> None:
        """A worker never ends by itself while we run: a fault of ours is logged, and it starts again."""
        while True:
            try:
                await worker.run()
            except Exception:
                log.exception("delivery worker failed, starting it again", sink=worker.name)
            else:
                return
            await asyncio.sleep(RESTART_SECS)

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            before = loop.time()
            await asyncio.sleep(LAG_PERIOD_SECS)
            now = loop.time()
            self._lags = [item for item in self._lags if item[0] > now - LAG_WINDOW_SECS]
            self._lags.append((now, max(0.0, now - before - LAG_PERIOD_SECS)))
            self._fold_counts()

    def _fold_counts(self) -> None:
        """What is counted on the way of every alert is put into the metrics here, and not by each alert."""
        self.ingest.publish()
        for enricher in self.enrichers:
            enricher.publish()
        self.sensors.publish()

    def _surroundings(self) -> Surroundings:
        """What the cluster's name may be learned from."""
        found = self._kubernetes()
        if found is None:
            return Surroundings()
        return Surroundings(
            nodes_say=found.cluster,
            an_instance=found.an_instance,
            region=found.region,
            api=lambda: found.api,
        )

    def _kubernetes(self) -> Kubernetes | None:
        return next((item for item in self.enrichers if isinstance(item, Kubernetes)), None)

    def _enricher(self, name: str, monotonic: Callable[[], float]) -> Enricher:
        enricher: Enricher = enricher_class(name)(
            getattr(self.settings.enrichment, name),
            metrics=self.metrics,
            now=self._now,
            monotonic=monotonic,
            rng=self._rng,
            aws=self.aws,
            environment=os.environ,
            sensor_labels=self.settings.sensors.node_selector,
        )
        return enricher


def build_sink(name: str, settings: Settings, aws: Aws, now: Callable[[], float]) -> Any:
    """A sink from its own section, with what all of them may ask for."""
    logs = settings.sinks.cloudwatch_logs
    sink: Service = sink_class(name)(
        getattr(settings.sinks, name),
        aws=aws,
        cluster=settings.cluster.name,
        cluster_arn=settings.cluster.arn,
        cluster_account=settings.cluster.account_id,
        replica=settings.replica.name or socket.gethostname(),
        now=now,
        log_group=logs.log_group if logs.enabled else "",
        log_stream=logs.log_stream if logs.enabled else "",
    )
    return sink
