"""The compiled pipelines, and running them here."""
