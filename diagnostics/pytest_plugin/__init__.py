"""pytest --crumple: every test in a cell of its own."""
