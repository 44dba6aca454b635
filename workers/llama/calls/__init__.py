"""Calls of a `Llama`, through crashes: what each was, whose turn it is, and the cells they run in."""
