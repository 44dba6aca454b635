"""How many sequences side by side are fastest on this machine."""
