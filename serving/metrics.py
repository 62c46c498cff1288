"""What Prometheus may read at /metrics, in a registry of the app's own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.attribution.result import Attribution
from trimtab.serving.builds import Builds
from trimtab.serving.jobs import JobQueue
from trimtab.serving.lifecycle import Lifecycle
from trimtab.steering.plan import Plan, ProbeRow, Reader

_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PROBABILITY = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
_DOSE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5)


class EngineGauges(Collector):
    """Reads the engine's load at scrape time, so that nothing can go stale."""

    def __init__(
        self, lifecycle: Lifecycle, attributions: JobQueue[Attribution], builds: Builds
    ) -> None:
        self.lifecycle = lifecycle
        self.attributions = attributions
        self.builds = builds

    def describe(self) -> list[Metric]:
        """Return nothing: registering must not ask an engine that has not started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges; only `trimtab_ready` while the engine loads."""
        ready = self.lifecycle.is_ready and self.lifecycle.engine.is_alive
        yield GaugeMetricFamily("trimtab_ready", "1 once the model is loaded", value=int(ready))
        if not ready:
            return
        stats = self.lifecycle.engine.stats()
        for name, text, value in (
            ("requests_running", "Sequences being generated", stats.running),
            ("requests_waiting", "Sequences in the queue", stats.waiting),
            ("slots_used", "Steering slots in use", stats.slots_used),
            ("slots", "Steering slots there are", stats.slots_total),
            ("attributions", "Attributions that wait or run", len(self.attributions)),
            ("builds_live", "Builds that wait or run", len(self.builds)),
        ):
            yield GaugeMetricFamily(f"trimtab_{name}", text, value=value)
        yield CounterMetricFamily("trimtab_engine_steps", "Steps of the engine", value=stats.steps)


class Metrics:
    """Counters and histograms of one app.

    Args:
        lifecycle: where the engine's load is read.
        attributions: their queue.
        builds: theirs.
    """

    def __init__(
        self, lifecycle: Lifecycle, attributions: JobQueue[Attribution], builds: Builds
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineGauges(lifecycle, attributions, builds))

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"trimtab_{name}", text, labels, registry=self.registry)

        def histogram(
            name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
        ) -> Histogram:
            return Histogram(
                f"trimtab_{name}", text, labels, buckets=buckets, registry=self.registry
            )

        self.requests = counter("requests", "HTTP requests answered", ("route", "status"))
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read")
        self.completion_tokens = counter("completion_tokens", "Tokens generated")
        self.steered_tokens = counter("steered_tokens", "Tokens whose hidden state was steered")
        self.steered_requests = counter("steered_requests", "Requests that asked for steering")
        self.generations_logged = counter("generations_logged", "Choices in the generation log")
        self.generations_not_logged = counter(
            "generations_not_logged", "Choices the generation log has not", ("reason",)
        )
        self.builds = counter(
            "builds_ended", "Builds that are over, by how they ended", ("kind", "status")
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From request to first token", _FIRST_TOKEN_S
        )
        self.inter_token = histogram(
            "inter_token_seconds", "Between two tokens of one sequence", _TOKEN_S
        )
        self.duration = histogram(
            "request_duration_seconds", "From request to end of answer", _REQUEST_S, ("route",)
        )
        self.probes = histogram(
            "probe",
            "Probability a request's probe read at a generated token",
            _PROBABILITY,
            ("probe", "label"),
        )
        self.dose = histogram("dose", "Largest relative dose of a steered request", _DOSE)

    def probed(self, readers: tuple[Reader, ...], rows: tuple[ProbeRow, ...]) -> None:
        """Count what a request's probes read at new tokens."""
        for row in rows:
            for reader, values in zip(readers, row, strict=True):
                for label, value in zip(reader.labels, values, strict=True):
                    self.probes.labels(reader.id, label).observe(value)

    def steered(self, plan: Plan) -> None:
        """Count one request that is steered by a plan."""
        self.steered_requests.inc()
        self.dose.observe(max(plan.report["dose"].values(), default=0.0))
