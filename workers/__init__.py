"""Inference: from a batch or a prompt to its result, through any crash."""
