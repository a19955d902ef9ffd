"""What the server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics:
    """Counters of one server.

    Args:
        version: of the model.
        queued: returns the images under way.
    """

    def __init__(self, version: str, queued: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Info("captioner_model", "The model that is served", registry=registry).info(
            {"version": version}
        )
        Gauge("captioner_queue_images", "Images under way", registry=registry).set_function(queued)
        self.requests = Counter(
            "captioner_requests", "Requests for captions", ["status"], registry=registry
        )
        self.images = Counter("captioner_images", "Images with a caption", registry=registry)
        self.request_seconds = Histogram(
            "captioner_request_seconds",
            "Time from a request's head to its answer",
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_images = Histogram(
            "captioner_batch_images", "Images of a batch", buckets=SIZES, registry=registry
        )
        self.batch_seconds = Histogram(
            "captioner_batch_seconds", "The model's time", buckets=SECONDS, registry=registry
        )

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch of the model."""
        self.batch_images.observe(images)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self.registry)
