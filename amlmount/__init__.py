"""amlmount: frozen datasets from cloud storage, mounted read-only for training jobs."""

__version__ = "0.1.0"
