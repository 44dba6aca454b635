"""A run or a pile of reports as one HTML page."""
