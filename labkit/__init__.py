"""Reusable code for the KV-cache labs: attention, a Llama decoder, caches, measurement, and the course around them."""
