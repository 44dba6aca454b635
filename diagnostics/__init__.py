"""Questions asked of a machine, a build, a program or a report."""
