"""The ladder: the native batch, then one sequence at a time, then token by token."""
