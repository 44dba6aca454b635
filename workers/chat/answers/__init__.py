"""What a model says, cut into content, reasoning and tool calls as it comes."""
