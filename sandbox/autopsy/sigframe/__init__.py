"""The kernel's signal frame of a held process: registers and fault address."""
