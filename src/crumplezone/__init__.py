"""A crumple zone for llama.cpp."""
