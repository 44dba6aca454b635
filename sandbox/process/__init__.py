"""Starting, watching and ending processes; what /proc and ELF files say of them."""
