"""Is this machine fit? Checks, each with a remedy."""
