"""From crashes to reports: what one job met, written beside the caller."""
