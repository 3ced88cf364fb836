"""The compressed-tensors layout of safetensors, which vLLM and transformers read: a folder with a config.json."""
