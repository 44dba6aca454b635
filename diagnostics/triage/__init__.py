"""Listing, grouping and comparing reports."""
