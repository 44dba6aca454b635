"""Where reports lie: written atomically, indexed, shrunk in a storm, pruned."""
