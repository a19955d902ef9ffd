"""The captioner as an HTTP server: KServe's protocol v2, concurrent requests in common batches."""
