"""Completions of many prompts: jobs, lanes, and what is in flight when a cell dies."""
