"""Crash reports: their schema, the store on disk, and what people read."""
