"""What is on disk, as types: a crash report, a diagnostic run."""
