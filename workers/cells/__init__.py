"""Where the cells of an engine come from, and the client of one."""
