"""A batch: how it is built, read from a caller, checked, split, and what came of it."""
