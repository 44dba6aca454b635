"""Child side: a vocabulary without a context: tokens, chat templates, grammars."""
