"""Where a model comes from: a Hugging Face folder or hub id (safetensors), or an nn.Module and its forward function."""
