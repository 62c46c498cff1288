"""The vLLM engine: our bank and op inside vLLM's workers, driven through AsyncLLM."""
