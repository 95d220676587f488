"""What `/metrics` shows to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "simplear_requests",
            "Requests by path and status; 499: the client went away",
            ["path", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "simplear_request_seconds",
            "From the head of a request to the end of its answer",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue = Gauge("simplear_queue_images", "Images that wait", ["model"], registry=self.registry)
        self.batch_size = Histogram(
            "simplear_batch_images",
            "Images in a batch, without fillers",
            ["model"],
            buckets=BATCH_SIZES,
            registry=self.registry,
        )
        self.images = Counter("simplear_images", "Images drawn", ["model"], registry=self.registry)
        self.dropped = Counter(
            "simplear_partial_images_dropped",
            "Partial images that were not shown since others waited, or for want of memory",
            ["model"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
