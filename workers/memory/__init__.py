"""The memory of a stateful decoder, and its journal for replay."""
