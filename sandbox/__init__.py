"""Isolation and evidence: supervised cells. Knows no llama.cpp."""
