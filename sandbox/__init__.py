"""Isolation and evidence: supervised processes. Knows no llama.cpp but the words it dies with."""
