"""What is found out about a process that crashed, hung or was killed."""
