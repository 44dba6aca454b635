"""What supervisor and cell say to each other, and the configuration of a cell. Imports no llama.cpp."""
