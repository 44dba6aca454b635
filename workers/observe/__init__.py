"""What is told of an engine: counts, events for listeners, the health of its cells."""
