"""Embeddings of many texts."""
