"""The configuration of the server."""

from dataclasses import dataclass

from model_lib.options import CaptionPrecision, StageConfig, option, require

MB = 10**6


@dataclass(frozen=True, kw_only=True)
class ServeConfig(StageConfig):
    """Answer requests for captions over HTTP, as KServe does (Open Inference Protocol, v2)."""

    model: str
    """The model: a folder, hub name, URI or models:/captioner@champion, whose version is looked up
    at the start; or hf: before a hub name, folder or URI of a captioner of transformers."""
    name: str = "captioner"
    """The model's name in addresses: /v2/models/NAME/infer."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: all of this machine."""
    port: int = option(8080, minimum=0)
    """Port to listen at; 0: a free one."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    precision: CaptionPrecision = "auto"
    """Number format of the weights; auto: 16 bits where that is fast."""
    batch_size: int = option(32, minimum=1)
    """Most images of concurrent requests that are captioned together."""
    wait_ms: float = option(10.0, minimum=0)
    """Longest time in ms that an image waits for others while the model is idle."""
    request_images: int = option(64, minimum=1)
    """Most images of a request."""
    request_mb: int = option(32, minimum=1)
    """Most MB of a request."""
    queue_images: int = option(512, minimum=1)
    """Most images of all requests under way; more are answered 503."""
    queue_mb: int = option(256, minimum=1)
    """Most MB of all requests under way; more are answered 503."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.port < 2**16, f"port: {self.port} is not below 65536")
        for unit in ("images", "mb"):
            request, queue = getattr(self, f"request_{unit}"), getattr(self, f"queue_{unit}")
            problem = f"queue_{unit}: {queue} is less than request_{unit}, {request}"
            require(request <= queue, f"{problem}: such a request would never be taken")
