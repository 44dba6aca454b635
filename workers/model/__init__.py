"""A model file and the settings of a context."""
