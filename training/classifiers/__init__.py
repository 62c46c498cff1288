"""Training classifiers of hidden states: what guidance follows, and what probes read."""
