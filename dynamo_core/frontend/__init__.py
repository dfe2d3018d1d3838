"""The HTTP surface: OpenAI's API in front of a catalog of models."""
