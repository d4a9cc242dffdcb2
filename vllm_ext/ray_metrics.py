"""Our metrics on Ray's metrics port, from inside a Serve replica.

Every family that workers report follows by itself, under its name with ``:`` as ``_`` (Ray
puts ``ray_`` before it), with its help text, its labels and ``ReplicaId``, as vLLM's own do.
Ray's histograms only take single observations, which the workers have counted already: the
samples of ours follow as gauges under the names that a histogram's have.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from prometheus_client import Metric
from prometheus_client.registry import Collector

from kvcache.adapter.figures import metrics_folder
from vllm_ext.metrics import WorkerFigures

PERIOD_S = 2.0  # Ray itself reports every few seconds
logger = logging.getLogger("vllm.vllm_ext")


class RayExporter:
    """Carries what a collector reads into Ray's metrics.

    Args:
        source: read at every ``update``.
        replica_id: the value of the label ``ReplicaId``.
        instruments: ``ray.util.metrics``, or a stand-in with its ``Counter`` and ``Gauge``.
    """

    def __init__(self, source: Collector, replica_id: str, instruments: Any) -> None:
        self._source = source
        self._replica_id = replica_id
        self._instruments = instruments
        self._by_name: dict[str, Any] = {}
        self._totals: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def update(self) -> None:
        """Sets gauges, and raises counters by what they grew since the last update.

        Raises:
            TypeError: a family of another kind than workers write.
        """
        for family in self._source.collect():
            if family.type not in ("counter", "gauge", "histogram"):
                raise TypeError(f"{family.name} is a {family.type}: not carried into Ray's metrics")
            for sample in family.samples:
                tags = {**sample.labels, "ReplicaId": self._replica_id}
                if family.type != "counter":
                    gauge = self._instrument("Gauge", sample.name, family, tuple(tags))
                    gauge.set(sample.value, tags=tags)
                    continue
                instrument = self._instrument("Counter", family.name, family, tuple(tags))
                key = (family.name, frozenset(sample.labels.items()))
                growth = sample.value - self._totals.get(key, 0.0)
                if growth > 0:  # Ray refuses to add nothing
                    instrument.inc(growth, tags=tags)
                    self._totals[key] = sample.value

    def _instrument(self, kind: str, name: str, family: Metric, tag_keys: tuple[str, ...]) -> Any:
        if name not in self._by_name:
            make = getattr(self._instruments, kind)
            self._by_name[name] = make(name.replace(":", "_"), family.documentation, tag_keys)
        return self._by_name[name]


def start(replica_id: str) -> None:
    """Updates Ray's metrics every ``PERIOD_S`` in a thread, until this process ends.

    Args:
        replica_id: see ``RayExporter``.

    Raises:
        RuntimeError: workers report nowhere, so that there is nothing to carry.
    """
    from ray.util import metrics as ray_instruments

    folder = metrics_folder()
    if folder is None:
        raise RuntimeError("the workers' metrics folder is missing: vllm-ext would go uncounted")
    exporter = RayExporter(WorkerFigures(folder), replica_id, ray_instruments)

    def run() -> None:
        while True:
            time.sleep(PERIOD_S)
            try:
                exporter.update()
            except Exception:  # one bad reading must not end all later ones
                logger.exception("vllm-ext's metrics did not reach Ray")

    threading.Thread(target=run, name="vllm-ext-ray-metrics", daemon=True).start()
