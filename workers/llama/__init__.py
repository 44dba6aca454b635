"""`Llama`: the drop-in for llama_cpp.Llama."""
