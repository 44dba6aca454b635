"""A report or a run as text, Markdown, SARIF, JUnit, a bundle."""
