"""The vLLM engine: the same plans on vLLM's batches, as a plugin that vLLM loads itself."""
