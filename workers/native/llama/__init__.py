"""Child side: the real ``llama_cpp.Llama`` behind typed requests, with what a replay needs."""
