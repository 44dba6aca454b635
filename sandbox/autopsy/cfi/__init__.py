"""The callers of a held thread, by the call frame information of what it runs: in process, in Python."""
