"""The compressed file: packed leaves in safetensors, checksummed, atomic, no pickle."""
