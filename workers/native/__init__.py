"""Child side: the only importer of llama_cpp. Nobody imports it; cells name it as a string."""
