"""The child's side of a cell, a zygote and an armed program."""
