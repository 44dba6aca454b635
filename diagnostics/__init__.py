"""Questions asked afterwards: triage."""
