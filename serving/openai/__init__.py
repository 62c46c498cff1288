"""OpenAI's wire: requests checked field by field, answers in OpenAI's own types."""
