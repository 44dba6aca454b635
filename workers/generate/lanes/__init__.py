"""Cells that complete prompts, each with a thread, over one queue."""
