"""Diagnostic runs: a matrix of batch shapes against a baseline."""
