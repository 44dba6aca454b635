"""What is asked of a cell that generates, and how it draws tokens."""
