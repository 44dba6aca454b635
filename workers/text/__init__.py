"""Texts and tokens, chat templates and grammars, in cells that hold a vocabulary only."""
