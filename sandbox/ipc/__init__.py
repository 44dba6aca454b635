"""What crosses between supervisor and cell: frames, the arena, the flight recorder."""
