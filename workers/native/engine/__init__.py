"""Child side: continuous batching of prompts within one context."""
