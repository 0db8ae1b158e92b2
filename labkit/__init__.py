"""Reusable code for the KV-cache labs: attention, a Llama decoder, caches, measurement, and the course around them."""

__version__ = "0.1.0"
