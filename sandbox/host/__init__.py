"""What a supervisor finds where it runs: surroundings, shortages; and how it works beside its callers."""
