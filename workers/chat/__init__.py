"""Chat: messages checked and rendered; reasoning and tool calls found in what the model says."""
