"""What `/metrics` shows to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        statuses = "Requests by path and status; 499: the client disconnected"
        self.requests = Counter("simplear_requests", statuses, ["path", "status"], registry=registry)
        latency = "From the head of a request to the end of its answer"
        self.latency = Histogram("simplear_request_seconds", latency, ["path"], buckets=SECONDS, registry=registry)
        self.queue = Gauge("simplear_queue_images", "Images that wait", ["model"], registry=registry)
        size = "Images in a batch, without fillers"
        self.batch_size = Histogram("simplear_batch_images", size, ["model"], buckets=BATCH_SIZES, registry=registry)
        self.images = Counter("simplear_images", "Images drawn", ["model"], registry=registry)
        dropped = "Partial images that were not shown since others waited"
        self.dropped = Counter("simplear_partial_images_dropped", dropped, ["model"], registry=registry)
