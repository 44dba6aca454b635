"""What a report means: its stack, signature, verdict, what must not leave the machine."""
