"""What is in flight in a cell, and who goes on with whom after a crash."""
