"""Image encoders and Qwen-Image's text encoder under the host's memory management."""
