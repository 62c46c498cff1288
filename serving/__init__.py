"""The OpenAI-compatible server: sampling, engines, routes."""
