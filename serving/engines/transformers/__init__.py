"""The embedded engine: transformers models, continuous batching, steering by forward hooks."""
